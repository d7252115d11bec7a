"""Reading and writing files: small ones replaced whole or not at all, large arrays past the page cache.

What is read or written once gains nothing from the cache: copying it there costs several times the rest, and what is read back to
be compared would come from memory instead of the disk.
"""

import codecs
import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import re
import stat
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from dynllava_jax import paths, remote
from dynllava_jax.paths import Given

DIRECT = getattr(os, 'O_DIRECT', 0)  # macOS has none
SECTOR = 4096  # bytes; place and size of what goes past the cache, in file and memory, are multiples of a disk's sector
BLOCK = 2**22  # bytes written or compared at a time
SAMPLED_FROM = 2**22  # bytes; smaller files are digested whole
SAMPLES = 16  # places of a file that are at least sampled
STRIDE = 2**24  # bytes from one sampled place to the next, at most
TEMPORARY = '.tmp'  # how the name of a file ends that is being written
OWN_TEMPORARY = re.compile(rf'\..+\.\d+{re.escape(TEMPORARY)}', re.S)  # with a number before it
LARGEST = 2**30  # bytes of a file that is read whole, and that no program here writes so large
SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")  # in what tensorstore says of a file that it cannot write
STORE_ERROR = re.compile(r'[A-Z]+(_[A-Z]+)*: ')  # how it begins, with absl's name of the kind
ENCODINGS = (  # by byte order mark; of UTF-32 before UTF-16, whose mark it begins with
  (codecs.BOM_UTF8, 'utf-8-sig'),
  (codecs.BOM_UTF32_LE, 'utf-32'),
  (codecs.BOM_UTF32_BE, 'utf-32'),
  (codecs.BOM_UTF16_LE, 'utf-16'),
  (codecs.BOM_UTF16_BE, 'utf-16'),
)
AT_MOST = 2**30  # bytes read at a time; macOS refuses 2**31


def write_atomically(path: Given, content: bytes) -> None:
  """Writes to a temporary name in the same folder, then renames: an interruption leaves the old file or the new one.

  In an object store (`paths`) it becomes one object, which appears whole.
  """
  if not paths.is_local(path):
    remote.write(path, content)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  number = int.from_bytes(os.urandom(6))  # hosts that share the folder may share a process id
  temporary = path.with_name(f'.{path.name}.{number}{TEMPORARY}')
  try:
    temporary.write_bytes(content)
    os.replace(temporary, path)
  except OSError as e:  # a full disk names no file
    temporary.unlink(missing_ok=True)
    raise OSError(e.errno, e.strerror, str(path)) from None


def sweep(folder: pathlib.Path) -> None:
  """Removes what killed programs left half written in a folder that nobody else fills: files named as by `write_atomically`."""
  for left in folder.glob(f'.*{TEMPORARY}'):
    if OWN_TEMPORARY.fullmatch(left.name) and left.is_file():
      left.unlink(missing_ok=True)


def check_regular(path: pathlib.Path, at_most: int | None = None) -> None:
  """OSError for what is not there, may never end (a pipe, a device) or has more than so many bytes, before anything is read."""
  found = os.stat(path)
  if not stat.S_ISREG(found.st_mode):
    raise OSError(errno.EINVAL, 'it is no regular file', str(path))
  if at_most is not None and found.st_size > at_most:
    raise OSError(errno.EFBIG, f'it has {found.st_size:,} bytes, at most {at_most:,} are read', str(path))


def read_regular(path: pathlib.Path, at_most: int = LARGEST) -> bytes:
  """The content of a file; OSError as `check_regular` says, and if it cannot be read."""
  check_regular(path, at_most)
  return path.read_bytes()


def decoded(content: bytes) -> str:
  """A text file's content: as its byte order mark says, UTF-16 where zeros beside the first two letters tell, else UTF-8.

  Raises:
    UnicodeDecodeError: it is no such text.
  """
  zeros = tuple(byte == 0 for byte in content[:4])
  unmarked = {(False, True, False, True): 'utf-16-le', (True, False, True, False): 'utf-16-be'}.get(zeros, 'utf-8')
  return content.decode(next((name for mark, name in ENCODINGS if content.startswith(mark)), unmarked))


def below(root: pathlib.Path, name: str) -> pathlib.Path:
  """The place of a file that some other file names, relative to a folder.

  Raises:
    ValueError: says why: it lies outside of `root`, by `..`, as an absolute path or through a link; or it is no path at all.
  """
  path = root / name
  if not os.path.realpath(path).startswith(os.path.join(os.path.realpath(root), '')):
    raise ValueError(f'it lies outside of {root}')
  return path


def require_writable(directory: pathlib.Path) -> None:
  """Raises OSError, with the path at fault, if nothing can be written in a directory that may not exist yet. Makes nothing."""
  existing = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
  if not existing.is_dir():
    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
  if os.statvfs(existing).f_flag & os.ST_RDONLY:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(existing))
  if not os.access(existing, os.W_OK | os.X_OK):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))


