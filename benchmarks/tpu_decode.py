"""What int8 and sparsification save in decoding on one TPU chip, by the TPU compiler: bytes of a token, and the largest batch.

    pip install libtpu==0.0.51
    python benchmarks/tpu_decode.py             # all, a minute or so for each of 30 programs
    python benchmarks/tpu_decode.py v5e_dense   # one row

LLaVA-1.5-7B in bfloat16, 640 prompt positions and room for 256 tokens. Bytes are those that one token reads and writes at batch 1:
cost analysis counts the layers of a stage once, so a layer's are the difference of two stages and one. The largest batch is that
whose decoding loop the compiler fits into the chip, while it refuses one row more. Nothing is run. Results go to
benchmarks/results/tpu_decode.json.
"""

# ruff: noqa: E402
import datetime
import functools
import importlib.metadata
import json
import pathlib
import sys

import checkout  # noqa: F401

from dynllava_jax.training import machines

machines.pretend(machines.read('v5e:1x1', 'benchmarks'))  # before jax

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from dynllava_jax import presets, sharding
from dynllava_jax.checkpoint import write_atomically
from dynllava_jax.config import DENSE, QUANTIZATIONS, Stage, TrainConfig
from dynllava_jax.display import Terminal
from dynllava_jax.generate import Generator
from dynllava_jax.models.dynllava import Prompt
from dynllava_jax.models.matrices import SCALES, smaller
from dynllava_jax.models.params import abstract_params, cut_params
from dynllava_jax.training import ahead

RESULTS = pathlib.Path(__file__).parent / 'results' / 'tpu_decode.json'
MODEL, TEXT, NEW = presets.DYNAMIC_LLAVA_7B, 64, 256
DYNAMIC = (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.2, text_keep_budget=0.5))
RUNS = (('dense', DENSE, ''), ('dynamic', DYNAMIC, ''), ('dense_int8', DENSE, 'int8'), ('dynamic_int8', DYNAMIC, 'int8'))
ROWS = {f'{chip}_{name}': (f'{chip}:1x1', stages, form) for chip in ('v5e', 'v6e') for name, stages, form in RUNS}


class Run:
  """One way to run the model on one chip, in shapes."""

  def __init__(self, chip: str, stages: tuple[Stage, ...], quantization: str):
    self.machine, self.stages = machines.read(chip, 'chip'), stages
    self.place = SingleDeviceSharding(ahead.devices(self.machine)[0])
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), sharding.unboxed(abstract_params(MODEL)))
    if 'weights' in QUANTIZATIONS[quantization]:
      half |= jax.eval_shape(lambda llama: dict(zip(('llama', SCALES), smaller(llama))), half['llama'])
    self.params = self._here(jax.eval_shape(lambda p: cut_params(p, stages), half))
    options = dict(eos_id=2, dtype=jnp.bfloat16, int8_cache='cache' in QUANTIZATIONS[quantization])
    self.generator = Generator(MODEL, stages, self.params, max_new_tokens=NEW, **options)

  def _here(self, tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.place), tree)

  def _turn(self, rows: int):
    b = ahead.abstract_batch(TrainConfig(model=MODEL, batch_size=rows), TEXT, self.place)
    prompt = Prompt(b.tokens, b.length, b.image_start, b.seed)
    return b, self._here(jax.eval_shape(self.generator.start_impl, self.params, prompt, b.pixels))

  def decode(self, rows: int) -> ahead.Compiled:
    """The decoding loop; ahead.TooLargeError if it does not fit."""
    b, (turn, kept) = self._turn(rows)
    lowered = self.generator._decode.lower(self.params, turn.logits, cache=turn.cache, seed=b.seed, kept_image=kept)
    return ahead.compile_program(lowered, self.machine.chip.clock)

  def step_bytes(self) -> float:
    """Of one token of one row, layers counted once per stage."""
    _, (turn, _) = self._turn(1)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32, sharding=self.place)
    count = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=self.place)
    lowered = self.generator._extend.lower(self.params, token, count, cache=turn.cache, judge=True)
    return lowered.compile().cost_analysis()['bytes accessed']


@functools.cache
def dense_bytes(chip: str, quantization: str) -> float:
  """Of a token of one row, dense: what is outside the layers, and 32 times a layer."""
  one, two = (Run(chip, stages, quantization).step_bytes() for stages in (DENSE, (Stage(), Stage(start=16))))
  return one + (MODEL.llama.num_layers - 1) * (two - one)


def largest_batch(run: Run) -> tuple[int, ahead.Compiled]:
  """(the largest batch that fits, what the compiler says of it): from what weights and caches take, then row by row."""
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  weights, row = size(run.params), size(run._turn(1)[1])
  rows, best = max(1, int((run.machine.chip.memory - weights) / row)), None
  while best is None:
    try:
      best = run.decode(rows)
    except ahead.TooLargeError as e:
      rows -= max(1, int((e.need - e.have) / row))
      if rows < 1:
        raise
  while True:
    try:
      best = run.decode(rows + 1)
    except ahead.TooLargeError:
      return rows, best
    rows += 1


def main(names: list[str]) -> None:
  """Compiles the named rows, all of them by default."""
  unknown = set(names) - set(ROWS)
  if unknown:
    sys.exit(f'error: no row {", ".join(sorted(unknown))}; expected {", ".join(ROWS)}')
  for name in names or ROWS:
    chip, stages, quantization = ROWS[name]
    rows, compiled = largest_batch(Run(chip, stages, quantization))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = {
      'largest_batch': rows,
      'gib': round(compiled.held / machines.GIB, 2),
      'chip_gib': machines.read(chip, 'chip').chip.memory / machines.GIB,
      'estimated_ms_per_token': round(1e3 * compiled.seconds, 2),
      'date': str(datetime.date.today()),
      'jax': jax.__version__,
      'libtpu': importlib.metadata.version('libtpu'),
    }
    if stages == DENSE:
      results[name]['bytes_per_token_at_batch_1'] = dense_bytes(chip, quantization)
    write_atomically(RESULTS, (json.dumps(results, indent=1) + '\n').encode())
    Terminal().print(f'{name}: {json.dumps(results[name])}')


if __name__ == '__main__':
  main(sys.argv[1:])
