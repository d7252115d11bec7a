"""What every kind of record needs: quantities and their tolerances, arrays of a case, prompts from recorded token ids."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import IMAGE_ID
from dynllava_jax.convert.inputs import ConversionError, check_file
from dynllava_jax.models.dynllava import Prompt

LOGITS, LOSS, GRADIENT, EXACT = 1e-4, 1e-5, 5e-4, 0.0


class Mismatch(ConversionError):
  """An array that cannot be compared with what it is to equal; without the name of its file."""


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
  """Largest absolute difference; `relative` scales the tolerance by the largest recorded entry.

  Raises:
    Mismatch: the shapes differ, or whole numbers that are to be equal were recorded as something else.
  """
  ours, recorded = np.asarray(ours), np.asarray(recorded)
  if ours.shape != recorded.shape:
    raise Mismatch(f'{name} has shape {recorded.shape} in the record, expected {ours.shape}')
  if tolerance == EXACT and ours.dtype.kind in 'iub' and recorded.dtype.kind == 'f':
    raise Mismatch(f'{name} is {recorded.dtype} in the record, expected whole numbers')
  ours, recorded = ours.astype(np.float64), recorded.astype(np.float64)
  scale = np.abs(recorded).max() if relative and recorded.size else 1.0
  with np.errstate(invalid='ignore'):  # infinite ones
    error = np.abs(ours - recorded).max() if recorded.size else 0.0
  return Quantity(name, float(error), tolerance * float(scale))


def load_case(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """All arrays of a case; ConversionError if the file is not one."""
  check_file(pathlib.Path(path))
  try:
    with np.load(path) as f:
      case = {k: f[k] for k in f.files}
  except Exception as e:  # numpy, zipfile, zlib and tokenize each have their own
    raise ConversionError(f'{path}: not a readable case file ({e})') from None
  for name, array in case.items():
    if array.dtype.kind not in 'biuf':
      raise ConversionError(f'{path}: array {name!r} holds {array.dtype}, expected numbers')
  return case


def given(
  at: str | pathlib.Path, case: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...], whole: bool = False
) -> np.ndarray:
  """An array that something is computed from: there, of that shape (None for any size but 0), and without NaN.

  Args:
    at, case: the file and its arrays.
    name, shape: of the array.
    whole: whether it holds whole numbers, or true and false.

  Raises:
    ConversionError: it is not so; the message names file, array and what was expected.
  """
  if name not in case:
    raise ConversionError(f'{at}: array {name!r} is missing')
  array = case[name]
  if array.ndim != len(shape) or any(n != m if m is not None else n == 0 for n, m in zip(array.shape, shape)):
    wanted = ', '.join('any' if n is None else str(n) for n in shape)
    raise ConversionError(f'{at}: array {name!r} has shape {array.shape}, expected ({wanted})')
  if whole and array.dtype.kind not in 'biu':
    raise ConversionError(f'{at}: array {name!r} holds {array.dtype}, expected whole numbers')
  if not np.isfinite(array).all():
    raise ConversionError(f'{at}: array {name!r} holds {(~np.isfinite(array)).sum()} entries that are no finite numbers')
  return array


def in_range(at: str | pathlib.Path, name: str, array: np.ndarray, low: int, high: int) -> np.ndarray:
  """`array`; ConversionError unless all of it is from `low` to below `high`."""
  if outside := array[(array < low) | (array >= high)].tolist():
    raise ConversionError(f'{at}: array {name!r} holds {outside[0]}, expected {low} to {high - 1}')
  return array


def token_ids(at: str | pathlib.Path, case: Mapping[str, np.ndarray], name: str, vocab: int) -> np.ndarray:
  """A prompt int[L], recorded as [L] or [1, L]: tokens of the vocabulary, and -200 for the image once or not at all."""
  rank = case[name].ndim if name in case else 1
  ids = given(at, case, name, (None,) if rank == 1 else (1, None), whole=True).reshape(-1).astype(np.int32)
  in_range(at, name, ids[ids != IMAGE_ID], 0, vocab)
  if (images := int((ids == IMAGE_ID).sum())) > 1:
    raise ConversionError(f'{at}: array {name!r} holds {IMAGE_ID} {images} times, expected one image at most')
  if images == len(ids):
    raise ConversionError(f'{at}: array {name!r} holds no text')
  return ids


def token_rows(
  at: str | pathlib.Path, case: Mapping[str, np.ndarray], group: str, rows: int | None, vocab: int
) -> tuple[np.ndarray, np.ndarray]:
  """`input_ids` int[B, L] of a training step and what of them is real, bool[B, L], by `attention_mask` if that is there."""
  ids = given(at, case, f'{group}input_ids', (rows, None), whole=True)
  mask = f'{group}attention_mask'
  valid = given(at, case, mask, ids.shape, whole=True).astype(bool) if mask in case else np.ones(ids.shape, bool)
  in_range(at, f'{group}input_ids', ids[valid & (ids != IMAGE_ID)], 0, vocab)
  if ((ids == IMAGE_ID) & valid).sum(1).max() > 1 or not (valid & (ids != IMAGE_ID)).any(1).all():
    raise ConversionError(
      f'{at}: array {group + "input_ids"!r} has a row without text, or one with more than one image ({IMAGE_ID})'
    )
  return ids, valid


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
