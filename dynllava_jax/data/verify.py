"""Every byte of a prepared folder compared with the digests that were noted when it was written; training compares samples only.

python -m dynllava_jax.data.verify --path=prepared/llava/1.0.0
"""

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from dynllava_jax import command_line
from dynllava_jax.config import ConfigError
from dynllava_jax.data.integrity import FILES, REMEDY, damaged_whole, read_settings
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.workers import parallel_map
from dynllava_jax.display import Terminal
from dynllava_jax.progress import progress

if TYPE_CHECKING:
  from dynllava_jax.data.store import Store


def verify(path: str, processes: int) -> list[str]:
  """One line per damaged file or record, after `Store`'s own look.

  Raises:
    ConfigError: the folder cannot be opened.
  """
  from dynllava_jax.data.store import Store  # brings jax along; the flags are known to be right by now

  store = Store(path)
  known = read_settings(store.folder).get(FILES)
  if known is None:  # an earlier version or TFDS's builder: what ArrayRecord's checksums tell
    jobs, work = [(store, shard) for shard in range(len(store.opened.shards))], _unreadable
  else:
    jobs, work = [(store, name, digests) for name, digests in sorted(known.items())], _damaged
  found = []
  with (
    parallel_map(work, jobs, processes) as results,
    progress(Terminal(), 'comparing files', len(jobs)) as advance,
  ):
    for result in results:
      found += [result] if result else []
      advance(1)
  return found


def _damaged(job: 'tuple[Store, str, Mapping[str, Any]]') -> str:
  store, name, known = job
  return store.with_file(name, lambda path: damaged_whole((path.parent, name, known)))


def _unreadable(job: 'tuple[Store, int]') -> str:
  store, shard = job
  stop = sum(store.opened.lengths[: shard + 1])
  try:
    for index in range(stop - store.opened.lengths[shard], stop):
      store.record(index)
  except DataError as e:
    return str(e)
  return ''


def main(_) -> None:
  """One run of the command line; exit status 1 if anything is damaged."""
  given = flags.FLAGS
  with command_line.readable_errors():
    if not given.path:
      raise ConfigError('--path is missing; give a folder that dynllava_jax.data.prepare wrote')
    console, found = Terminal(), verify(given.path, given.processes)
    for line in found:
      console.print(line)
    if found:
      console.print(f'{len(found):,} damaged; {REMEDY}')
    else:
      console.print(f'{given.path}: every file is as it was written')
    sys.exit(1 if found else 0)


if __name__ == '__main__':
  command_line.define_path('path', None, 'The prepared folder.')
  flags.DEFINE_integer('processes', min(os.cpu_count() or 1, 8), 'Worker processes.', lower_bound=1, upper_bound=1024)
  command_line.run(main)
