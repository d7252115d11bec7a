"""The arrays of a checkpoint step, read from disk straight to the devices that compute with them, some layers at a time.

Orbax reads whole parameters, which are then on the host and on the device, and whole once more while a stack of layers is cut for
the stages of a run. Here a stack that is large comes in pieces, each written into the array where it stays; no more than
two pieces are held besides. Reading and decoding is tensorstore's, as in Orbax.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

PARAMS = 'params'
PIECE = 2**25  # bytes read at a time of an array that is larger; at least one block of it as it was stored
AHEAD = 1  # pieces that are read while one goes to the device


@dataclasses.dataclass(frozen=True)
class Part:
  """Rows `start` to `stop` (None: to the end) of a stored array, by its name on disk (`llama.layers.q`), and where they are put.

  Axis 0 is a stack of layers, which lies whole on every device; of an array that is read whole and at once it may be split.
  """

  name: str
  start: int
  stop: int | None
  sharding: jax.sharding.Sharding


@dataclasses.dataclass(frozen=True)
class _Piece:
  """Rows of an array that are read at once, and the parts, by number, that take some of them."""

  array: ts.TensorStore
  start: int
  stop: int
  takers: tuple[int, ...]


def on_disk(folder: pathlib.Path) -> dict[str, str]:
  """What tensorstore is told of a folder; it refuses `..`."""
  return {'driver': 'file', 'path': f'{os.path.realpath(folder)}/'}


class Step:
  """The arrays of one step."""

  def __init__(self, step_dir: pathlib.Path):
    """OSError, ValueError: there is no step, or not one that Orbax wrote."""
    self.folder = step_dir / PARAMS
    self.metadata = json.loads((self.folder / '_METADATA').read_text())
    self._arrays: dict[str, ts.TensorStore] = {}

  def array(self, name: str) -> ts.TensorStore:
    """One stored array; ValueError if it cannot be opened."""
    if name not in self._arrays:
      self._arrays[name] = self._open(name)
    return self._arrays[name]

  def _open(self, name: str) -> ts.TensorStore:
    if self.metadata['use_ocdbt']:
      store = {'driver': 'ocdbt', 'base': on_disk(self.folder), 'path': name}
    else:
      store = on_disk(self.folder / name)
    return ts.open({'driver': 'zarr3' if self.metadata['use_zarr3'] else 'zarr', 'kvstore': store}, open=True, read=True).result()

  def read(self, parts: Sequence[Part]) -> list[jax.Array]:
    """The parts as arrays; ValueError if one cannot be decoded. All processes read the same parts, each what its devices hold."""
    results: list[jax.Array | None] = [None] * len(parts)
    pieces = list(self._pieces(parts))
    with concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
      boxes = {i: _box(p.sharding, self.array(p.name).shape) for i, p in enumerate(parts)}
      begin = lambda piece: pool.submit(_read, piece, boxes[piece.takers[0]])
      ahead = [begin(p) for p in pieces[:AHEAD]]
      for n, piece in enumerate(pieces):
        values = ahead.pop(0).result()
        for i in piece.takers:
          part = parts[i]
          stop = piece.array.shape[0] if part.stop is None else part.stop
          first, last = max(piece.start, part.start), min(piece.stop, stop)
          rows = values[first - piece.start : last - piece.start] if values.ndim else values
          shape = (stop - part.start, *piece.array.shape[1:]) if values.ndim else ()
          results[i] = _put(results[i], rows, first - part.start, shape, part.sharding, boxes[i])
        values = rows = None
        if n + AHEAD < len(pieces):
          ahead.append(begin(pieces[n + AHEAD]))
    return results

  def _pieces(self, parts: Sequence[Part]) -> Iterator[_Piece]:
    """What is read, in order: every block of an array once, by all parts that need it."""
    names: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
      names.setdefault(part.name, []).append(i)
    for name, takers in names.items():
      array = self.array(name)
      rows = array.shape[0] if array.ndim else 1
      block = array.chunk_layout.read_chunk.shape[0] if array.ndim else 1
      row_bytes = array.dtype.numpy_dtype.itemsize * math.prod(array.shape[1:])
      step = rows if rows * row_bytes <= PIECE else max(1, PIECE // (block * row_bytes)) * block
      for start in range(0, rows, step):
        stop = min(start + step, rows)
        of = tuple(i for i in takers if parts[i].start < stop and (parts[i].stop is None or start < parts[i].stop))
        if of:
          yield _Piece(array, start, stop, of)


def _box(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> tuple[slice, ...]:
  """The smallest block of an array, all of axis 0, that holds all that this process's devices take."""
  indices = [index[1:] for index in sharding.addressable_devices_indices_map(shape).values()]
  spans: Iterable = zip(*([s.indices(n)[:2] for s, n in zip(index, shape[1:])] for index in indices))
  return tuple(slice(min(a for a, _ in axis), max(b for _, b in axis)) for axis in spans)


def _read(piece: _Piece, box: tuple[slice, ...]) -> np.ndarray:
  if not piece.array.ndim:
    return piece.array.read().result()
  return piece.array[(slice(piece.start, piece.stop), *box)].read().result()


def _put(
  whole: jax.Array | None,
  rows: np.ndarray,
  at: int,
  shape: tuple[int, ...],
  sharding: jax.sharding.Sharding,
  box: tuple[slice, ...],
) -> jax.Array:
  """Rows of an array on its devices, written into the ones that are there already."""

  def shard(index: tuple[slice, ...]) -> np.ndarray:
    return rows[(index[0], *(_within(i, b, n) for i, b, n in zip(index[1:], box, shape[1:])))] if shape else rows

  piece_shape = (rows.shape[0], *shape[1:]) if shape else ()
  piece = jax.make_array_from_callback(piece_shape, sharding, shard)
  if piece_shape != shape:
    whole = jnp.zeros(shape, piece.dtype, device=sharding) if whole is None else whole
    piece = _write(whole, piece, np.int32(at))
  return piece.block_until_ready()  # or the host would run ahead and hold them all


def _within(index: slice, box: slice, size: int) -> slice:
  start, stop, _ = index.indices(size)
  return slice(start - box.start, stop - box.start)


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, rows: jax.Array, at: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(whole, rows, at, 0)


def by_name(tree: Any) -> dict[str, Any]:
  """The leaves of a tree of groups, by name (`llama/layers/q`)."""
  return {jax.tree_util.keystr(p, simple=True, separator='/'): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def as_tree(named: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `by_name`."""
  tree: dict[str, Any] = {}
  for name, value in named.items():
    node = tree
    *folders, last = name.split('/')
    for folder in folders:
      node = node.setdefault(folder, {})
    node[last] = value
  return tree
