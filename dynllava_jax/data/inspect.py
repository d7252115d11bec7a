"""One sample as the model gets it: text with what is supervised in colour, token ids, image span, and the picture as PNG.

python -m dynllava_jax.data.inspect --config=configs/llava.py:finetune --config.init_from=checkpoints/llava-7b --index=5

`--batch=runs/x/bad_steps/120.npz` in the place of a config: a row of a step that went wrong.
"""

import io
import itertools
import pathlib
from typing import TYPE_CHECKING

import numpy as np
from absl import flags
from PIL import Image
from rich.text import Text

from dynllava_jax import command_line, paths, remote
from dynllava_jax.config import IGNORE, ConfigError, TrainConfig
from dynllava_jax.data.samples import Sample
from dynllava_jax.data.tokenizer import Tokenizer, load_tokenizer
from dynllava_jax.display import Terminal
from dynllava_jax.files import write_atomically

if TYPE_CHECKING:
  from dynllava_jax.data.batches import Batch

SUPERVISED, IMAGE, PADDING = 'bold green', 'magenta', 'dim'


def look(cfg: TrainConfig, index: int) -> 'tuple[Sample, Batch, Tokenizer]':
  """Sample number `index` of a run's source, its row in the smallest bucket that holds it, and the tokenizer.

  Raises:
    ConfigError: no such sample.
    DataError: the sample cannot be used.
  """
  from dynllava_jax import methods  # these bring jax along; the flags are known to be right by now
  from dynllava_jax.data.pipeline import LayOut
  from dynllava_jax.data.sources import new_tokenizer, training_source
  from dynllava_jax.training.starting import inherited_tokenizer

  files = inherited_tokenizer(cfg.init_from) if cfg.init_from else new_tokenizer(cfg.data, cfg.model.llama.vocab_size)
  source = training_source(cfg.data, cfg.seed)
  if not 0 <= index < len(source):
    raise ConfigError(f'--index: {index}, the source has samples 0 to {len(source) - 1}')
  sample = source[index]
  methods.check_run(cfg.model, cfg.stages, cfg.reducer)
  num_image = methods.num_image_tokens(cfg.model, cfg.reducer)
  room = methods.text_room(cfg.stages, num_image, cfg.model.llama.num_layers)
  layout = LayOut(cfg.data, cfg.model.vision, files, num_image, room)
  row = layout(sample, index, cfg.data.text_length)
  bucket = next(b for b in cfg.data.text_buckets if row.length <= b + num_image)
  return sample, layout(sample, index, bucket), load_tokenizer(files)


def look_saved(path: pathlib.Path, index: int) -> 'tuple[Sample, Batch, Tokenizer, int]':
  """Row number `index` of a batch that training left: its sample as far as it is known, the row, tokenizer and image tokens.

  Raises:
    ConfigError: no such file or row.
  """
  import jax

  from dynllava_jax.data.saved_batch import load_batch

  batch, about, files = load_batch(path)
  if not 0 <= index < len(about['ids']):
    raise ConfigError(f'--index: {index}, the batch has rows 0 to {len(about["ids"]) - 1}')
  row = jax.tree.map(lambda x: x[index], batch)
  return Sample(about['ids'][index], None, ()), row, load_tokenizer(files), about['num_image']


def spans(row: 'Batch', num_image: int) -> list[tuple[str, int, int]]:
  """(kind, start, end) of the runs of a row: 'prompt', 'image', 'supervised', 'padding'."""
  kinds = np.full(row.tokens.shape, 'prompt', dtype='U10')
  kinds[row.labels != IGNORE] = 'supervised'
  if row.image_start >= 0:
    kinds[row.image_start : row.image_start + num_image] = 'image'
  kinds[row.length :] = 'padding'
  edges = [0, *(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1).tolist(), len(kinds)]
  return [(str(kinds[a]), a, b) for a, b in itertools.pairwise(edges)]


def describe(sample: Sample, row: 'Batch', tokenizer: Tokenizer, num_image: int) -> list[Text]:
  """The sample for a terminal."""
  styles = {'supervised': SUPERVISED, 'image': IMAGE, 'padding': PADDING, 'prompt': ''}
  text, ids = Text(), Text()
  for kind, start, end in spans(row, num_image):
    if kind in ('image', 'padding'):
      note = f'<{kind}: positions {start} to {end - 1}>'
      text.append(note, styles[kind])
      ids.append(f' {note} ', styles[kind])
    else:
      tokens = row.tokens[start:end]
      text.append(''.join(tokenizer.piece(t) for t in tokens), styles[kind])
      ids.append(' ' + ' '.join(map(str, tokens)), styles[kind])
  size = 'as below' if row.image_start >= 0 else 'none'
  if isinstance(sample.image, Image.Image):
    size = f'{sample.image.size[0]}x{sample.image.size[1]}'
  supervised = int((row.labels != IGNORE).sum())
  head = (
    f'sample {sample.id}: {int(row.length)} positions of {row.tokens.size}, {supervised} supervised (green); picture {size}; '
    f'last answer from position {int(row.answer_start)}'
  )
  return [Text(head, 'bold'), text, ids]


def main(_) -> None:
  """Prints one sample and saves its picture."""
  given = flags.FLAGS
  with command_line.readable_errors():
    if given.batch:
      sample, row, tokenizer, num_image = look_saved(remote.fetched(paths.given(given.batch, '--batch')), given.index)
    else:
      from dynllava_jax import methods

      cfg = command_line.parse(TrainConfig, given.config)
      sample, row, tokenizer = look(cfg, given.index)
      num_image = methods.num_image_tokens(cfg.model, cfg.reducer)
    console = Terminal()
    for part in describe(sample, row, tokenizer, num_image):
      console.print(part)
      console.print()
    if row.image_start >= 0:
      path, content = paths.given(given.out, '--out'), io.BytesIO()
      Image.fromarray(row.pixels).save(content, 'PNG')
      write_atomically(path, content.getvalue())
      console.print(f'the picture as the model gets it: {path}')


if __name__ == '__main__':
  command_line.define_config()
  flags.DEFINE_integer('index', 0, 'Number of the sample in its source, or of the row in the batch.')
  command_line.define_path('batch', None, 'A batch that training left in WORKDIR/bad_steps; needs no config.')
  command_line.define_path('out', 'sample.png', 'Where the picture goes.')
  command_line.run(main)
