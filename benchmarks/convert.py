"""Conversion of a full-size checkpoint: memory and time against a plain copy of its files.

    python benchmarks/convert.py --size=7b --scratch=DIRECTORY

Writes a random LLaVA-1.5 in the layout of llava-hf/llava-1.5-7b-hf (bfloat16, shards of 5 GB), converts it, converts it back with
--export, three times each, and removes everything again. Each conversion follows a plain copy of the same files. Before each
measurement they are dropped from the page cache, after it all is flushed to the disk (`sync`), and both count for copy and
conversion alike. Peak memory is the process's largest resident set. Needs 2.1 times the checkpoint's size of disk space. Results go
to benchmarks/results/convert_SIZE.json.
"""

import collections
import dataclasses
import datetime
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
from absl import app, flags
from checkout import ROOT

from dynllava_jax import presets
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import ModelConfig
from dynllava_jax.convert.export_configs import llava_hf_config, vocabulary
from dynllava_jax.convert.layouts import to_llava_hf
from dynllava_jax.convert.plan import slots_by_key
from dynllava_jax.convert.shards import ShardWriter

SIZES = {'tiny': presets.TINY, '7b': presets.LLAVA_1_5_7B, '13b': presets.LLAVA_1_5_13B}
SIZE = flags.DEFINE_enum('size', '7b', list(SIZES), 'Which LLaVA-1.5.')
SCRATCH = flags.DEFINE_string('scratch', None, 'Directory on the disk to measure.', required=True)
RESULTS = pathlib.Path(__file__).parent / 'results'
BLOCK = 2**25  # numbers
ROUNDS = 3
RESIZED = 64  # rows that transformers adds for <image> and <pad>


def synthesise(directory: pathlib.Path, model: ModelConfig) -> int:
  """Writes a random checkpoint of a model, its vocabulary resized for the image token; returns its bytes."""
  image_token = model.llama.vocab_size
  llama = dataclasses.replace(model.llama, vocab_size=image_token + RESIZED)
  info = CheckpointInfo(model=dataclasses.replace(model, llama=llama, predictor=None), unused_vision_layers=True)
  vocab = vocabulary(info, {'image_token_index': image_token}, {})
  dtype = np.dtype(ml_dtypes.bfloat16)
  rng = np.random.default_rng(0)
  block = (rng.standard_normal(BLOCK, np.float32) * 0.02).astype(dtype)
  slots = slots_by_key(info)
  specs = [(to_llava_hf(k), rule.transform.torch_shape(leaf.slot_shape), dtype) for k, (rule, _, leaf) in slots.items()]
  directory.mkdir(parents=True)
  writer = ShardWriter(directory, specs)
  for key, shape, _ in specs:
    size = int(np.prod(shape))
    start = int(rng.integers(BLOCK))
    value = np.concatenate([block[start:], np.resize(block, max(0, size - BLOCK + start))])[:size]
    writer.write(key, value.reshape(shape))
  (directory / 'config.json').write_text(json.dumps(llava_hf_config(info, {}, 'bfloat16', vocab)))
  return sum(f.stat().st_size for f in set(writer.files.values()))


def forget(directory: pathlib.Path) -> None:
  """Drops a directory's files from the page cache, so that they are read from the disk again."""
  os.sync()
  for path in directory.rglob('*'):
    if path.is_file():
      with path.open('rb') as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(source: pathlib.Path, run) -> tuple[float, object]:
  """Seconds of `run()` from a cold source until everything is on the disk, and its result."""
  forget(source)
  start = time.monotonic()
  result = run()
  os.sync()
  return time.monotonic() - start, result


def command(*arguments: str) -> tuple[float, float]:
  """Runs convert_weights.py; returns its peak memory in GB and its CPU seconds."""
  process = subprocess.Popen([sys.executable, ROOT / 'convert_weights.py', *arguments], env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  _, status, usage = os.wait4(process.pid, 0)
  if os.waitstatus_to_exitcode(status):
    raise SystemExit('the conversion failed')
  return usage.ru_maxrss * 1024 / 1e9, usage.ru_utime + usage.ru_stime  # Linux counts memory in KiB


def _summary(runs: list[dict[str, float]]) -> dict[str, list[float]]:
  columns = {k: [r[k] for r in runs] for k in runs[0]}
  return {k: [round(f(v), 2) for f in (statistics.median, min, max)] for k, v in columns.items()}


def main(_) -> None:
  """Makes, measures, removes."""
  scratch = pathlib.Path(SCRATCH.value) / f'convert_{SIZE.value}'
  source, ours, back, copy = (scratch / n for n in ('source', 'ours', 'back', 'copy'))
  shutil.rmtree(scratch, ignore_errors=True)
  results = {
    'date': datetime.date.today().isoformat(),
    'model': f'LLaVA-1.5 {SIZE.value}, bfloat16, safetensors',
    'hardware': f'{os.cpu_count()} CPU cores, local disk',
    'load_at_start': os.getloadavg()[0],
  }
  try:
    results['bytes'] = synthesise(source, SIZES[SIZE.value])
    rounds: dict[str, list[dict[str, float]]] = collections.defaultdict(list)

    def measure(name: str, read: pathlib.Path, written: pathlib.Path, *arguments: str) -> None:
      shutil.rmtree(written, ignore_errors=True)
      copy_seconds, _ = timed(read, lambda: shutil.copytree(read, copy))  # beside each: the machine's speed wanders
      shutil.rmtree(copy)
      seconds, (peak, cpu) = timed(read, lambda: command(f'--src={read}', f'--dst={written}', *arguments))
      figures = {
        'ratio': seconds / copy_seconds,
        'seconds': seconds,
        'copy_seconds': copy_seconds,
        'cpu_seconds': cpu,
        'peak_rss_gb': peak,
      }
      rounds[name].append(figures)
      print(name, {k: round(v, 2) for k, v in figures.items()}, flush=True)

    for _ in range(ROUNDS):
      measure('convert', source, ours)
    shutil.rmtree(source)
    for _ in range(ROUNDS):
      measure('export_llava_hf', ours, back, '--export=llava-hf')
    results['rounds'] = ROUNDS
    results['median_min_max'] = {name: _summary(runs) for name, runs in rounds.items()}
    results['load_at_end'] = os.getloadavg()[0]
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / f'convert_{SIZE.value}.json').write_text(json.dumps(results, indent=1) + '\n')
  print(json.dumps(results, indent=1))


if __name__ == '__main__':
  app.run(main)
