"""A run's real step, compiled ahead of time for a machine that is not there, and what its compiler says of it.

Nothing is allocated and nothing runs. TPUs need the package libtpu, whose compiler runs on any Linux machine.
"""

import dataclasses
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from dynllava_jax import methods, sharding
from dynllava_jax.config import ConfigError, TrainConfig
from dynllava_jax.data.batches import Batch
from dynllava_jax.models.matrices import MATRICES, SCALES
from dynllava_jax.training.hlo import Collective, Module
from dynllava_jax.training.machines import Machine
from dynllava_jax.training.step import State, cut_abstract, make_optimizer, make_train_step, new_watch, split_frozen

DUMPED = '*after_codegen.txt'
TOO_LARGE = re.compile(r'Used ([\d.]+)([GM]) of ([\d.]+)([GM]) hbm')


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a program, per device.

  Attributes:
    arguments, results, aliased, temporaries: bytes; results that take the place of arguments are `aliased`.
    seconds: its estimate of the time, without collectives; None where it gives none, as on CPUs.
    collectives: by kind.
    compile_seconds: how long it took.
  """

  arguments: int
  results: int
  aliased: int
  temporaries: int
  seconds: float | None
  collectives: tuple[Collective, ...]
  compile_seconds: float

  @property
  def held(self) -> int:
    """Bytes that the program holds at most."""
    return self.arguments + self.results - self.aliased + self.temporaries


class TooLargeError(ConfigError):
  """The compiler says that a program does not fit; `need` and `have` in bytes."""

  def __init__(self, need: float, have: float):
    super().__init__(f'the compiler says that it needs {need / 2**30:.2f} GiB per device of {have / 2**30:.2f} GiB')
    self.need, self.have = need, have


def devices(machine: Machine, slices: int = 1) -> list[Any]:
  """Devices to compile for; `machines.pretend` was called before jax started.

  Raises:
    ConfigError: no compiler for this machine is here.
  """
  if machine.family == 'cpu':
    return jax.devices()
  if not machine.is_tpu:
    raise ConfigError(f'--compile_for: {machine.name}: GPUs are compiled for where they are; use --plan --machine={machine.name}')
  # Of a v4 chip's two cores jax makes one device.
  more = ({'chip_config_name': 'megacore'} if machine.family == 'v4' else {}) | ({'num_slices': slices} if slices > 1 else {})
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=machine.name, **more).devices
  except Exception as e:  # of any kind: the library's word on names that it does not know
    first = str(e).splitlines()[0]
    missing = '; pip install libtpu' if 'libtpu' in first or 'plugin' in first else ''
    raise ConfigError(f'--compile_for: {machine.name}: the TPU compiler refuses it ({first[:200]}){missing}') from None


def abstract_state(cfg: TrainConfig) -> tuple[State, dict[str, Any]]:
  """(state, frozen groups) of a run as shapes.

  What is frozen is taken to be bfloat16, as converted checkpoints are, the decoder of a LoRA run what `lora.base` says.
  """
  optimizer = make_optimizer(cfg.optimizer, cfg.steps)
  trained, kept = (sharding.unboxed(t) for t in split_frozen(cut_abstract(cfg), cfg.held, cfg.only))
  trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, cfg.param_dtype), trained)
  kept = jax.tree_util.tree_map_with_path(lambda path, x: jax.ShapeDtypeStruct(x.shape, _held_dtype(path, cfg)), kept)
  watch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), new_watch(cfg))
  return State(jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(optimizer.init, trained), watch), kept


def _held_dtype(path: tuple, cfg: TrainConfig) -> Any:
  names = [k.key for k in path]
  if names[0] == SCALES:
    return jnp.float32
  if not cfg.lora or names[0] != 'llama':
    return jnp.bfloat16
  if cfg.lora.base == 'int8':
    return jnp.int8 if names[-1] in MATRICES else jnp.bfloat16
  return jnp.dtype(cfg.lora.base)


def abstract_batch(cfg: TrainConfig, text_length: int, place: Any) -> Batch:
  """Shapes of a batch of the bucket `text_length`."""
  size, image = positions(cfg, text_length), cfg.model.vision.image_size
  shape = lambda dims, dtype: jax.ShapeDtypeStruct((cfg.batch_size, *dims), dtype, sharding=place)
  per_row, per_token = shape((), jnp.int32), shape((size,), jnp.int32)
  return Batch(
    pixels=shape((image, image, 3), jnp.uint8),
    tokens=per_token,
    labels=per_token,
    length=per_row,
    image_start=per_row,
    answer_start=per_row,
    seed=shape((), jnp.uint32),
    instruct_start=per_row,
  )


def positions(cfg: TrainConfig, text_length: int) -> int:
  """Positions of a row of this bucket, image included."""
  return text_length + methods.num_image_tokens(cfg.model, cfg.reducer)


def compile_step(cfg: TrainConfig, mesh: Mesh, clock: float = 0, text_length: int | None = None) -> Compiled:
  """Compiles the step of the largest text bucket, or of another.

  Args:
    cfg: the run.
    mesh: over the devices to compile for.
    clock: of theirs, in Hz; 0 if the compiler counts no cycles.
    text_length: a bucket.

  Raises:
    TooLargeError: it does not fit.
    ConfigError: the mesh and the batch do not fit together.
  """
  sharding.check_batch(cfg.batch_size, mesh, cfg.accumulate)
  state, kept = abstract_state(cfg)
  with sharding.on_mesh(mesh):
    step = make_train_step(cfg, make_optimizer(cfg.optimizer, cfg.steps), mesh)
    batch = abstract_batch(cfg, text_length or cfg.data.text_length, sharding.batch_sharding(mesh))
    return compile_program(step.lower(state, kept, batch), clock)


def compile_program(lowered: jax.stages.Lowered, clock: float = 0) -> Compiled:
  """Compiles any lowered program; errors as for `compile_step`."""
  start = time.monotonic()
  with tempfile.TemporaryDirectory(prefix='compiled_') as folder:
    # The text of some TPU programs cannot be had from the executable, and a cached program writes none.
    options = {'xla_dump_to': folder, 'xla_dump_hlo_as_text': True} if clock else {}
    try:
      compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as e:
      if not (found := TOO_LARGE.search(str(e))):
        raise
      unit = {'G': 2**30, 'M': 2**20}
      raise TooLargeError(float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]) from None
    took = time.monotonic() - start
    module = Module(_largest(pathlib.Path(folder)) if clock else compiled.as_text())
  found = compiled.memory_analysis()
  sizes = (
    found.argument_size_in_bytes,
    found.output_size_in_bytes,
    found.alias_size_in_bytes,
    found.temp_size_in_bytes,
  )
  return Compiled(*sizes, module.seconds(clock) if clock else None, tuple(module.collectives()), took)


def _largest(folder: pathlib.Path) -> str:
  return max(folder.glob(DUMPED), key=lambda f: f.stat().st_size).read_text()
