"""Writing a checkpoint step slot by slot, so that no more than a few tensors are ever in memory.

Orbax writes whole parameters; for a 13B model one stacked parameter alone is 6 GB. So Orbax writes the structure with a
stand-in of one number per parameter, in zarr's plainest form: version 2, not compressed, no filters. There an array is
a `.zarray` file that gives the shape of array and chunks, and one file per chunk that is its bytes and nothing else
(https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html). The stand-ins get the real shape, chunks of one
slot, and their files. The checksum of a slot in memory is then that of its file.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from dynllava_jax.convert.plan import Leaf, Path
from dynllava_jax.files import is_array, write_array

PARAMS = 'params'


class StepWriter:
  """Writes the parameters of one step."""

  def __init__(self, step_dir: pathlib.Path, leaves: dict[Path, tuple[Leaf, np.dtype]]):
    self.step_dir, self.leaves = step_dir, leaves
    _write_structure(step_dir, leaves)
    for path, (leaf, _) in leaves.items():
      self._reshape(path, leaf)

  def _folder(self, path: Path) -> pathlib.Path:
    return self.step_dir / PARAMS / '.'.join(path)

  def _reshape(self, path: Path, leaf: Leaf) -> None:
    file = self._folder(path) / '.zarray'
    metadata = json.loads(file.read_text())
    assert metadata['compressor'] is None and metadata['filters'] is None and metadata['order'] == 'C', metadata
    file.write_text(json.dumps(metadata | {'shape': leaf.shape, 'chunks': (1,) * leaf.slot_axes + leaf.slot_shape}))
    (self._folder(path) / '0').unlink()

  def write(self, path: Path, index: tuple[int, ...], value: np.ndarray) -> None:
    """Puts one slot on disk, in a new file; returns when it is there."""
    file = self.step_dir / self.file(path, index)
    file.touch(exist_ok=False)
    write_array(file, value)

  def holds(self, path: Path, index: tuple[int, ...], value: np.ndarray) -> bool:
    """Whether a slot, read again from the disk, is this to the last bit."""
    return is_array(self.step_dir / self.file(path, index), value)

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
  logging.set_verbosity(logging.FATAL)  # Orbax warns of what was just chosen, and what fails is raised as well
  try:
    with context:
      ocp.save_checkpointables(step_dir, {PARAMS: tree})
  finally:
    logging.set_verbosity(verbosity)
