"""Memory and time of loading a checkpoint: what is live and resident at most, over the size of the parameters.

    python benchmarks/loading.py --checkpoint=checkpoints/llava-7b
    python benchmarks/loading.py --layers=12 --width=768       # of random numbers, as training writes it

Prints JSON: bytes of the parameters; live arrays and resident memory at most while they were loaded, whole or cut for a dense or a
dynamic run, and before (the interpreter and its libraries); seconds. Each figure is that of a process of its own.
"""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time

import checkout  # noqa: F401
import jax
import numpy as np
from absl import app, flags, logging

from dynllava_jax import checkpoint, presets, sharding
from dynllava_jax.config import DENSE, Stage
from dynllava_jax.models.params import abstract_params
from dynllava_jax.training.saving import Saver

CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Checkpoint to load; one of random numbers if it is not given.')
LAYERS = flags.DEFINE_integer('layers', 12, 'Decoder layers of the random one.')
WIDTH = flags.DEFINE_integer('width', 768, 'Width of the random one, a multiple of 64.')
ONE = flags.DEFINE_string('one', None, 'dense, dynamic, or whole (checkpoint form): measure this, in this process.')
STAGES = {'whole': None, 'dense': DENSE, 'dynamic': (Stage(), Stage(start=1, selector='dynamic', image_keep_rate=0.2))}


def resident_at_most() -> int:
  """Bytes of this process (Linux; what `getrusage` tells includes the process that started it)."""
  return 1024 * int(re.search(r'VmHWM:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])


def measure(path: str, stages: tuple[Stage, ...] | None) -> dict[str, float]:
  """Loads once; a thread looks at the live arrays meanwhile."""
  checkpoint.read_info(path)
  jax.devices()
  before = resident_at_most()
  most, done = [0], threading.Event()

  def watch():
    while not done.is_set():
      most[0] = max(most[0], sum(x.nbytes for x in jax.live_arrays()))
      time.sleep(0.002)

  watcher = threading.Thread(target=watch)
  watcher.start()
  start = time.perf_counter()
  params = jax.block_until_ready(checkpoint.load_params(path, stages=stages))
  seconds = time.perf_counter() - start
  done.set()
  watcher.join()
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  peak = resident_at_most()
  return {
    'bytes': size,
    'live_at_most_over_size': round(max(most[0], size) / size, 3),
    'resident_at_most_over_size': round((peak - before) / size, 3),
    'resident_before': before,
    'seconds': round(seconds, 2),
  }


def random_checkpoint(directory: pathlib.Path) -> None:
  """A model of the given size, as training saves it."""
  heads = WIDTH.value // 64
  decoder = dataclasses.replace(
    presets.TINY.llama,
    hidden_size=WIDTH.value,
    num_layers=LAYERS.value,
    num_heads=heads,
    num_kv_heads=heads,
    mlp_dim=WIDTH.value * 8 // 3,
    vocab_size=32000,
  )
  model = dataclasses.replace(presets.TINY, llama=decoder)
  rng = np.random.default_rng(0)
  shapes = sharding.unboxed(abstract_params(model))
  params = jax.tree.map(lambda x: jax.device_put(rng.standard_normal(x.shape, np.float32)), shapes)
  checkpoint.write_info(directory, checkpoint.CheckpointInfo(model=model))
  with Saver(directory) as saver:
    saver.save(1, {'params': params})


def main(_) -> None:
  """Measures one way, or starts a process for each."""
  logging.set_verbosity(logging.WARNING)
  if ONE.value:
    print(json.dumps(measure(CHECKPOINT.value, STAGES[ONE.value])))
    return
  with tempfile.TemporaryDirectory() as folder:
    path = CHECKPOINT.value or f'{folder}/checkpoint'
    if not CHECKPOINT.value:
      random_checkpoint(pathlib.Path(path))
    for name in STAGES:
      command = [sys.executable, __file__, f'--checkpoint={path}', f'--one={name}']
      print(name, subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


if __name__ == '__main__':
  app.run(main)
