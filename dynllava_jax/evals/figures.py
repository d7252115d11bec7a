"""Pictures of what the selectors did."""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dynllava_jax.data.images import preprocess
from dynllava_jax.data.tokenizer import Tokenizer
from dynllava_jax.display import printable
from dynllava_jax.evals.benchmarks.base import Question
from dynllava_jax.evals.layout import Loaded, load_image

matplotlib.use('Agg')
matplotlib.rcParams['text.parse_math'] = False  # a `$` in a question or a name is no formula

PICTURED_LONG, PICTURED_SHORT = 2, 2
WRAP = 46  # characters per line of generated text
LINES = 8  # of an answer, at most
KEPT, GIVEN_UP, DROPPED = '#111111', '#d08a2e', '#b9b9b9'


@dataclasses.dataclass(frozen=True)
class Pictured:
  """A question with its answer row."""

  question: Question
  row: Mapping[str, Any]


def pictured(questions: Sequence[Question], rows: Sequence[Mapping[str, Any]]) -> list[Pictured]:
  """The first few long and short questions whose image tokens were recorded."""
  known = [Pictured(questions[r['metadata']['row']], r) for r in rows if r['metadata'].get('kept_image')]
  long = [p for p in known if p.question.long][:PICTURED_LONG]
  return long + [p for p in known if not p.question.long][:PICTURED_SHORT]


def tokens_figure(shown: Sequence[Pictured], loaded: Loaded, title: str) -> Figure:
  """Pictures with their kept image patches bright, and the answers with dropped tokens grey, those given up later orange.

  Args:
    shown: a few answers of one run.
    loaded: the run's model and tokenizer.
    title: of the figure.
  """
  figure = Figure(figsize=(9, 2.7 * len(shown) + 0.6))
  figure.suptitle(title, fontsize=12, y=1 - 0.2 / figure.get_figheight())
  height = 1 / len(shown) * (1 - 0.6 / figure.get_figheight())
  for i, answer in enumerate(shown):
    meta = answer.row['metadata']
    kept_image = np.asarray(meta['kept_image'])
    bottom = (len(shown) - 1 - i) * height
    picture = figure.add_axes((0.02, bottom + 0.02, 0.28, height - 0.03))
    draw_patches(picture, seen_by_model(answer.question, loaded), kept_image, grid(loaded))
    text = figure.add_axes((0.32, bottom + 0.02, 0.66, height - 0.04))
    text.set_axis_off()
    question = textwrap.wrap(printable(answer.question.text[0], lines=True), 70, max_lines=2, placeholder=' ...')
    text.text(0, 0.97, '\n'.join(question), va='top', fontsize=11, weight='bold')
    fed = f'{meta["kept"].count("1")} of {len(meta["kept"])} fed tokens kept'
    if meta['evicted']:
      fed += f', {meta["evicted"]} of them given up later'
    text.text(
      0,
      0.97 - 0.11 * len(question),
      f'{len(kept_image)} of {grid(loaded) ** 2} image tokens, {fed}',
      va='top',
      fontsize=9,
      color='#666666',
    )
    write_tokens(text, meta, loaded.tokenizer, 0.85 - 0.11 * len(question))
  return figure


def grid(loaded: Loaded) -> int:
  """Image tokens along a side of the picture."""
  packer = loaded.model.packer
  return loaded.model.vision.image_size // (loaded.model.vision.patch_size * (packer.scale_factor if packer else 1))


def seen_by_model(question: Question, loaded: Loaded) -> np.ndarray:
  """The question's picture as the model sees it, uint8[R, R, 3]."""
  return preprocess(load_image(question), loaded.model.vision, loaded.info.image_aspect)


def draw_patches(axes, image: np.ndarray, kept: np.ndarray, side: int) -> None:
  """A picture uint8[R, R, 3] with the patches int32[M] `kept` bright and framed, of `side` along each side."""
  patches = kept[kept >= 0]  # a class token among them is no part of the picture
  size = image.shape[0] // side
  axes.imshow(dim(image, patches, size))
  axes.set_axis_off()
  for token in patches:
    row, column = divmod(int(token), side)
    axes.add_patch(
      matplotlib.patches.Rectangle((column * size - 0.5, row * size - 0.5), size, size, fill=False, edgecolor='#ffb000', lw=1)
    )


def write_tokens(
  axes, meta: Mapping[str, Any], tokenizer: Tokenizer, top: float, color: Callable[[int], Any] | None = None, wrap: int = WRAP
) -> None:
  """The generated tokens in monospace, `wrap` characters a line.

  Coloured as `color` says of each; if None, those whose K/V were dropped grey and those given up orange. The last was never fed.
  """
  color = color or (lambda i: token_color(meta, i))
  line, column, step = 0, 0, 1 / (wrap * 1.15)
  for i, token in enumerate(meta['tokens']):
    piece = '</s>' if token == tokenizer.eos_id else printable(tokenizer.piece(token))
    if column + len(piece) > wrap or (piece == ' row' and column):
      line, column = line + 1, 0
    if line == LINES:
      return
    axes.text(column * step, top - 0.085 * line, piece, va='top', fontsize=11, family='monospace', color=color(i))
    column += len(piece)


def token_color(meta: Mapping[str, Any], i: int) -> str:
  """Of generated token `i`."""
  if i in meta['given_up']:
    return GIVEN_UP
  return KEPT if i >= len(meta['kept']) or meta['kept'][i] == '1' else DROPPED


def dim(image: np.ndarray, kept: np.ndarray, patch_size: int) -> np.ndarray:
  """uint8[H, W, 3] with every patch that was not kept darkened to a third."""
  side = image.shape[1] // patch_size
  bright = np.zeros(side * side, bool)
  bright[kept] = True
  mask = np.kron(bright.reshape(side, side), np.ones((patch_size, patch_size), bool))
  return np.where(mask[..., None], image, image // 3)
