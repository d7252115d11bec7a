"""Whether a prepared folder is as it was written: digests of its files in `prepared.json`.

Opening a folder compares small files whole, and of every shard the size and the places where damage would bring the reader down.
The rest of a shard is compared by `data.verify`; ArrayRecord's own checksums tell of it when such a record is read.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dynllava_jax.config import ConfigError
from dynllava_jax.display import printable
from dynllava_jax.files import SECTOR, check_regular, digest_of, read_regular

NAME, SPLIT = 'llava', 'train'
SOURCES_FILE, INFO_FILE, FEATURES_FILE, SETTINGS_FILE = 'sources.json', 'dataset_info.json', 'features.json', 'prepared.json'
PICTURES_FILE = 'pictures.npz'  # where pictures are only named, see `pictures`
COUNTS_FILE = 'token_counts.npy'  # see `frequencies`; training does not read it, so opening does not ask for it
SMALL_FILES = (SOURCES_FILE, FEATURES_FILE, INFO_FILE)
FILES, SEAL = 'files', 'sha256'  # keys of prepared.json: digests of files, and that of everything else in it
SMALL = 2**27  # bytes of the largest small file that is read
TAIL = 2**16  # ArrayRecord's last block, at whose beginning stands where everything else is
REMEDY = 'copy it again from where the folder came from, or remove the folder and prepare it again'


@dataclasses.dataclass(frozen=True)
class Opened:
  """A folder whose files fit together.

  Attributes:
    shards: names, in the order of the records.
    lengths: records of each.
    sources: `name`, `weight` and number of `samples` of each source.
    identity: digest of all that was prepared; '' where none was kept (earlier versions, TFDS's own builder).
    digests: of every file, {} where none were kept.
  """

  shards: tuple[str, ...]
  lengths: tuple[int, ...]
  sources: list[dict[str, Any]]
  identity: str
  digests: Mapping[str, Mapping[str, Any]]


def shard_names(count: int) -> tuple[str, ...]:
  """TFDS's names of so many shards."""
  return tuple(f'{NAME}-{SPLIT}.array_record-{k:05d}-of-{count:05d}' for k in range(count))


def digests(path: pathlib.Path) -> dict[str, Any]:
  """What `prepared.json` keeps of a file."""
  with path.open('rb') as file:
    whole = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'bytes': os.fstat(file.fileno()).st_size, 'sha256': whole, 'sample': sample(file.fileno())}


def sample(handle: int) -> str:
  """Digest of an open file's first bytes and of both ends of its last block."""
  size = os.fstat(handle).st_size
  return digest_of(handle, sorted({0, max(size - TAIL, 0), max(size - SECTOR, 0)}))


