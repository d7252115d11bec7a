"""Shards of prepared data in an object store, read through a bounded cache on the local disk: ArrayRecord reads files only.

A shard is fetched whole when the first of its samples is read. When the room is used up, the shards that were not used for longest
go; all processes of a machine share the cache. A data set that is larger than its cache is fetched again and again under a global
shuffle, so there is a word about it.
"""

import multiprocessing
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable
from typing import Any

from dynllava_jax import paths, remote
from dynllava_jax.paths import Given

LIMIT = 'DYNLLAVA_JAX_CACHE_GB'  # environment variable: room for shards; by default `SHARE` of what the disk has left
SHARE = 0.8
SHARD = '.array_record-'  # in the names of shards


def without_shards(names: Iterable[str]) -> set[str]:
  """Of the names in a prepared folder those of the small files that are read at once."""
  return {n for n in names if SHARD not in n}


class CachedShards:
  """The shards of a prepared folder in a store; picklable."""

  def __init__(self, folder: Given):
    """StoreError: the store cannot be read. PathError: `LIMIT` is no number."""
    self._folder, self._limit = folder, limit()
    self.objects = {n: o for n, o in remote.listing(folder).items() if SHARD in n and '/' not in n}
    nbytes = sum(o['size'] for o in self.objects.values())
    if nbytes > self._limit and multiprocessing.parent_process() is None:
      room = f'the cache in {paths.cache()} has room for {self._limit / 1e9:.1f} GB, so they are fetched again and again'
      hint = f'give it a larger disk ({paths.CACHE}, {LIMIT}), or mount the bucket'
      print(f'{folder}: its shards take {nbytes / 1e9:.1f} GB, {room}; {hint}', file=sys.stderr)

  def sizes(self) -> dict[str, int]:
    """Bytes of every shard."""
    return {name: info['size'] for name, info in self.objects.items()}

  def open(self, name: str, read: Callable[[pathlib.Path], Any]) -> Any:
    """What `read` makes of a shard's file on this machine, fetched if it is not here."""
    local = paths.cache() / 'shards' / paths.place(self._folder, 'read').relative_to(paths.cache() / 'read') / name
    while True:
      remote.fetch_alone(self._folder, name, self.objects[name], local)
      make_room(self._limit, local)
      try:
        return read(local)
      except Exception:
        if local.exists():
          raise  # else another process made room in between


def limit() -> int:
  """Bytes that all shards in the cache may take."""
  if given := os.environ.get(LIMIT):
    try:
      return int(float(given) * 1e9)
    except ValueError:
      raise paths.PathError(f'{LIMIT}: {given!r}, expected a number of gigabytes') from None
  root = paths.cache()
  root.mkdir(parents=True, exist_ok=True)
  return int(SHARE * (shutil.disk_usage(root).free + sum(size for _, size, _ in _cached())))


def make_room(nbytes: int, keep: pathlib.Path) -> None:
  """Removes the shards that were not used for longest until the rest takes no more than `nbytes`, but never `keep`."""
  cached = sorted(_cached())
  total = sum(size for _, size, _ in cached)
  for _, size, path in cached:
    if total > nbytes and path != keep:
      path.unlink(missing_ok=True)
      total -= size


def _cached() -> list[tuple[int, int, pathlib.Path]]:
  """(last use, bytes, path) of every shard in the cache."""
  out = []
  for path in (paths.cache() / 'shards').rglob(f'*{SHARD}*'):
    try:
      found = path.stat()
    except FileNotFoundError:  # another process makes room too
      continue
    out.append((found.st_atime_ns, found.st_size, path))
  return out
