"""Writing safetensors shards tensor by tensor, in any order.

The library's `save_file` wants a whole shard in memory. The format is a length, a JSON header with the place of every
tensor, and the tensors (https://huggingface.co/docs/safetensors), so each can be put in its place when it comes.
"""

import json
import math
import pathlib
import struct
from collections.abc import Iterable

import numpy as np

from dynllava_jax.convert.readers import SAFETENSORS_DTYPES
from dynllava_jax.files import write_array

MAX_SHARD_BYTES = 5 * 10**9
NAMES = {np.dtype(d): name for name, d in SAFETENSORS_DTYPES.items()}
Spec = tuple[str, tuple[int, ...], np.dtype]  # key, shape, dtype


def spec_bytes(spec: Spec) -> int:
  """Bytes of one tensor."""
  return math.prod(spec[1]) * spec[2].itemsize


class ShardWriter:
  """A directory of safetensors shards with an index, or one file if that is enough."""

  def __init__(self, directory: pathlib.Path, specs: Iterable[Spec], max_bytes: int = MAX_SHARD_BYTES):
    directory.mkdir(exist_ok=True)
    self.files: dict[str, pathlib.Path] = {}
    self._places: dict[str, int] = {}
    self._specs = {key: (shape, dtype) for key, shape, dtype in specs}
    shards = self._split(max_bytes)
    for i, keys in enumerate(shards):
      name = 'model.safetensors' if len(shards) == 1 else f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
      self._create(directory / name, keys)
    if len(shards) > 1:
      total = sum(spec_bytes((k, *v)) for k, v in self._specs.items())
      index = {'metadata': {'total_size': total}, 'weight_map': {k: f.name for k, f in self.files.items()}}
      (directory / 'model.safetensors.index.json').write_text(json.dumps(index, indent=1))

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

  def _create(self, path: pathlib.Path, keys: list[str]) -> None:
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for key in keys:
      shape, dtype = self._specs[key]
      end = offset + spec_bytes((key, shape, dtype))
      header[key] = {'dtype': NAMES[dtype], 'shape': list(shape), 'data_offsets': [offset, end]}
      self.files[key], self._places[key], offset = path, offset, end
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with path.open('wb') as f:
      f.write(struct.pack('<Q', len(text)) + text)
      f.truncate(8 + len(text) + offset)
    for key in keys:
      self._places[key] += 8 + len(text)

  def write(self, key: str, value: np.ndarray) -> None:
    """Puts one tensor in its place; returns when it is on disk."""
    shape, dtype = self._specs[key]
    assert value.shape == shape and value.dtype == dtype, (key, value.shape, value.dtype, shape, dtype)
    write_array(self.files[key], np.ascontiguousarray(value), self._places[key])