def reason(error: BaseException | None) -> str:
  """Why something could not be read or written, in a few words; '' if it is no such error."""
  if error is None:
    return ''
  if isinstance(error, OSError):
    return error.strerror or ' '.join(str(error).split())
  if code := SYSTEM_ERROR.search(str(error)):
    return os.strerror(int(code[1]))
  if isinstance(error, BaseExceptionGroup):
    return next(filter(None, map(reason, error.exceptions)), '')
  if isinstance(error, ValueError) and STORE_ERROR.match(str(error)):
    return str(error).partition('[')[0].strip()
  return reason(error.__cause__ or error.__context__)


def write_array(path: pathlib.Path, value: np.ndarray, offset: int = 0) -> None:
  """Writes all bytes of a contiguous array into a file that exists; returns when the disk has them.

  Raises:
    OSError: says why; numpy's `tofile` may lose the end of an array on a full disk without a word.
  """
  data = value.reshape(-1).view(np.uint8)
  place, end = offset, offset + data.size
  block = _aligned(min(BLOCK, data.size))
  with _opened(path, os.O_WRONLY) as cached, _opened(path, os.O_WRONLY | DIRECT) as direct:
    while place < end:
      to_sector, left = -place % SECTOR, end - place
      if to_sector or left < SECTOR:  # part of a sector, at either end
        handle, count = cached, min(to_sector or left, left)
      else:
        handle, count = direct, min(BLOCK, left - left % SECTOR)
      block[:count] = data[place - offset :][:count]
      place += _past_cache(os.pwrite, handle, block[:count].data, place)
    os.fsync(cached)


def read_array(path: pathlib.Path, offset: int, nbytes: int) -> np.ndarray:
  """A part of a file, uint8[nbytes].

  Raises:
    OSError: says why, also if the file ends before that.
  """
  before = offset % SECTOR
  wanted = before + nbytes
  memory = _aligned(wanted + -wanted % SECTOR)
  done = 0
  with _opened(path, os.O_RDONLY | DIRECT) as handle:
    while done < wanted:
      count = _past_cache(os.preadv, handle, [memory[done:][:AT_MOST].data], offset - before + done)
      if not count:
        raise OSError(f'the file ends {offset + nbytes - os.fstat(handle).st_size:,} bytes too early; has it changed?')
      done += count
  return memory[before:wanted]


def is_array(path: pathlib.Path, value: np.ndarray) -> bool:
  """Whether a file holds the bytes of a contiguous array and nothing else; OSError if it cannot be read."""
  expected, done = value.reshape(-1).view(np.uint8), 0
  block = _aligned(min(BLOCK, expected.size + -expected.size % SECTOR))
  with _opened(path, os.O_RDONLY | DIRECT) as handle:
    if os.fstat(handle).st_size != expected.size:
      return False
    while done < expected.size:
      count = _past_cache(os.preadv, handle, [block.data], done)
      if not count or not np.array_equal(block[:count], expected[done : done + count]):
        return False
      done += count
  return True


def sampled_digest(path: pathlib.Path) -> str:
  """SHA-256 of pieces of a file that lie evenly in it, both ends among them; of all of it where it is small. OSError."""
  with _opened(path, os.O_RDONLY) as handle:
    size = os.fstat(handle).st_size
    if size <= SAMPLED_FROM:
      return digest_of(handle, range(0, size, SECTOR))
    count = max(SAMPLES, -(-size // STRIDE))
    return digest_of(handle, (i * (size - SECTOR) // (count - 1) for i in range(count)))


def digest_of(handle: int, places: Iterable[int]) -> str:
  """SHA-256 of the `SECTOR` bytes of an open file at each place."""
  digest = hashlib.sha256()
  for at in places:
    digest.update(os.pread(handle, SECTOR, at))
  return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: pathlib.Path, flags: int) -> Iterator[int]:
  try:
    handle = os.open(path, flags)
  except OSError as e:
    if not (e.errno == errno.EINVAL and flags & DIRECT):
      raise
    handle = os.open(path, flags & ~DIRECT)  # a file system that has nothing but its cache
  try:
    yield handle
  finally:
    os.close(handle)


def _past_cache(call: Callable[..., int], handle: int, *arguments) -> int:
  """A read or write by a handle that is given the cache for good if it cannot do without, as with larger sectors."""
  try:
    return call(handle, *arguments)
  except OSError as e:
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    if not (e.errno == errno.EINVAL and flags & DIRECT):
      raise
    fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~DIRECT)
    return call(handle, *arguments)


def _aligned(nbytes: int) -> np.ndarray:
  memory = np.empty(nbytes + SECTOR, np.uint8)
  return memory[-memory.ctypes.data % SECTOR :][:nbytes]
