"""Reading PyTorch weight files: what they hold without loading it, and one tensor at a time."""

import dataclasses
import functools
import json
import pathlib
import pickle
import struct
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from dynllava_jax.convert.inputs import ConversionError, check_file, read_json
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
INDEX = '.index.json'
DIGESTS = 'xxh3_128'  # our entry of a header's metadata: the digest of every tensor's bytes, as JSON
LFS_POINTER = b'version https://git-lfs'
ZIP, PICKLE = b'PK\x03\x04', b'\x80'  # what a `.bin` file begins with, since torch 1.6 and before; only the former can be mapped
REMAP_BYTES = 2**28  # a mapped file counts as memory in use once read; it is mapped anew after so many bytes


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


def check_filled(tensors: Iterable[Tensor]) -> None:
  """ConversionError if one of the tensors holds no number at all."""
  for tensor in tensors:
    if 0 in tensor.shape:
      raise ConversionError(
        f'{tensor.origin}: {tensor.key} is empty (shape {tensor.shape}), as DeepSpeed ZeRO-3 leaves weights that were not gathered '
        "before saving; save it again with stage3_gather_16bit_weights_on_model_save, or with DeepSpeed's zero_to_fp32.py"
      )


def has_weights(directory: pathlib.Path) -> bool:
  """Whether a checkpoint directory holds weight files or an index of them."""
  return bool(weights_of(directory))


def weights_of(directory: pathlib.Path) -> list[pathlib.Path]:
  """Weight files and indices of a directory; the first is the one that transformers 5 reads: a whole file before an index."""
  names = [f'{name}{end}' for name in WEIGHTS for end in ('', INDEX)]
  return [directory / n for n in names if (directory / n).exists()]


def directory_tensors(directory: pathlib.Path, notes: list[str] | None = None) -> list[Tensor]:
  """Every tensor of a checkpoint directory, from the file that transformers would read (`weights_of`).

  Args:
    directory: the checkpoint.
    notes: is told what other weights lie there.

  Raises:
    ConversionError: no weights, a shard that the index names is missing or damaged, or a shard lacks a key that the
      index places in it.
  """
  found = weights_of(directory)
  if not found:
    raise ConversionError(f'{directory}: no weights found; expected {" or ".join(WEIGHTS)}, whole or sharded with an index')
  if found[1:] and notes is not None:
    notes.append(f'read {found[0]} and passed over {", ".join(f.name for f in found[1:])} beside it, as transformers does')
  return _sharded(directory, found[0]) if found[0].name.endswith(INDEX) else file_tensors(found[0])


def _sharded(directory: pathlib.Path, index: pathlib.Path) -> list[Tensor]:
  placed = read_json(index).get('weight_map')
  if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
    raise ConversionError(f'{index}: has no weight_map from keys to file names')
  names = sorted(set(placed.values()))
  outside = [n for n in names if n != pathlib.PurePath(n).name]
  if outside:
    raise ConversionError(f'{index}: names {outside[0]!r}; expected names of files beside it')
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
  check_file(path)
  try:
    with path.open('rb') as f:
      start = f.read(len(LFS_POINTER))
  except OSError as e:
    raise ConversionError(f'{path}: cannot be read ({e.strerror})') from None
  if not start:
    raise ConversionError(f'{path}: empty; fetch or copy it again')
  if start == LFS_POINTER:
    raise ConversionError(f'{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`')
  if path.suffix == '.safetensors':
    return _safetensors(path)
  if not start.startswith((ZIP, PICKLE)):  # torch would run into whatever the bytes mean to it
    hint = 'by its content it may be safetensors, then name it so' if start[8:9] == b'{' else 'is it the right file?'
    raise ConversionError(f'{path}: not written by torch.save, expected tensors in its format; {hint}')
  return _pickled(path)


def _safetensors(path: pathlib.Path) -> list[Tensor]:
  """The tensors of a file that the library has checked, read without it.

  The library maps the file: what was read would stay in memory, the interpreter lock is held while the disk is waited for, and a
  disk error would end the process.
  """
  header, start = _header(path)
  digests = _digests(path, header.pop('__metadata__', None) or {}, header.keys())
  found = []
  for key, entry in sorted(header.items()):
    if not isinstance(entry, dict):  # the library takes a list of the values too
      raise ConversionError(f'{path}: the header describes {key} by a {type(entry).__name__}, expected named entries')
    if entry['dtype'] not in SAFETENSORS_DTYPES:
      raise ConversionError(f'{path}: {key} is stored as {entry["dtype"]}; quantised checkpoints are not supported')
    dtype, shape = np.dtype(SAFETENSORS_DTYPES[entry['dtype']]), tuple(entry['shape'])
    begin, end = entry['data_offsets']
    read = functools.partial(_stored, path, key, start + begin, end - begin, shape, dtype, digests.get(key))
    found.append(Tensor(key, shape, dtype, str(path), read))
  return found


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
  """(header of a safetensors file, offset of its numbers); ConversionError if the library does not take the file."""
  try:
    with safe_open(path, 'numpy'):  # checks the header, and that the file is as long as it says
      pass
    with path.open('rb') as f:
      (size,) = struct.unpack('<Q', f.read(8))
      return json.loads(f.read(size)), 8 + size
  except (SafetensorError, OSError, ValueError, RecursionError) as e:
    raise ConversionError(f'{path}: unreadable, truncated or not safetensors ({e})') from None


def _digests(path: pathlib.Path, metadata: dict[str, str], keys: Iterable[str]) -> dict[str, str]:
  """The digest of every tensor, if the file is an export of ours; none otherwise."""
  if DIGESTS not in metadata:
    return {}
  try:
    digests = json.loads(metadata[DIGESTS])
    if digests.keys() == set(keys):
      return digests
  except (ValueError, RecursionError, AttributeError):
    pass
  raise ConversionError(f'{path}: damaged, the digests in its header are not those of its tensors; copy or export it again')


def _stored(
  path: pathlib.Path, key: str, offset: int, nbytes: int, shape: tuple[int, ...], dtype: np.dtype, digest: str | None
) -> np.ndarray:
  value = read_array(path, offset, nbytes)
  if digest is not None and xxhash.xxh3_128_hexdigest(value.data) != digest:
    raise ConversionError(f'{path}: {key} is damaged, its digest is not the one it was exported with; copy or export it again')
  return value.view(dtype).reshape(shape)


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
      with warnings.catch_warnings(action='ignore'):  # of pickles that are not its own
        content = self.torch.load(self.path, map_location='cpu', weights_only=True, mmap=self.mapped)
    except pickle.UnpicklingError:  # its message tells how to let a file run code
      raise ConversionError(f'{self.path}: unreadable, truncated or not a plain tensor file (it holds other objects)') from None
    except Exception as e:  # torch raises many types for damaged or hostile files
      why = next(iter(str(e).splitlines()), type(e).__name__)
      raise ConversionError(f'{self.path}: unreadable, truncated or not a plain tensor file ({why})') from None
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
