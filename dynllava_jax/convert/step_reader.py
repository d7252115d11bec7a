"""Reading a stored step slot by slot, for an export tensor by tensor."""

import dataclasses
import pathlib
import threading
from collections.abc import Callable

import numpy as np
import tensorstore as ts

from dynllava_jax.convert.plan import Path
from dynllava_jax.convert.shards import spec_bytes
from dynllava_jax.stored import Step


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
    self.step = Step(step_dir)
    self.lock = threading.Lock()
    self.held: tuple[Path, np.ndarray] | None = None

  def array(self, path: Path) -> ts.TensorStore:
    """The stored parameter."""
    return self.step.array('.'.join(path))

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
