"""What the data pipeline costs on the host.

    python benchmarks/data.py --out=benchmarks/results

Images: decode + pad + resize of 640x480 JPEGs, per second and core, beside the bare Pillow calls for the same work,
interleaved in one process. Rows: a batch of 64 from a prepared store of such pictures and conversations of some 450 tokens.
"""

import datetime
import io
import itertools
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time

import checkout  # noqa: F401
import numpy as np
from absl import app, flags
from PIL import Image

from dynllava_jax.config import DataConfig, VisionConfig
from dynllava_jax.data import check, preparation
from dynllava_jax.data.batches import encode_turns, stack
from dynllava_jax.data.conversation import template
from dynllava_jax.data.images import decode, preprocess
from dynllava_jax.data.pipeline import LayOut
from dynllava_jax.data.sources import training_data
from dynllava_jax.data.tokenizer import read_files

TOKENIZER = flags.DEFINE_string('tokenizer', 'tests/golden/text/tok_nonlegacy', 'Folder of a tokenizer.')
OUT = flags.DEFINE_string('out', 'benchmarks/results', 'Where the results go.')
PICTURES = flags.DEFINE_integer('pictures', 48, 'JPEGs.')
ROUNDS = flags.DEFINE_integer('rounds', 15, 'Measurements of each kind.')
BATCH = 64
VISION = VisionConfig()
PAD = tuple(int(255 * m) for m in VISION.image_mean)


def jpegs(count: int) -> list[bytes]:
  """640x480, with the low-pass spectrum of photographs, quality 90: about 100 KB each."""
  rng, out = np.random.default_rng(0), []
  for _ in range(count):
    layers = [rng.normal(0, 60 / 2**i, (480 >> (6 - i) or 1, 640 >> (6 - i) or 1, 3)) for i in range(7)]
    layers = [Image.fromarray(np.clip(x + 128, 0, 255).astype(np.uint8)).resize((640, 480), Image.BICUBIC) for x in layers]
    picture = np.clip(sum(np.asarray(x, np.float32) - 128 for x in layers) + 128, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, 'JPEG', quality=90)
    out.append(file.getvalue())
  return out


def ours(content: bytes) -> None:
  """The pipeline's own functions."""
  preprocess(decode(content, 'x'), VISION)


def pillow(content: bytes) -> None:
  """The calls that the result cannot be had without."""
  image = Image.open(io.BytesIO(content))
  image.load()
  square = Image.new('RGB', (640, 640), PAD)
  square.paste(image, (0, 80))
  np.asarray(square.resize((336, 336), Image.Resampling.BICUBIC))


def spread(values: list[float]) -> dict:
  """Median and quartiles."""
  low, middle, high = statistics.quantiles(values, n=4)
  return {'median': round(middle, 3), 'quartiles': [round(low, 3), round(high, 3)], 'n': len(values)}


def images_per_second(files: list[bytes], rounds: int) -> dict:
  """CPU time, so that what else runs on the machine counts as little as it can."""
  rates: dict[str, list[float]] = {'ours': [], 'pillow': []}
  for work in (ours, pillow):  # warm-up
    work(files[0])
  for _ in range(rounds):
    for name, work in (('ours', ours), ('pillow', pillow)):
      start = time.process_time()
      for content in files:
        work(content)
      rates[name].append(len(files) / (time.process_time() - start))
  ratios = [a / b for a, b in zip(rates['ours'], rates['pillow'])]
  return {name: spread(values) for name, values in rates.items()} | {'ratio': spread(ratios)}


def prepared(folder: pathlib.Path, files: list[bytes]) -> str:
  """A store of the pictures with conversations as long as mix665k's usually are, three rounds."""
  rng = np.random.default_rng(1)
  words = ('the', 'a', 'man', 'woman', 'dog', 'street', 'red', 'blue', 'large', 'near', 'under', 'holding', 'old', 'wooden', 'two')
  text = lambda n: ' '.join(rng.choice(words, n))
  samples = []
  for i, content in enumerate(files * (2 * BATCH // len(files) + 1)):
    (folder / f'{i}.jpg').write_bytes(content)
    turns = []
    for k in range(3):
      turns += [
        {'from': 'human', 'value': ('<image>\n' if k == 0 else '') + text(12) + '?'},
        {'from': 'gpt', 'value': text(40) + '.'},
      ]
    samples.append({'id': str(i), 'image': f'{i}.jpg', 'conversations': turns})
  (folder / 'mix.json').write_text(json.dumps(samples))
  data = DataConfig(conversation='vicuna_v1', text_length=1472)
  scan = check.Scan(
    json={'mix': folder / 'mix.json'}, images=folder, data=data, tokenizer=read_files(TOKENIZER.value), num_patches=576, processes=1
  )
  preparation.prepare(scan, [1.0], folder / 'out', only_check=False, image_bytes=True, shard_samples=500)
  return str(folder / 'out')


def batch_cost(path: str) -> dict:
  """CPU time of a batch of 64 in one thread, from the store's bytes to stacked arrays."""
  data = DataConfig(source='prepared', path=path, conversation='vicuna_v1', text_length=1472, buckets=(256, 512, 1024))
  files = read_files(TOKENIZER.value)
  training = training_data(data, VISION.num_patches, files, batch_size=BATCH, seed=0)
  layout = LayOut(data, VISION, files, VISION.num_patches)
  names = ('read and decode', 'tokenize', 'pad, resize and lay out')
  parts: dict[str, list[float]] = {name: [] for name in names}
  rows = []
  for position in range(BATCH + 1):  # the first one is warm-up
    index, text_length = training.order(position)
    clock = [time.process_time()]
    sample = training.source[index]
    clock.append(time.process_time())
    encode_turns(sample.id, sample.conversations, True, style=template('vicuna_v1'), tokenizer=layout.tokenizer)
    clock.append(time.process_time())
    row = layout(sample, position, text_length)
    clock.append(time.process_time())
    if position:
      rows.append(row)
      read, text, whole = (1e3 * (b - a) for a, b in itertools.pairwise(clock))
      for name, value in zip(names, (read, text, whole - text)):  # a row tokenizes too
        parts[name].append(value)
  start = time.process_time()
  batch = stack(rows)
  stacking = time.process_time() - start
  medians = [statistics.median(values) for values in parts.values()]
  return {
    'positions': batch.tokens.shape[1],
    'milliseconds_per_row': {name: spread(values) for name, values in parts.items()},
    'milliseconds_to_stack': round(1e3 * stacking, 1),
    'cpu_seconds_per_batch': round(BATCH * sum(medians) / 1e3 + stacking, 3),
  }


def main(_) -> None:
  """Measures and writes `data.json`."""
  files = jpegs(PICTURES.value)
  with tempfile.TemporaryDirectory() as folder:
    result = {
      'date': datetime.date.today().isoformat(),
      'hardware': f'{os.cpu_count()} CPU cores ({platform.machine()})',
      'load_average': [round(x, 1) for x in os.getloadavg()],
      'jpeg_kilobytes': round(sum(map(len, files)) / len(files) / 1024, 1),
      'images_per_second_and_core': images_per_second(files, ROUNDS.value),
      'batch_of_64': batch_cost(prepared(pathlib.Path(folder), files)),
    }
  print(json.dumps(result, indent=1))
  out = pathlib.Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  (out / 'data.json').write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
  app.run(main)
