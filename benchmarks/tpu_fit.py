"""Do the real models compile for TPU pods, and do they fit? Asked of the TPU compiler itself; no TPU is needed.

    pip install libtpu==0.0.51
    python benchmarks/tpu_fit.py                 # all programs, a few minutes each on two cores
    python benchmarks/tpu_fit.py train_7b_v5p    # one

Compiles ahead of time for a described topology and prints, per device, what the program holds at most (arguments, results and
temporaries, donated buffers once) next to the memory of the chip, and the compiler's estimate of the time one run takes, without
collectives. Nothing is timed: the compiler does not run anything.
Results go to benchmarks/results/tpu_fit.json.
"""

import os
import tempfile

# Before jax: this process compiles for TPUs and runs on the CPU. Compiled modules are read from files, as `as_text` of some fails.
os.environ |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
os.environ['DYNLLAVA_JAX_COMPILATION_CACHE'] = 'off'  # what is read is what the compiler writes while it compiles
os.environ |= {'DUMP': tempfile.mkdtemp(prefix='tpu_fit_')}
os.environ |= {'XLA_FLAGS': f'--xla_dump_to={os.environ["DUMP"]} --xla_dump_hlo_as_text'}

import collections
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import re
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
from rich.console import Console

from dynllava_jax import methods, presets, sharding
from dynllava_jax.checkpoint import write_atomically
from dynllava_jax.config import DENSE, LoraConfig, ModelConfig, OptimizerConfig, Stage, TrainConfig
from dynllava_jax.data.batches import Batch
from dynllava_jax.generate import Generator
from dynllava_jax.models.dynllava import Prompt
from dynllava_jax.models.lora import MATRICES, SCALES
from dynllava_jax.models.params import abstract_params, cut_params
from dynllava_jax.training.step import State, cut_abstract, make_optimizer, make_train_step, split_frozen

RESULTS = pathlib.Path(__file__).parent / 'results' / 'tpu_fit.json'
DYNAMIC = (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.2, text_keep_budget=0.5))
GIB = 2**30
COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\{$')
LOOP = re.compile(r' while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)')
BOUND = re.compile(r' = s32\[\]\S* constant\((\d+)\)')
BELOW_BOUND = re.compile(r'ROOT .* compare\(.*direction=LT')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
CLOCK = {'v5e': 1.5e9, 'v6e': 1.75e9, 'v5p': 1.75e9}  # Hz
HBM = {'v5e': 15.75, 'v6e': 31.24, 'v5p': 95.0}  # GiB per chip that a program may use


def estimated_seconds(hlo: str, clock_hz: float) -> float:
  """The compiler's estimate of a compiled module: cycles of every instruction, those of a `scan` once per iteration.

  Any other loop counts once: of decoding, one token.

  Args:
    hlo: text of the compiled module. Cost analysis counts the body of a loop once, so it is no substitute.
    clock_hz: of the chip.

  Raises:
    ValueError: no instruction has an estimate.
  """
  own, computation = collections.Counter(), ''
  loops, bounds, counts_up = collections.defaultdict(list), collections.defaultdict(list), set()
  for line in hlo.splitlines():
    if head := COMPUTATION.match(line):
      computation = 'ENTRY' if head[1] else head[2]
    elif loop := LOOP.search(line):
      loops[computation].append(loop.groups())
    elif bound := BOUND.search(line):
      bounds[computation].append(int(bound[1]))
    elif BELOW_BOUND.search(line):
      counts_up.add(computation)
    elif cycles := CYCLES.search(line):
      own[computation] += int(cycles[1])

  def trips(condition: str) -> int:
    return bounds[condition][0] if condition in counts_up and len(bounds[condition]) == 1 else 1

  def total(name: str) -> int:
    return own[name] + sum(trips(condition) * total(body) for condition, body in loops[name])

  if not total('ENTRY'):
    raise ValueError('no instruction of the module has an estimate')
  return total('ENTRY') / clock_hz


def compiled_module() -> str:
  """Text of the largest module that was compiled since the last call."""
  files = list(pathlib.Path(os.environ['DUMP']).glob('*after_codegen.txt'))
  text = max(files, key=lambda f: f.stat().st_size).read_text()
  for file in files:
    file.unlink()
  return text


def rows(batch: int, text: int, model: ModelConfig, place) -> Batch:
  """Shapes of a batch of `batch` rows with `text` text positions."""
  size, image = text + methods.num_image_tokens(model), model.vision.image_size
  shape = lambda dims, dtype: jax.ShapeDtypeStruct((batch, *dims), dtype, sharding=place)
  per_row, per_token = shape((), jnp.int32), shape((size,), jnp.int32)
  return Batch(
    pixels=shape((image, image, 3), jnp.uint8),
    tokens=per_token,
    labels=per_token,
    length=per_row,
    image_start=per_row,
    answer_start=per_row,
    seed=shape((), jnp.uint32),
  )


def train(
  topology: str,
  mesh_shape: tuple[int, int, int],
  model: ModelConfig,
  batch: int,
  text: int,
  frozen: tuple[str, ...],
  lora: LoraConfig | None = None,
):
  """The jitted training step of `train.py`, bfloat16 compute, float32 of what is trained, rematerialised."""
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = Mesh(np.array(devices).reshape(mesh_shape), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
  stages = DYNAMIC if model.predictor else DENSE
  cfg = TrainConfig(model=model, stages=stages, batch_size=batch, steps=1000, dtype='bfloat16', remat='block', frozen=frozen)
  if lora:
    cfg = dataclasses.replace(cfg, lora=lora, init_from='base')
  optimizer = make_optimizer(OptimizerConfig(), cfg.steps)
  with sharding.on_mesh(mesh):
    step = make_train_step(cfg, optimizer, mesh)
    trained, kept = (sharding.unboxed(t) for t in split_frozen(cut_abstract(cfg), cfg.held))
    state = State(jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(optimizer.init, trained))
    stored = jax.tree_util.tree_map_with_path(lambda p, x: jax.ShapeDtypeStruct(x.shape, held_dtype(p, lora)), kept)
    return step.lower(state, stored, rows(batch, text, model, sharding.batch_sharding(mesh))).compile()


def held_dtype(path: tuple, lora: LoraConfig | None):
  """What a parameter that is not trained is held as."""
  names = [k.key for k in path]
  if names[0] == SCALES:
    return jnp.float32
  return jnp.int8 if lora and lora.base == 'int8' and names[0] == 'llama' and names[-1] in MATRICES else jnp.bfloat16


def generate(topology: str, model: ModelConfig, stages: tuple[Stage, ...], batch: int, text: int, new: int, part: str):
  """Prefill, or the decoding loop, of `Generator` on one chip, everything in bfloat16."""
  place = SingleDeviceSharding(topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[0])
  on_chip = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
  half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), sharding.unboxed(abstract_params(model)))
  # Without parameters: shapes cannot be cut outside eval_shape, so the stage list comes after.
  generator = Generator(model, DENSE, {'llama': {'layers': {}}}, max_new_tokens=new, eos_id=2, dtype=jnp.bfloat16)
  generator.model = dataclasses.replace(generator.model, stages=stages)
  params = on_chip(jax.eval_shape(lambda p: cut_params(p, stages), half))
  b = rows(batch, text, model, place)
  prompt = Prompt(b.tokens, b.length, b.image_start, b.seed)
  if part == 'prefill':
    return generator._prefill.lower(params, prompt, b.pixels).compile()
  turn, kept = on_chip(jax.eval_shape(generator._prefill, params, prompt, b.pixels))
  return generator._decode.lower(params, turn.logits, cache=turn.cache, seed=b.seed, kept_image=kept).compile()


