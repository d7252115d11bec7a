"""Writing a checkpoint step slot by slot, so that no more than a few tensors are ever in memory.

Orbax writes whole parameters; for a 13B model one stacked parameter alone is 6 GB. So Orbax writes the structure with a
stand-in of one number per parameter, and TensorStore, which Orbax itself writes with, then puts the real array in
its place: zarr, not compressed, one chunk file per slot. A chunk file is the slot's bytes and nothing else, so the
checksum of the slot in memory is that of its file.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from absl import logging
from orbax.checkpoint import v1 as ocp

from dynllava_jax.convert.plan import Leaf, Path
from dynllava_jax.convert.readers import ConversionError

PARAMS = 'params'


class StepWriter:
  """Writes the parameters of one step."""

  def __init__(self, step_dir: pathlib.Path, leaves: dict[Path, tuple[Leaf, np.dtype]]):
    self.step_dir, self.leaves = step_dir, leaves
    _write_structure(step_dir, leaves)
    context = ts.Context({'file_io_sync': False})
    self.arrays = {path: self._open(path, *leaf, context) for path, leaf in leaves.items()}

  def _folder(self, path: Path) -> pathlib.Path:
    return self.step_dir / PARAMS / '.'.join(path)

  def _open(self, path: Path, leaf: Leaf, dtype: np.dtype, context: ts.Context) -> ts.TensorStore:
    folder = self._folder(path)
    metadata = json.loads((folder / '.zarray').read_text())
    assert metadata['compressor'] is None and metadata['filters'] is None and metadata['order'] == 'C', metadata
    metadata |= {'shape': leaf.shape, 'chunks': (1,) * leaf.slot_axes + leaf.slot_shape}
    spec = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': str(folder)}, 'metadata': metadata}
    return ts.open(spec, context=context, create=True, delete_existing=True).result()

  def write(self, path: Path, index: tuple[int, ...], value: np.ndarray) -> None:
    """Puts one slot on disk."""
    try:
      self.put(path, index, value)
    except ValueError as e:  # TensorStore's word for every failure
      raise ConversionError(f'{self.step_dir / self.file(path, index)}: cannot be written ({str(e).splitlines()[0]})') from None

  def put(self, path: Path, index: tuple[int, ...], value: np.ndarray) -> None:
    """`write` with TensorStore's own errors."""
    self.arrays[path][index].write(value).result()

  def file(self, path: Path, index: tuple[int, ...]) -> str:
    """The slot's file, below the step directory."""
    leaf, _ = self.leaves[path]
    chunk = '.'.join(map(str, index + (0,) * len(leaf.slot_shape))) or '0'
    return (self._folder(path) / chunk).relative_to(self.step_dir).as_posix()


def _write_structure(step_dir: pathlib.Path, leaves: dict[Path, tuple[Leaf, np.dtype]]) -> None:
  tree: dict = {}
  for path, (_, dtype) in leaves.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = jnp.zeros(1, dtype)
  context = ocp.Context()
  saving = context.array.saving
  saving.use_ocdbt = saving.use_zarr3 = saving.use_compression = saving.enable_write_sharding_file = False
  saving.array_metadata_store = None  # it would hold the stand-ins' shapes
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # Orbax warns of what was just chosen
  try:
    with context:
      ocp.save_checkpointables(step_dir, {PARAMS: tree})
  finally:
    logging.set_verbosity(verbosity)
