"""What every kind of record needs: quantities and their tolerances, reading a case, prompts from recorded token ids."""

import dataclasses
import pathlib
import zipfile
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import IMAGE_ID
from dynllava_jax.convert.inputs import ConversionError, check_file
from dynllava_jax.models.dynllava import Prompt

LOGITS, LOSS, GRADIENT, EXACT = 1e-4, 1e-5, 5e-4, 0.0


@dataclasses.dataclass(frozen=True)
class Quantity:
  """One compared quantity. `error` and `tolerance` are absolute."""

  name: str
  error: float
  tolerance: float

  @property
  def ok(self) -> bool:
    return bool(self.error <= self.tolerance)  # NaN is not

  def __str__(self) -> str:
    return f'{self.name:<74} {self.error:9.2e} {self.tolerance:9.2e}  {"ok" if self.ok else "FAIL"}'


def compare(name: str, ours: Any, recorded: Any, tolerance: float, relative: bool = False) -> Quantity:
  """Largest absolute difference; `relative` scales the tolerance by the largest recorded entry."""
  ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
  if ours.shape != recorded.shape:
    raise ConversionError(f'verify: {name} has shape {ours.shape}, recorded is {recorded.shape}')
  scale = np.abs(recorded).max() if relative and recorded.size else 1.0
  error = np.abs(ours - recorded).max() if recorded.size else 0.0
  return Quantity(name, float(error), tolerance * float(scale))


def load_case(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """All arrays of a case; ConversionError if the file is not one."""
  check_file(pathlib.Path(path))
  try:
    with np.load(path) as f:
      return {k: f[k] for k in f.files}
  except (OSError, MemoryError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as e:
    raise ConversionError(f'{path}: not a readable case file ({e})') from None


def prompt_from_ids(ids: np.ndarray, num_image: int, valid: np.ndarray | None = None, spare: int = 0) -> Prompt:
  """Expands rows of token ids, in which -200 stands for the image, to a `Prompt`.

  Args:
    ids: int[B, L]; valid: bool[B, L], real entries (all if None); spare: unused positions at the end.
  """
  valid = np.ones(ids.shape, bool) if valid is None else valid
  size = ids.shape[1] - 1 + num_image + spare
  if not (ids == IMAGE_ID).any():
    size += 1
  tokens, lengths, starts = np.zeros((len(ids), size), np.int32), [], []
  for i, (row, ok) in enumerate(zip(ids, valid)):
    row = row[ok]
    where = np.flatnonzero(row == IMAGE_ID)
    start = int(where[0]) if len(where) else -1
    full = row if start < 0 else np.concatenate([row[:start], np.zeros(num_image, row.dtype), row[start + 1 :]])
    tokens[i, : len(full)] = full
    lengths.append(len(full))
    starts.append(start)
  return Prompt(
    jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32), jnp.asarray(starts, jnp.int32), jnp.zeros(len(ids), jnp.uint32)
  )
