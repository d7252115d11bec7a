"""Writing safetensors shards tensor by tensor, in any order.

The library's `save_file` wants a whole shard in memory. The format is a length, a JSON header with the place of every
tensor, and the tensors (https://huggingface.co/docs/safetensors), so each can be put in its place when it comes. The header
also has room for free text; there the digest of every tensor goes when all are written, and `readers` compares.
"""

import json
import math
import pathlib
import struct
from collections.abc import Iterable

import numpy as np
import xxhash

from dynllava_jax.convert.inputs import ConversionError
from dynllava_jax.convert.numbers import describe, look
from dynllava_jax.convert.readers import DIGESTS, SAFETENSORS_DTYPES
from dynllava_jax.files import read_array, write_array

MAX_SHARD_BYTES = 5 * 10**9
NAMES = {np.dtype(d): name for name, d in SAFETENSORS_DTYPES.items()}
Spec = tuple[str, tuple[int, ...], np.dtype]  # key, shape, dtype


def spec_bytes(spec: Spec) -> int:
  """Bytes of one tensor."""
  return math.prod(spec[1]) * spec[2].itemsize


class ShardWriter:
  """A directory of safetensors shards with an index, or one file if that is enough."""

  def __init__(self, directory: pathlib.Path, specs: Iterable[Spec], max_bytes: int = MAX_SHARD_BYTES, name: str = 'model'):
    directory.mkdir(exist_ok=True)
    self.files: dict[str, pathlib.Path] = {}
    self._places: dict[str, int] = {}
    self._room: dict[pathlib.Path, int] = {}  # bytes of each file's header
    self._digests: dict[str, str] = {}
    self._specs = {key: (shape, dtype) for key, shape, dtype in specs}
    shards = self._split(max_bytes)
    for i, keys in enumerate(shards):
      number = '' if len(shards) == 1 else f'-{i + 1:05d}-of-{len(shards):05d}'
      self._create(directory / f'{name}{number}.safetensors', keys)
    if len(shards) > 1:
      total = sum(spec_bytes((k, *v)) for k, v in self._specs.items())
      index = {'metadata': {'total_size': total}, 'weight_map': {k: f.name for k, f in self.files.items()}}
      (directory / f'{name}.safetensors.index.json').write_text(json.dumps(index, indent=1))

  def _split(self, max_bytes: int) -> list[list[str]]:
    shards, room = [[]], max_bytes
    for key, spec in self._specs.items():
      size = spec_bytes((key, *spec))
      if size > room and shards[-1]:
        shards.append([])
        room = max_bytes
      shards[-1].append(key)
      room -= size
    return shards

  def _header(self, keys: list[str], digests: dict[str, str]) -> tuple[bytes, int]:
    """(header as it is stored, bytes of the tensors after it)."""
    described = {DIGESTS: json.dumps(digests, separators=(',', ':'))} if digests else {}
    header, offset = {'__metadata__': {'format': 'pt'} | described}, 0
    for key in keys:
      shape, dtype = self._specs[key]
      end = offset + spec_bytes((key, shape, dtype))
      header[key] = {'dtype': NAMES[dtype], 'shape': list(shape), 'data_offsets': [offset, end]}
      offset = end
    text = json.dumps(header, separators=(',', ':')).encode()
    return text + b' ' * (-len(text) % 8), offset

  def _create(self, path: pathlib.Path, keys: list[str]) -> None:
    room = len(self._header(keys, dict.fromkeys(keys, xxhash.xxh3_128_hexdigest(b'')))[0])
    text, nbytes = self._header(keys, {})
    with path.open('wb') as f:
      f.write(struct.pack('<Q', room) + text.ljust(room))
      f.truncate(8 + room + nbytes)
    self._room[path], place = room, 8 + room
    for key in keys:
      self.files[key], self._places[key] = path, place
      place += spec_bytes((key, *self._specs[key]))

  def write(self, key: str, value: np.ndarray) -> None:
    """Puts one tensor in its place; returns when it is on disk. ConversionError if its numbers are impossible."""
    shape, dtype = self._specs[key]
    assert value.shape == shape and value.dtype == dtype, (key, value.shape, value.dtype, shape, dtype)
    value = np.ascontiguousarray(value)
    digest = xxhash.xxh3_128()
    if look(value, digest).implausible:
      raise ConversionError(f'{key}: damaged, or the training run diverged: {describe(value)}; export another step')
    self._digests[key] = digest.hexdigest()
    write_array(self.files[key], value, self._places[key])

  def holds(self, key: str) -> bool:
    """Whether a tensor, read again from the disk, is what was written."""
    stored = read_array(self.files[key], self._places[key], spec_bytes((key, *self._specs[key])))
    return xxhash.xxh3_128_hexdigest(stored.data) == self._digests[key]

  def finish(self) -> None:
    """Puts the digests into the headers, once every tensor is written."""
    for path, room in self._room.items():
      keys = [k for k, f in self.files.items() if f == path]
      text, _ = self._header(keys, {k: self._digests[k] for k in keys})
      assert len(text) == room, (path, len(text), room)
      write_array(path, np.frombuffer(text, np.uint8), 8)
