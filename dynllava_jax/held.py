"""What each layer still holds of picture, question and answer, in a run whose layers prune their context: a table and a figure.

    python -m dynllava_jax.held --checkpoint=runs/digits/dynamic_context_pruning/checkpoints

Digit scenes that the model has never seen are read row by row, with the stages that the checkpoint was trained with.
"""

import pathlib

import numpy as np
from absl import flags

from dynllava_jax import command_line, paths

CHECKPOINT = command_line.define_path('checkpoint', paths.shipped('examples/digits'), 'Checkpoint of a model whose layers vote.')
QUESTION = flags.DEFINE_string('question', 'Read the whole scene, row by row.', 'What is asked about each scene.')
SCENES = flags.DEFINE_integer('scenes', 16, 'How many scenes.', lower_bound=1)
MOST = flags.DEFINE_integer('max_new_tokens', 72, 'Most tokens of an answer.', lower_bound=2)
OUT = command_line.define_path('out', 'runs/held', 'Where the figure goes.')

CELL = 1.4  # inches of each picture in the figure
KINDS = ('image', 'question', 'answer')


def main(_) -> None:
  """The table in the terminal, the figure in a file."""
  with command_line.readable_errors():
    out = command_line.output_directory(OUT)
    import dynllava_jax as dl
    from dynllava_jax.config import ConfigError
    from dynllava_jax.data import digits
    from dynllava_jax.data.images import preprocess
    from dynllava_jax.evals.layout import load_image
    from dynllava_jax.pruned_cache import PrunedCache
    from dynllava_jax.serving import questions
    from dynllava_jax.training.plot import save_figure

    sizes = dict(max_new_tokens=MOST.value, text_lengths=(32,), batch_size=1)
    model = dl.load(command_line.path(CHECKPOINT), **sizes)
    generator, number = model.generator, model.generator.model.num_image
    total, first = [], None
    for seed in range(SCENES.value):
      asked = questions.question(1, digits.make_scene('test', np.random.default_rng(seed)).image, QUESTION.value)
      rows = questions.lay_out(model.loaded, [asked], sizes['text_lengths'], [0])[0]
      turn, _ = generator.start(rows.prompt, rows.pixels)
      if not all(isinstance(stage, PrunedCache) for stage in turn.cache.stages):
        raise ConfigError(
          f'{CHECKPOINT.value}: was not trained with layers that vote on their context; expected a checkpoint that was'
        )
      places = lambda cache: [layer for stage in cache.stages for layer in np.asarray(stage.position)[:, 0]]
      start, length = int(rows.prompt.image_start[0]), int(rows.prompt.length[0])
      before = places(turn.cache)
      generated, cache = generator.decode(turn, rows.prompt.seed)
      after, end = places(cache), length + int(generated.length[0]) - 1
      total.append(
        [[*shares(b, start, number, length, length)[:2], *shares(a, start, number, length, end)] for b, a in zip(before, after)]
      )
      if first is None:
        picture = preprocess(load_image(asked), model.loaded.model.vision, model.loaded.info.image_aspect)
        patches = [[p[(p >= start) & (p < start + number)] - start for p in layers] for layers in (before, after)]
        first = figure(picture, patches, model.loaded.model.vision.patch_size)
    print(table(np.nanmean(np.asarray(total), 0)))
    out.mkdir(parents=True, exist_ok=True)
    save_figure(first, pathlib.Path(out) / 'held.png')
    print(f'{out}/held.png')


def shares(position: np.ndarray, image_start: int, num_image: int, length: int, end: int) -> tuple[float, float, float]:
  """Of image, question and answer what a layer holds.

  Args:
    position: int[C], of the token in each slot, negative for none.
    image_start, num_image: where the image stands; length: of the prompt; end: of all that was fed. NaN where there is nothing.
  """
  image = (position >= image_start) & (position < image_start + num_image)
  text, answer = (position >= 0) & (position < length) & ~image, position >= length
  counts = zip((image, text, answer), (num_image, length - num_image, end - length))
  return tuple(float(found.sum()) / there if there else float('nan') for found, there in counts)


def table(mean: np.ndarray) -> str:
  """float[L, 5] as lines."""
  head = f'{"held, in %":<12}{"behind the prompt":^20}{"behind the answer":^30}\n'
  head += f'{"layer":<12}' + ''.join(f'{kind:>10}' for kind in (*KINDS[:2], *KINDS))
  return '\n'.join([head, *(f'{i:<12}' + ''.join(f'{100 * x:>10.0f}' for x in row) for i, row in enumerate(mean))])


def figure(picture: np.ndarray, patches: list[list[np.ndarray]], patch: int):
  """A row for what is held behind the prompt and one behind the answer, a column for each layer, bright where patches are held."""
  from matplotlib.figure import Figure

  from dynllava_jax.evals.figures import dim

  result = Figure(figsize=(len(patches[0]) * CELL, len(patches) * (CELL + 0.25)), layout='constrained')
  axes = result.subplots(len(patches), len(patches[0]), squeeze=False)
  for line, layers, when in zip(axes, patches, ('prompt', 'answer')):
    for layer, (place, held) in enumerate(zip(line, layers)):
      place.set_axis_off()
      place.imshow(dim(picture, held, patch))
      place.set_title(f'layer {layer}, {when}', fontsize=8, pad=2)
  return result


if __name__ == '__main__':
  command_line.run(main)
