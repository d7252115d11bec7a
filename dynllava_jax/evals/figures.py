"""Pictures of what the selectors did."""

import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dynllava_jax.data.conversation import IMAGE_TOKEN
from dynllava_jax.data.tokenizer import Tokenizer
from dynllava_jax.evals.runner import Answer

matplotlib.use('Agg')

WRAP = 46  # characters per line of generated text
KEPT, DROPPED = '#111111', '#b9b9b9'


def tokens_figure(answers: list[Answer], tokenizer: Tokenizer, patch_size: int, title: str) -> Figure:
  """Scenes with their kept image patches bright, and the answers with dropped tokens grey.

  Args:
    answers: a few answers of one run.
    tokenizer: to split the answers into their tokens.
    patch_size: pixels per image token.
    title: of the figure.
  """
  figure = Figure(figsize=(9, 2.7 * len(answers) + 0.6))
  figure.suptitle(title, fontsize=12, y=1 - 0.2 / figure.get_figheight())
  height = 1 / len(answers) * (1 - 0.6 / figure.get_figheight())
  for i, answer in enumerate(answers):
    bottom = (len(answers) - 1 - i) * height
    picture = figure.add_axes((0.02, bottom + 0.02, 0.28, height - 0.03))
    picture.imshow(dim(answer.sample.image, answer.kept_image, patch_size))
    picture.set_axis_off()
    side = answer.sample.image.shape[1] // patch_size
    for token in answer.kept_image:
      row, column = divmod(int(token), side)
      picture.add_patch(
        matplotlib.patches.Rectangle(
          (column * patch_size - 0.5, row * patch_size - 0.5), patch_size, patch_size, fill=False, edgecolor='#ffb000', lw=1
        )
      )
    text = figure.add_axes((0.32, bottom + 0.02, 0.66, height - 0.04))
    text.set_axis_off()
    question = answer.sample.conversations[0]['value'].replace(f'{IMAGE_TOKEN}\n', '')
    text.text(0, 0.97, '\n'.join(textwrap.wrap(question, 70)), va='top', fontsize=11, weight='bold')
    kept = f'{len(answer.kept_image)} of {side * side} image tokens, {int(answer.kept.sum())} of {len(answer.kept)} fed tokens kept'
    text.text(0, 0.86, kept, va='top', fontsize=9, color='#666666')
    write_tokens(text, answer, tokenizer)
  return figure


def write_tokens(axes, answer: Answer, tokenizer: Tokenizer) -> None:
  """The generated tokens in monospace, those whose K/V were dropped in grey; the last was never fed."""
  line, column, step = 0, 0, 1 / (WRAP * 1.15)
  for i, token in enumerate(answer.tokens):
    piece = '</s>' if token == tokenizer.eos_id else tokenizer.piece(token)
    if column + len(piece) > WRAP or (piece == ' row' and column):
      line, column = line + 1, 0
    color = KEPT if i >= len(answer.kept) or answer.kept[i] else DROPPED
    axes.text(column * step, 0.74 - 0.085 * line, piece, va='top', fontsize=11, family='monospace', color=color)
    column += len(piece)


def dim(image: np.ndarray, kept: np.ndarray, patch_size: int) -> np.ndarray:
  """uint8[H, W, 3] with every patch that was not kept darkened to a third."""
  side = image.shape[1] // patch_size
  bright = np.zeros(side * side, bool)
  bright[kept] = True
  mask = np.kron(bright.reshape(side, side), np.ones((patch_size, patch_size), bool))
  return np.where(mask[..., None], image, image // 3)