def sealed(settings: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The content of `prepared.json`."""
  content = dict(settings) | {FILES: dict(files)}
  return content | {SEAL: _digest(content)}


def settings_of(content: Mapping[str, Any]) -> dict[str, Any]:
  """`prepared.json` without its digests."""
  return {k: v for k, v in content.items() if k not in (FILES, SEAL)}


def open_folder(folder: pathlib.Path, sizes: Mapping[str, int] | None = None) -> Opened:
  """Compares what is cheap to compare.

  Args:
    folder: the prepared folder.
    sizes: bytes of the shards where they are not in `folder` yet; they are compared with `check_shard` when they come.

  Raises:
    ConfigError: something is missing, damaged, or does not fit the rest; with file and remedy.
  """
  content = read_settings(folder)
  known = content.get(FILES, {})
  for name in known.keys() & set(SMALL_FILES):
    found = _small(folder, name)
    if len(found) != known[name]['bytes'] or hashlib.sha256(found).hexdigest() != known[name]['sha256']:
      raise damaged(folder, name, 'its digest is not the one that was noted')
  lengths = _shard_lengths(folder)
  names = shard_names(len(lengths))
  if known and {n for n in known if n not in (*SMALL_FILES, PICTURES_FILE, COUNTS_FILE)} != set(names):
    raise damaged(folder, SETTINGS_FILE, f'its shards are not those of {INFO_FILE}')
  if PICTURES_FILE in known:
    check_shard(folder, PICTURES_FILE, known[PICTURES_FILE])
  for name in names:
    if sizes is None:
      check_shard(folder, name, known.get(name))
    elif sizes.get(name) != known.get(name, {}).get('bytes', sizes.get(name, -1)):
      raise damaged(folder, name, 'it is not there, or has another size than it was written with')
  return Opened(names, lengths, _sources(folder, sum(lengths), bool(content)), content.get(SEAL, ''), known)


def read_settings(folder: pathlib.Path) -> dict[str, Any]:
  """`prepared.json`, its own digest compared; {} if TFDS's builder wrote the folder.

  Raises:
    ConfigError: it is missing or damaged.
  """
  if not (folder / SETTINGS_FILE).exists() and not (folder / SOURCES_FILE).exists():
    return {}
  content = _json(folder, SETTINGS_FILE, dict)
  if SEAL in content or FILES in content:
    rest = {k: v for k, v in content.items() if k != SEAL}
    if content.get(SEAL) != _digest(rest) or not isinstance(content.get(FILES), dict):
      raise damaged(folder, SETTINGS_FILE, 'its digest is not the one in it')
  return content


def check_shard(folder: pathlib.Path, name: str, known: Mapping[str, Any] | None) -> None:
  """Size and sample of a shard; its presence alone where no digest was kept. Raises ConfigError."""
  try:
    handle = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK)
  except OSError as e:
    raise damaged(folder, name, e.strerror) from None
  try:
    size = os.fstat(handle).st_size
    if known and size != known['bytes']:
      raise damaged(folder, name, f'{size:,} bytes, {known["bytes"]:,} were written')
    if known and sample(handle) != known['sample']:
      raise damaged(folder, name, 'its digest is not the one that was noted')
  except OSError as e:
    raise damaged(folder, name, e.strerror) from None
  finally:
    os.close(handle)


def damaged(folder: pathlib.Path, name: str, why: str) -> ConfigError:
  """The error about a file of a prepared folder."""
  return ConfigError(printable(f'{folder / name}: is missing or damaged ({why}); {REMEDY}'))


def _digest(content: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _small(folder: pathlib.Path, name: str) -> bytes:
  try:
    return read_regular(folder / name, SMALL)
  except OSError as e:
    raise damaged(folder, name, e.strerror) from None


def _json(folder: pathlib.Path, name: str, kind: type) -> Any:
  try:
    content = json.loads(_small(folder, name))
  except (ValueError, RecursionError):
    raise damaged(folder, name, 'no JSON') from None
  if not isinstance(content, kind):
    raise damaged(folder, name, f'a {kind.__name__} was expected')
  return content


def _shard_lengths(folder: pathlib.Path) -> tuple[int, ...]:
  """Records of each shard, as `dataset_info.json` says."""
  info = _json(folder, INFO_FILE, dict)
  try:
    (split,) = [s for s in info['splits'] if s['name'] == SPLIT]
    lengths = tuple(int(n) for n in split['shardLengths'])
    if info['name'] != NAME or not lengths or min(lengths) < 1 or sum(lengths) >= 2**31:
      raise ValueError
  except (KeyError, TypeError, ValueError):
    raise damaged(folder, INFO_FILE, f'it does not tell the shards of {NAME}, split {SPLIT}') from None
  return lengths


def _sources(folder: pathlib.Path, total: int, prepared: bool) -> list[dict[str, Any]]:
  if not prepared:  # written by TFDS itself, see `tfds_builder`
    return [{'name': NAME, 'weight': 1.0, 'samples': total}]
  sources = _json(folder, SOURCES_FILE, list)
  if not all(_is_source(s) for s in sources) or sum(s['samples'] for s in sources) != total:
    raise damaged(folder, SOURCES_FILE, f'its samples are not the {total:,} of {INFO_FILE}')
  return sources


def _is_source(source: Any) -> bool:
  if not isinstance(source, dict) or not isinstance(source.get('name'), str):
    return False
  weight, samples = source.get('weight'), source.get('samples')
  whole = isinstance(samples, int) and not isinstance(samples, bool) and samples >= 0
  return whole and isinstance(weight, (int, float)) and math.isfinite(weight) and weight > 0


def damaged_whole(job: tuple[pathlib.Path, str, Mapping[str, Any]]) -> str:
  """A line about a file whose bytes are not as `prepared.json` says, '' if they are. The job: folder, name, digests."""
  folder, name, known = job
  try:
    check_regular(folder / name)
    return '' if digests(folder / name) == known else f'{folder / name}: its content has changed'
  except OSError as e:
    return f'{folder / name}: {e.strerror}'