FROZEN = ('vision', 'projector')
PROGRAMS = {
  # 2,048 positions are LLaVA's limit; the paper's global batch is 64.
  'train_7b_v5p': lambda: train('v5p:4x4x4', (4, 16, 1), presets.DYNAMIC_LLAVA_7B, 64, 1472, FROZEN),
  'train_13b_v5p': lambda: train('v5p:4x4x4', (4, 16, 1), presets.DYNAMIC_LLAVA_13B, 64, 1472, FROZEN),
  'train_7b_v5e': lambda: train('v5e:16x16', (1, 64, 4), presets.DYNAMIC_LLAVA_7B, 64, 1472, FROZEN),
  'lora_7b_v5p': lambda: train('v5p:1x1x1', (1, 1, 1), presets.LLAVA_1_5_7B, 1, 1472, ('vision',), LoraConfig()),
  'lora_int8_7b_v5p': lambda: train('v5p:1x1x1', (1, 1, 1), presets.LLAVA_1_5_7B, 1, 1472, ('vision',), LoraConfig(base='int8')),
  'lora_dynamic_7b_v5p': lambda: train('v5p:1x1x1', (1, 1, 1), presets.DYNAMIC_LLAVA_7B, 1, 1472, FROZEN, LoraConfig()),
  'finetune_7b_v5p': lambda: train('v5p:4x4x4', (4, 16, 1), presets.LLAVA_1_5_7B, 128, 1472, ('vision',)),
}
for name, stages in (('dense', DENSE), ('dynamic', DYNAMIC)):
  for part in ('prefill', 'decode'):
    PROGRAMS[f'{part}_7b_v5p_{name}'] = lambda stages=stages, part=part: generate(
      'v5p:1x1x1', presets.DYNAMIC_LLAVA_7B, stages, 16, 64, 256, part
    )


def main(names: list[str]) -> None:
  """Compiles the named programs, all of them by default."""
  console = Console()
  unknown = set(names) - set(PROGRAMS)
  if unknown:
    sys.exit(f'error: no program {", ".join(sorted(unknown))}; expected {", ".join(PROGRAMS)}')
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  for name in names or PROGRAMS:
    start = time.monotonic()
    program = PROGRAMS[name]()
    stats = program.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    chip = next(c for c in HBM if c in name)
    room = HBM[chip]
    seconds = estimated_seconds(compiled_module(), CLOCK[chip])
    results[name] = {
      'gib_per_device': round(held / GIB, 2),
      'arguments_gib': round(stats.argument_size_in_bytes / GIB, 2),
      'temporaries_gib': round(stats.temp_size_in_bytes / GIB, 2),
      'chip_gib': room,
      'estimated_ms': round(1e3 * seconds, 1),
      'date': str(datetime.date.today()),
      'jax': jax.__version__,
      'libtpu': importlib.metadata.version('libtpu'),
    }
    write_atomically(RESULTS, (json.dumps(results, indent=1) + '\n').encode())
    line = f'{name}: compiled in {time.monotonic() - start:.0f} s; {held / GIB:.2f} GiB per device of {room} GiB'
    console.print(f'{line}, {1e3 * seconds:.0f} ms estimated')


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  finally:
    shutil.rmtree(os.environ['DUMP'])
