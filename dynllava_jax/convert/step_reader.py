"""Reading a stored step slot by slot, for an export tensor by tensor."""

import dataclasses
import functools
import json
import pathlib
import threading
from collections.abc import Callable

import numpy as np
import tensorstore as ts

from dynllava_jax.convert.plan import Path
from dynllava_jax.convert.shards import spec_bytes
from dynllava_jax.convert.writer import PARAMS


@dataclasses.dataclass(frozen=True)
class Out:
  """One tensor of an export: folder below the destination, name, what gives its numbers, and its file without `.safetensors`."""

  folder: str
  key: str
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]
  file: str = 'model'

  @property
  def nbytes(self) -> int:
    return spec_bytes((self.key, self.shape, self.dtype))


class StepReader:
  """Parameters of one step, slot by slot. What Orbax stored in one piece is read in one piece, one parameter at a time."""

  def __init__(self, step_dir: pathlib.Path):
    self.folder = step_dir / PARAMS
    self.metadata = json.loads((self.folder / '_METADATA').read_text())
    self.lock = threading.Lock()
    self.held: tuple[Path, np.ndarray] | None = None

  @functools.cache  # noqa: B019 a reader lives as long as an export
  def array(self, path: Path) -> ts.TensorStore:
    """The stored parameter."""
    name = '.'.join(path)
    if self.metadata['use_ocdbt']:
      store = {'driver': 'ocdbt', 'base': {'driver': 'file', 'path': f'{self.folder}/'}, 'path': name}
    else:
      store = {'driver': 'file', 'path': str(self.folder / name)}
    return ts.open({'driver': 'zarr3' if self.metadata['use_zarr3'] else 'zarr', 'kvstore': store}, open=True, read=True).result()

  def slot(self, path: Path, index: tuple[int, ...]) -> np.ndarray:
    """One slot, or the whole parameter if it has no slots."""
    array = self.array(path)
    if not index or array.chunk_layout.read_chunk.shape[0] == 1:
      return np.asarray(array[index].read().result())
    with self.lock:
      if self.held is None or self.held[0] != path:
        self.held = None  # the old one goes before the new one comes
        self.held = path, np.asarray(array.read().result())
      return self.held[1][index].copy()  # a view would hold all of it
