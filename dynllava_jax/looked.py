"""Which patches of a picture each generated word looked at, in a run with a `revisit` stage: an answer and a figure.

    python -m dynllava_jax.looked --checkpoint=runs/digits/dynamic/checkpoints --layer=2 --tokens=3

Without --image a digit scene is drawn, and the model is asked to read it.
"""

import numpy as np
from absl import flags

from dynllava_jax import command_line, paths
from dynllava_jax.workspace import workspace

CHECKPOINT = command_line.define_path('checkpoint', paths.shipped('examples/digits'), 'Checkpoint of a model.')
IMAGE = command_line.define_path('image', None, 'Picture; a digit scene if none is given.')
QUESTION = flags.DEFINE_string('question', 'Read the whole scene, row by row.', 'What is asked about it.')
SCORE = flags.DEFINE_string('score', 'attention', 'Score function, a name in methods/revisit.py.')
LAYER = flags.DEFINE_integer('layer', 2, 'Decoder layer that chooses.', lower_bound=0)
TOKENS = flags.DEFINE_integer('tokens', 3, 'Image tokens that each generated token sees.', lower_bound=1)
MOST = flags.DEFINE_integer('max_new_tokens', 72, 'Most tokens of the answer.', lower_bound=2)
SEED = flags.DEFINE_integer('seed', 0, 'Which scene is drawn.', lower_bound=0)
OUT = command_line.define_path('out', 'runs/looked', 'Where the figure goes.')

COLUMNS, CELL = 12, 0.95  # of the figure, and inches of each picture in it


def main(_) -> None:
  """The answer in the terminal, the figure in a file."""
  with command_line.readable_errors():
    out = command_line.output_directory(OUT)
    import dynllava_jax as dl
    from dynllava_jax.data.images import preprocess
    from dynllava_jax.display import printable
    from dynllava_jax.evals.layout import load_image
    from dynllava_jax.serving import questions
    from dynllava_jax.training.plot import save_figure

    stages = [dict(start=0), dict(start=LAYER.value, revisit=dict(name=SCORE.value, tokens=TOKENS.value))]
    if LAYER.value == 0:
      stages = [stages[1]]
    sizes = dict(max_new_tokens=MOST.value, text_lengths=(32, 128, 512), batch_size=1)
    model = dl.load(command_line.path(CHECKPOINT), stages=stages, **sizes)
    asked = questions.question(1, paths.given(IMAGE.value, '--image') if IMAGE.value else scene(), QUESTION.value)
    rows = questions.lay_out(model.loaded, [asked], sizes['text_lengths'], [0])[0]
    tokens, looked = follow(model.generator, rows.prompt, rows.pixels, model.loaded.tokenizer.eos_id)
    words = [printable(model.loaded.tokenizer.piece(t)) for t in tokens]
    print(printable(model.loaded.tokenizer.decode(tokens)))
    picture = preprocess(load_image(asked), model.loaded.model.vision, model.loaded.info.image_aspect)
    with workspace(out, '--out', wanted=lambda name: False) as folder:
      save_figure(figure(picture, words, looked, model.loaded.model.vision.patch_size), folder / 'looked.png')
    print(f'{out}/looked.png')


def scene() -> np.ndarray:
  """uint8[98, 98, 3], of digits that the model has never seen."""
  from dynllava_jax.data import digits

  return digits.make_scene('test', np.random.default_rng(SEED.value)).image


def follow(generator, prompt, pixels, eos_id: int | None) -> tuple[list[int], list[np.ndarray]]:
  """Greedy decoding of one row, step by step: (its tokens, and for each that was fed int[k], the patches that it looked at).

  The token that was fed at step i looks at them to find token i + 1.
  """
  turn, kept_image = generator.start(prompt, pixels)
  index = next(i for i, stage in enumerate(generator.model.stages) if stage.revisit)
  candidates = np.asarray(kept_image[index])[0]
  tokens, looked = [int(np.asarray(turn.logits)[0].argmax())], []
  while tokens[-1] != eos_id and len(tokens) < generator.max_new_tokens:
    turn, judgement = generator.step(turn, np.array(tokens[-1:], np.int32), np.ones(1, bool))
    looked.append(candidates[np.asarray(judgement.looked[0])[0]])
    tokens.append(int(np.asarray(turn.logits)[0].argmax()))
  return tokens, looked


def figure(picture: np.ndarray, words: list[str], looked: list[np.ndarray], patch: int):
  """One small picture for each word behind the first, bright where it looked; uint8[H, W, 3], patches of so many pixels."""
  from matplotlib.figure import Figure

  from dynllava_jax.evals.figures import dim

  lines = max(1, -(-len(looked) // COLUMNS))
  result = Figure(figsize=(COLUMNS * CELL, lines * (CELL + 0.25)), layout='constrained')
  axes = result.subplots(lines, COLUMNS, squeeze=False).reshape(-1)
  for place in axes:
    place.set_axis_off()
  for place, word, patches in zip(axes, words[1:], looked):
    place.imshow(dim(picture, patches, patch))
    place.set_title(word.strip() or word, fontsize=9, pad=2)
  return result


if __name__ == '__main__':
  command_line.run(main)
