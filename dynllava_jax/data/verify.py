"""Every byte of a prepared folder compared with the digests that were noted when it was written; training compares samples only.

python -m dynllava_jax.data.verify --path=prepared/llava/1.0.0
python -m dynllava_jax.data.verify --path=prepared/llava/1.0.0 --images=data     # and the pictures that it only names
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


def verify(path: str, processes: int, images: str = '') -> list[str]:
  """One line per damaged file or record, after `Store`'s own look, and per picture below `images` that is not the one prepared.

  Raises:
    ConfigError: the folder cannot be opened.
  """
  from dynllava_jax.data.store import Store  # brings jax along; the flags are known to be right by now

  store = Store(path, images, allow_outside=True)  # where pictures may lie is a question of reading them
  known = read_settings(store.folder).get(FILES)
  shards = [(store, shard) for shard in range(len(store.opened.shards))]
  if known is None:  # an earlier version or TFDS's builder: what ArrayRecord's checksums tell
    rounds = [('comparing files', _unreadable, shards)]
  else:
    rounds = [('comparing files', _damaged, [(store, name, digests) for name, digests in sorted(known.items())])]
  if images:
    rounds.append(('comparing pictures', _other_pictures, shards))
  found = []
  for title, work, jobs in rounds:
    with parallel_map(work, jobs, processes) as results, progress(Terminal(), title, len(jobs)) as advance:
      for result in results:
        found += result
        advance(1)
  return found


def _damaged(job: 'tuple[Store, str, Mapping[str, Any]]') -> list[str]:
  store, name, known = job
  line = store.with_file(name, lambda path: damaged_whole((path.parent, name, known)))
  return [line] if line else []


def _records(store: 'Store', shard: int) -> range:
  stop = sum(store.opened.lengths[: shard + 1])
  return range(stop - store.opened.lengths[shard], stop)


def _unreadable(job: 'tuple[Store, int]') -> list[str]:
  store, shard = job
  try:
    for index in _records(store, shard):
      store.record(index)
  except DataError as e:
    return [str(e)]
  return []


def _other_pictures(job: 'tuple[Store, int]') -> list[str]:
  store, shard = job
  found = []
  for index in _records(store, shard):
    try:
      record, content = store.record(index)
      if record.image_path and not content:
        store.named_picture(index, record)
    except (DataError, ConfigError) as e:
      found.append(str(e))
  return list(dict.fromkeys(found))


def main(_) -> None:
  """One run of the command line; exit status 1 if anything is damaged."""
  given = flags.FLAGS
  with command_line.readable_errors():
    if not given.path:
      raise ConfigError('--path is missing; give a folder that dynllava_jax.data.prepare wrote')
    console, found = Terminal(), verify(given.path, given.processes, given.images or '')
    for line in found:
      console.print(line)
    if found:
      console.print(f'{len(found):,} damaged or changed; {REMEDY}')
    else:
      console.print(
        f'{given.path}: every file is as it was written' + (', every picture as it was prepared' if given.images else '')
      )
    sys.exit(1 if found else 0)


if __name__ == '__main__':
  command_line.define_path('path', None, 'The prepared folder.')
  command_line.define_path('images', None, 'Folder of the pictures, to compare them too where the prepared folder only names them.')
  flags.DEFINE_integer('processes', min(os.cpu_count() or 1, 8), 'Worker processes.', lower_bound=1, upper_bound=1024)
  command_line.run(main)
