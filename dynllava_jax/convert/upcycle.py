"""A dense checkpoint of ours made one with experts (upcycling, arXiv 2212.05055): each is a copy of the MLP that it replaces.

Routers are random, and whatever they say the model answers as before: the weights of a token's experts add up to 1.
"""

import dataclasses
import os
import pathlib

import jax
import numpy as np

from dynllava_jax import checkpoint
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import ConfigError, ExpertsConfig
from dynllava_jax.convert.convert import with_progress
from dynllava_jax.convert.destination import STEP, check_destination, new_directory
from dynllava_jax.convert.inputs import ConversionError
from dynllava_jax.convert.plan import Leaf, Path, leaf_shapes
from dynllava_jax.convert.step_reader import StepReader
from dynllava_jax.convert.writer import StepWriter
from dynllava_jax.models.experts import router_init

TOP_K = 2


def upcycle(src: pathlib.Path, dst: pathlib.Path, count: int, *, seed: int = 0, overwrite: bool = False) -> CheckpointInfo:
  """Writes a checkpoint with `count` experts in every other layer, from the first one on; every token passes two of them.

  Args:
    src: checkpoint directory or step of ours; dst: directory to write.
    count: of experts; seed: of the routers.
    overwrite: replace what is at `dst`, once the new checkpoint is whole.

  Raises:
    ConversionError: experts are there already, or only adapters; `dst` cannot be written.
    CheckpointError: `src` is missing or damaged.
  """
  dst = pathlib.Path(os.path.realpath(dst))
  folder, step = checkpoint.locate(src)
  check_destination(dst, overwrite, folder)
  info = checkpoint.read_info(src)
  if info.lora is not None:
    raise ConversionError(f'{src}: holds adapters alone; merge them first (--export=llava, and convert what that writes)')
  if info.model.llama.experts is not None:
    raise ConversionError(f'{src}: has experts in layers {list(info.model.llama.experts.layers)} already; upcycle a dense model')
  try:
    chosen = ExpertsConfig(layers=tuple(range(0, info.model.llama.num_layers, 2)), count=count, top_k=TOP_K)
  except ConfigError as e:
    raise ConversionError(f'--upcycle={count}: {e}') from None
  llama = dataclasses.replace(info.model.llama, experts=chosen)
  wide = dataclasses.replace(info, model=dataclasses.replace(info.model, llama=llama))
  checkpoint.check_integrity(folder / str(step), 'params')
  reader, leaves = (
    StepReader(folder / str(step)),
    {path: Leaf(shape, _slot_axes(path)) for path, shape in leaf_shapes(wide).items()},
  )
  dtype = lambda path: np.dtype(reader.array(_source(path, ())[0]).dtype.numpy_dtype)
  parts = [(path, index) for path, leaf in leaves.items() for index in leaf.slots]
  sizes = [int(np.prod(leaves[path].slot_shape)) * dtype(path).itemsize for path, _ in parts]
  with new_directory(dst, sum(sizes)) as partial:
    writer = StepWriter(partial / str(STEP), {path: (leaf, dtype(path)) for path, leaf in leaves.items()})

    def write(part: tuple[Path, tuple[int, ...]]) -> None:
      path, index = part
      if path[-1] == 'router':
        key = jax.random.fold_in(jax.random.key(seed), _first_layer(path) + index[0])
        value = np.asarray(router_init(key, leaves[path].slot_shape)).astype(dtype(path))
      else:
        value = reader.slot(*_source(path, index))
      value = np.ascontiguousarray(value)
      writer.write(path, index, value)
      if not writer.holds(path, index, value):
        raise ConversionError(f'{partial / writer.file(path, index)}: read back, it is not what was written; is the disk failing?')

    with_progress('upcycling', write, parts, sizes)
    checkpoint.seal(partial / str(STEP))
    checkpoint.write_info(partial, wide, checkpoint.read_tokenizer(src), checkpoint.read_assets(src))
  return wide


def _slot_axes(path: Path) -> int:
  """Leading axes that number what is written by itself: the layer, the expert."""
  if path[0] != 'llama' or not path[1].startswith('layers'):
    return 0
  return 2 if 'experts' in path else 1


def _first_layer(path: Path) -> int:
  return int(path[1].removeprefix('layers').removeprefix('_') or 0)


def _source(path: Path, index: tuple[int, ...]) -> tuple[Path, tuple[int, ...]]:
  """Where a dense checkpoint has what becomes a slot; of a router the place of another matrix of its layer, for its dtype."""
  if not _slot_axes(path):
    return path, index
  leaf = ('gate',) if path[-1] == 'router' else tuple(name for name in path[2:] if name != 'experts')
  return ('llama', 'layers', *leaf), (_first_layer(path) + index[0],) if index else ()
