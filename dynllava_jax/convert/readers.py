"""Reading PyTorch weight files: what they hold without loading it, and one tensor at a time."""

import dataclasses
import functools
import json
import pathlib
import struct
import threading
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dynllava_jax.files import read_array

SAFETENSORS_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U8': np.uint8,
  'BOOL': np.bool_,
}
NUMPY_NAMES = {np.dtype(d).name for d in SAFETENSORS_DTYPES.values()}
FLOATS = tuple(np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
WEIGHTS = ('model.safetensors', 'pytorch_model.bin')
LFS_POINTER = b'version https://git-lfs'
ZIP = b'PK\x03\x04'  # what a `.bin` file begins with since torch 1.6; older ones cannot be mapped
REMAP_BYTES = 2**28  # a mapped file counts as memory in use once read; it is mapped anew after so many bytes


class ConversionError(RuntimeError):
  """A checkpoint that cannot be converted; the message names file and key."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor that is not loaded yet.

  Attributes:
    key: its name in the file; shape, dtype: what `load` returns.
    origin: the file, or how the numbers come about.
    read: what `load` gets the numbers from.
  """

  key: str
  shape: tuple[int, ...]
  dtype: np.dtype
  origin: str
  read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

  def load(self) -> np.ndarray:
    """The numbers; ConversionError if the file cannot be read, or does not hold what it did when it was opened."""
    try:
      value = self.read()
    except OSError as e:
      raise ConversionError(f'{self.origin}: {self.key} cannot be read ({e})') from None
    if value.shape != self.shape:
      raise ConversionError(f'{self.origin}: {self.key} has shape {value.shape}, expected {self.shape}; has the file changed?')
    return value


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON file; ConversionError if it is missing or broken."""
  try:
    content = json.loads(path.read_text())
  except FileNotFoundError:
    raise ConversionError(f'{path}: missing') from None
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ConversionError(f'{path}: not valid JSON ({e})') from None
  if not isinstance(content, dict):
    raise ConversionError(f'{path}: holds a {type(content).__name__}, expected an object with named entries')
  return content


def nested(path: pathlib.Path, config: dict[str, Any], key: str) -> dict[str, Any]:
  """The group of entries `key` of a config, empty if it is not there; ConversionError if it is something else."""
  value = config.get(key) or {}
  if not isinstance(value, dict):
    raise ConversionError(f'{path}: {key} is {value!r}, expected an object with named entries')
  return value


def by_name(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
  """Tensors by the converter's names; ConversionError if one is there twice."""
  found: dict[str, Tensor] = {}
  for name, tensor in named:
    if name in found:
      raise ConversionError(
        f'{tensor.origin}: {tensor.key} is there a second time (after {found[name].key} in {found[name].origin})'
      )
    found[name] = tensor
  return found


def has_weights(directory: pathlib.Path) -> bool:
  """Whether a checkpoint directory holds weight files or an index of them."""
  return any((directory / f'{name}{end}').exists() for name in WEIGHTS for end in ('', '.index.json'))


def directory_tensors(directory: pathlib.Path) -> list[Tensor]:
  """Every tensor of a checkpoint directory, safetensors before `.bin`.

  Raises:
    ConversionError: no weights, a shard that the index names is missing or damaged, or a shard lacks a key that the
      index places in it.
  """
  for name in WEIGHTS:
    index = directory / f'{name}.index.json'
    if index.exists():
      return _sharded(directory, index)
    if (directory / name).exists():
      return file_tensors(directory / name)
  raise ConversionError(f'{directory}: no weights found; expected {" or ".join(WEIGHTS)}, whole or sharded with an index')


def _sharded(directory: pathlib.Path, index: pathlib.Path) -> list[Tensor]:
  placed = read_json(index).get('weight_map')
  if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
    raise ConversionError(f'{index}: has no weight_map from keys to file names')
  names = sorted(set(placed.values()))
  absent = [n for n in names if not (directory / n).exists()]
  if absent:
    raise ConversionError(
      f'{index}: names {", ".join(absent)}, which {"is" if len(absent) == 1 else "are"} not in {directory}; '
      'fetch the missing shards'
    )
  by_shard = {n: file_tensors(directory / n) for n in names}
  for name, tensors in by_shard.items():
    lost = {k for k, n in placed.items() if n == name} - {t.key for t in tensors}
    if lost:
      raise ConversionError(f'{index}: places {min(lost)} in {name}, which does not hold it ({len(lost)} such keys)')
  return [t for name in names for t in by_shard[name]]


def file_tensors(path: pathlib.Path) -> list[Tensor]:
  """Every tensor of one weight file; bfloat16 stays bfloat16. Only `.bin` needs torch.

  Raises:
    ConversionError: truncated or unreadable file, or a pickle that holds anything but tensors.
  """
  with path.open('rb') as f:
    start = f.read(len(LFS_POINTER))
  if not start:
    raise ConversionError(f'{path}: empty; fetch or copy it again')
  if start == LFS_POINTER:
    raise ConversionError(f'{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`')
  return _safetensors(path) if path.suffix == '.safetensors' else _pickled(path)


def _safetensors(path: pathlib.Path) -> list[Tensor]:
  """The tensors of a file that the library has checked, read without it.

  The library maps the file: what was read would stay in memory, the interpreter lock is held while the disk is waited for, and a
  disk error would end the process.
  """
  try:
    with safe_open(path, 'numpy'):  # checks the header, and that the file is as long as it says
      pass
    with path.open('rb') as f:
      (size,) = struct.unpack('<Q', f.read(8))
      header = json.loads(f.read(size))
  except (SafetensorError, OSError) as e:
    raise ConversionError(f'{path}: unreadable, truncated or not safetensors ({e})') from None
  header.pop('__metadata__', None)
  found = []
  for key, entry in sorted(header.items()):
    if not isinstance(entry, dict):  # the library takes a list of the values too
      raise ConversionError(f'{path}: the header describes {key} by a {type(entry).__name__}, expected named entries')
    if entry['dtype'] not in SAFETENSORS_DTYPES:
      raise ConversionError(f'{path}: {key} is stored as {entry["dtype"]}; quantised checkpoints are not supported')
    dtype, shape = np.dtype(SAFETENSORS_DTYPES[entry['dtype']]), tuple(entry['shape'])
    begin, end = entry['data_offsets']
    read = functools.partial(_stored, path, 8 + size + begin, end - begin, shape, dtype)
    found.append(Tensor(key, shape, dtype, str(path), read))
  return found


def _stored(path: pathlib.Path, offset: int, nbytes: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  return read_array(path, offset, nbytes).view(dtype).reshape(shape)


class _Pickle:
  """A `.bin` file, mapped if its format allows it."""

  def __init__(self, path: pathlib.Path):
    try:
      import torch  # the one place that needs it
    except ImportError:
      raise ConversionError(
        f'{path}: reading .bin files needs torch (pip install torch), or save the checkpoint as safetensors'
      ) from None
    self.torch, self.path, self.lock, self.touched = torch, path, threading.Lock(), 0
    with path.open('rb') as f:
      self.mapped = f.read(len(ZIP)) == ZIP
    self.content = self._open()

  def _open(self) -> dict[str, Any]:
    try:
      content = self.torch.load(self.path, map_location='cpu', weights_only=True, mmap=self.mapped)
    except Exception as e:  # torch raises many types for damaged or hostile files
      raise ConversionError(
        f'{self.path}: unreadable, truncated or not a plain tensor file ({type(e).__name__}: {str(e).splitlines()[0]})'
      ) from None
    if not isinstance(content, dict):
      raise ConversionError(f'{self.path}: holds a {type(content).__name__}, expected tensors by name')
    for key, value in content.items():
      if not isinstance(value, self.torch.Tensor):
        raise ConversionError(f'{self.path}: {key} is a {type(value).__name__}, expected a tensor')
      if value.layout != self.torch.strided:
        raise ConversionError(f'{self.path}: {key} is a sparse tensor; only dense ones are supported')
      dtype = str(value.dtype).removeprefix('torch.')
      if dtype not in NUMPY_NAMES:
        raise ConversionError(f'{self.path}: {key} is stored as {dtype}; quantised checkpoints are not supported')
    return content

  def read(self, key: str) -> np.ndarray:
    with self.lock:
      if self.mapped and self.touched > REMAP_BYTES:
        self.content, self.touched = self._open(), 0
      tensor = self.content[key]
      self.touched += tensor.numel() * tensor.element_size()
    return self._array(tensor.detach())

  def dtype(self, key: str) -> np.dtype:
    return self._array(self.torch.empty(0, dtype=self.content[key].dtype)).dtype

  def _array(self, tensor: Any) -> np.ndarray:
    if tensor.dtype == self.torch.bfloat16:
      return tensor.contiguous().view(self.torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def _pickled(path: pathlib.Path) -> list[Tensor]:
  file = _Pickle(path)
  return [Tensor(k, tuple(t.shape), file.dtype(k), str(path), lambda k=k: file.read(k)) for k, t in file.content.items()]
