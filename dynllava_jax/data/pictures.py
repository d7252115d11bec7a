"""The table of pictures that a prepared folder only names: size, time and SHA-256 of each sample's file when it was prepared.

Training compares sizes before it starts, and the content of files whose time is another, up to `READ` bytes of them. Each picture
is compared again when it is read, so that none is trained on that is not the one that was checked.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from dynllava_jax.config import ConfigError
from dynllava_jax.data.integrity import PICTURES_FILE, damaged
from dynllava_jax.data.records import Record, read_image
from dynllava_jax.display import printable
from dynllava_jax.files import read_regular
from dynllava_jax.paths import Given, is_local

READ = 2**30  # bytes of pictures with another time that are read before training starts
AT_ONCE = 16  # threads: most of the time is waiting for a file system
LARGEST = 2**33  # bytes of a table
NAMED = 3  # pictures that a message names
REMEDY = 'put back those that were prepared, or prepare the folder again'


@dataclasses.dataclass(frozen=True)
class Pictures:
  """One row per sample, in the order of the records.

  Attributes:
    names: paths as in the records, UTF-8, a zero byte between them; nothing for a sample without picture.
    sizes: int64[N], bytes.
    times: int64[N], of the last change in ns; 0 in object stores.
    digests: uint8[N, 32], SHA-256.
  """

  names: bytes
  sizes: np.ndarray
  times: np.ndarray
  digests: np.ndarray

  @functools.cached_property
  def paths(self) -> list[str]:
    return self.names.decode().split('\0')

  def fingerprint(self) -> str:
    """SHA-256 of names and contents; times have no part in it."""
    digest = hashlib.sha256(self.names)
    digest.update(self.digests.tobytes())
    return digest.hexdigest()

  def require(self, index: int, record: Record, content: bytes) -> None:
    """Raises ConfigError if the picture of sample number `index` is not the one that was prepared."""
    if len(content) != self.sizes[index] or hashlib.sha256(content).digest() != self.digests[index].tobytes():
      raise ConfigError(
        f'sample {record.id}: image {printable(record.image_path)} is not the one that was prepared (other content, '
        f'{len(content):,} bytes now, {self.sizes[index]:,} then); {REMEDY}'
      )


def of_records(records: Sequence[Record], root: Given, allow_outside: bool) -> Pictures:
  """The table of some records; DataError for a picture that cannot be read."""
  sizes, times = np.zeros((2, len(records)), np.int64)
  digests = np.zeros((len(records), 32), np.uint8)
  for i, record in enumerate(records):
    if record.image_path:
      content = read_image(record.id, record.image_path, root, allow_outside)
      digests[i] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
      sizes[i], times[i] = len(content), (root / record.image_path).stat().st_mtime_ns if is_local(root) else 0
  return Pictures('\0'.join(r.image_path for r in records).encode(), sizes, times, digests)


def joined(parts: Iterable[Pictures]) -> Pictures:
  """Tables one after another."""
  names, *arrays = zip(*((p.names, p.sizes, p.times, p.digests) for p in parts))
  return Pictures(b'\0'.join(names), *map(np.concatenate, arrays))


def to_bytes(pictures: Pictures) -> bytes:
  """The content of a table's file."""
  out = io.BytesIO()
  fields = {f.name: getattr(pictures, f.name) for f in dataclasses.fields(pictures)}
  np.savez_compressed(out, **fields | {'names': np.frombuffer(pictures.names, np.uint8)})
  return out.getvalue()


def from_file(path: pathlib.Path, sha256: str = '') -> Pictures:
  """Reads a table. ValueError if it is not one, or has another digest than `sha256`; OSError."""
  content = read_regular(path, LARGEST)
  if sha256 and hashlib.sha256(content).hexdigest() != sha256:
    raise ValueError('its digest is not the one that was noted')
  try:
    with np.load(io.BytesIO(content)) as stored:
      arrays = dict(stored)
    return Pictures(arrays.pop('names').tobytes(), **arrays)
  except Exception as e:  # zipfile, zlib and numpy each have their own
    raise ValueError(f'no table of pictures ({type(e).__name__})') from None


def of_folder(folder: pathlib.Path, sha256: str) -> Pictures:
  """The table of a prepared folder; ConfigError if it is damaged."""
  try:
    return from_file(folder / PICTURES_FILE, sha256)
  except OSError as e:
    raise damaged(folder, PICTURES_FILE, e.strerror) from None
  except ValueError as e:
    raise damaged(folder, PICTURES_FILE, str(e)) from None


def check(pictures: Pictures, root: Given, where: str) -> None:
  """Compares the files below `root` with the table. Of object stores nothing is asked: each file is compared when it is read.

  Raises:
    ConfigError: files are missing or are others; names some. `where`: the config field of `root`.
  """
  if not is_local(root):
    return
  rows = {path: i for i, path in enumerate(pictures.paths) if path}
  with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
    found = dict(zip(rows, pool.map(lambda path: _stat(root / path), rows, chunksize=256)))
    wrong = {}
    for path, (size, _) in found.items():
      if size is None:
        wrong[path] = 'missing'
      elif size != pictures.sizes[rows[path]]:
        wrong[path] = f'{size:,} bytes, {pictures.sizes[rows[path]]:,} were prepared'
    touched = [path for path, (_, time) in found.items() if path not in wrong and time != pictures.times[rows[path]]]
    every = max(1, -(-sum(found[path][0] for path in touched) // READ))
    sampled = touched[::every]
    digests = pool.map(lambda path: _sha256(root / path), sampled)
    wrong |= {path: 'other content' for path, digest in zip(sampled, digests) if digest != pictures.digests[rows[path]].tobytes()}
  if wrong:
    some = ', '.join(f'{printable(path)} ({why})' for path, why in list(wrong.items())[:NAMED])
    raise ConfigError(
      f'{where}: {len(wrong):,} of {len(rows):,} pictures in {root} are not those that were prepared: {some}; {REMEDY}'
    )


def _stat(path: pathlib.Path) -> tuple[int | None, int]:
  """(bytes, None if there is no such file; time of the last change in ns)."""
  try:
    found = path.stat()
  except OSError:
    return None, 0
  return found.st_size, found.st_mtime_ns


def _sha256(path: pathlib.Path) -> bytes:
  try:
    return hashlib.sha256(read_regular(path)).digest()
  except OSError:
    return b''
