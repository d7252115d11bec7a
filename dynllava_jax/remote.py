"""Object stores (gs://, s3://): what is read comes to the local disk first, in a cache that knows the store's versions.

Libraries that map, seek and rename (ArrayRecord, safetensors, Orbax over s3) need files, so there is one mechanism for all of them:
a file of a store is fetched whole and checked against its size; its modification time here is a digest of the store's version of
it, so it is fetched anew when it changed there. `workspace` is the other direction. A path on this machine is returned as it is.

    $DYNLLAVA_JAX_CACHE, else ~/.cache/dynllava_jax
      read/gs/BUCKET/KEY            what was read; may be deleted at any time
      work/PROCESS/gs/BUCKET/KEY    what a program is filling, until it is uploaded
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dynllava_jax import paths
from dynllava_jax.display import Terminal
from dynllava_jax.paths import Given
from dynllava_jax.progress import progress

AT_ONCE = 16  # objects on their way
SILENCE = 60.0  # seconds without a byte, after which a request is tried again, a few times
LONGEST = 3600.0  # seconds of one request, however slowly it goes on
WHOLE_BYTES = 64 * 2**20  # larger objects go up in parts; the store shows them when all parts are there
FRAME = b'--==0=='  # of gcsfs, see `put`
VERSION = ('etag', 'ETag', 'generation', 'md5Hash', 'LastModified', 'mtime', 'updated', 'size')
UPLOADING = '.uploading'  # lists what an upload that happens at once writes, until all of it is there
STEP_MARKER, CHECKPOINT_MARKER = 'integrity.json', 'model.json'  # of a step, and of the folder of steps: see `checkpoint`
Name = str  # of an object, relative to a folder


class StoreError(OSError):
  """What an object store, or the way to it, refused; the message names the object."""


@functools.cache
def filesystem(scheme: str) -> Any:
  """The fsspec file system of a scheme."""
  import fsspec

  limits = {}
  if scheme == 'gs':  # gcsfs waits for ever if it is not told; s3fs gives up after 15 s of silence
    import aiohttp

    limits = {'requests_timeout': aiohttp.ClientTimeout(total=LONGEST, sock_connect=SILENCE, sock_read=SILENCE)}
  # Nothing is cached: other machines write there too.
  return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **limits)


def store(path: Given) -> tuple[Any, str]:
  """(fsspec file system, URL) of something in a store."""
  url = os.fspath(path)
  return filesystem(url.partition('://')[0]), url


@contextlib.contextmanager
def readable(url: str) -> Iterator[None]:
  """What a store's client raises becomes a StoreError about `url`, its missing objects FileNotFoundError."""
  try:
    yield
  except (StoreError, FileNotFoundError):
    raise
  except Exception as e:  # each client has its own types
    why = ' '.join(str(e).split()) or type(e).__name__
    raise StoreError(f'{url}: {why[:300]}') from None


def listing(path: Given) -> dict[str, Mapping[str, Any]]:
  """What the store says of every object below a folder, by its name below it."""
  fs, url = store(path)
  root = url.partition('://')[2] + '/'
  with readable(url):
    found = fs.find(url + '/', detail=True)
  return {key.removeprefix(root): info for key, info in found.items() if key.startswith(root) and not key.endswith('/')}


def opened(path: Given) -> pathlib.Path:
  """The place in the cache of a store's folder, nothing fetched yet; a local path itself."""
  if paths.is_local(path):
    return path
  fs, url = store(path)
  with readable(url):
    there = fs.isdir(url)
  local = paths.place(path, 'read')
  if there:
    local.mkdir(parents=True, exist_ok=True)
  return local


def here(path: pathlib.Path) -> pathlib.Path:
  """A path on this machine, brought up to date first if it lies in a folder that was `opened` in a store."""
  origin = paths.origin(path)
  if origin is not None:
    fetched(origin)
  return path


def fetch_alone(folder: Given, name: Name, info: Mapping[str, Any], local: pathlib.Path) -> None:
  """As `fetch`, one process at a time; notes the time of use, by which a bounded cache decides what goes."""
  with _alone(local):
    fetch(folder, name, info, local)
    os.utime(local, ns=(time.time_ns(), local.stat().st_mtime_ns))


def whole(names: Iterable[Name]) -> set[Name]:
  """Those names that are not part of a checkpoint step that lacks its marker."""
  names = set(names)
  roots = {n.removesuffix(CHECKPOINT_MARKER) for n in names if n.rpartition('/')[2] == CHECKPOINT_MARKER}
  return {n for n in names if all(s + STEP_MARKER in names for s in _steps_of(n, roots))}


def of_step(names: Iterable[Name], step: int | None = None) -> set[Name]:
  """Of a checkpoint folder's names, those of one whole step, the newest if none is given, and of no step; of other folders all."""
  names = set(names)
  if CHECKPOINT_MARKER not in names:
    return names
  in_steps = {n for n in names if _steps_of(n, {''})}
  of = {n: int(n.partition('/')[0]) for n in whole(names) & in_steps}
  step = max(of.values(), default=None) if step is None else step
  return {n for n in names if n not in in_steps or (n in of and of[n] == step)}


def _steps_of(name: Name, roots: set[str]) -> list[str]:
  """Checkpoint steps, as folders with a slash, that a file lies in."""
  parts = name.split('/')
  places = (('/'.join(parts[:i]) + '/' * (i > 0), parts[i]) for i in range(len(parts) - 1))
  return [f'{root}{folder}/' for root, folder in places if root in roots and folder.isdigit()]


def fetched(path: Given, wanted: Callable[[Iterable[Name]], set[Name]] = of_step) -> pathlib.Path:
  """A file or folder on this machine: itself, or its copy in the cache. What is not there is not there either.

  Args:
    path: a given path.
    wanted: of a folder's names, those that are needed; all but the older steps of a checkpoint if not given.

  Raises:
    StoreError: the store cannot be read.
  """
  if paths.is_local(path):
    return path
  fs, url = store(path)
  local = paths.place(path, 'read')
  with readable(url), _alone(local):
    if fs.isfile(url):
      return fetch(path, '', fs.info(url), local)
    objects = listing(path)
    if UPLOADING in objects:
      raise StoreError(f'{url}: its upload was interrupted; start the program that writes it again')
    if local.is_file():
      local.unlink()
    names = wanted(objects)
    for file in [p for p in local.rglob('*') if p.is_file() and p.relative_to(local).as_posix() not in names]:
      file.unlink()
    fetch_all(path, {n: objects[n] for n in objects if n in names}, local)
  return local


def fetch_all(path: Given, objects: Mapping[str, Mapping[str, Any]], local: pathlib.Path) -> None:
  """Fetches objects below a folder, some at once."""
  todo = {n: o for n, o in objects.items() if not _is_version(local / n, o)}
  if not todo:
    return
  title = f'fetching {os.fspath(path)}'
  with (
    progress(Terminal(stderr=True), title, sum(o['size'] for o in todo.values()), in_bytes=True) as advance,
    contextlib.closing(Pool()) as pool,
  ):
    for size in pool.map(lambda n: fetch(path, n, todo[n], local / n).stat().st_size, todo):
      advance(size)


def fetch(path: Given, name: str, info: Mapping[str, Any], local: pathlib.Path) -> pathlib.Path:
  """Fetches one object, whole or not at all, unless this version of it is here."""
  if _is_version(local, info):
    return local
  fs, url = store(path)
  url = f'{url}/{name}' if name else url
  local.parent.mkdir(parents=True, exist_ok=True)
  if local.is_dir():
    shutil.rmtree(local)
  temporary = local.with_name(f'.{local.name[:180]}.{os.getpid()}.tmp')
  try:
    with readable(url):
      fs.get_file(url, str(temporary))
    size = temporary.stat().st_size
    if size != info['size']:
      raise StoreError(f'{url}: {size} bytes came of {info["size"]}; start again')
    os.utime(temporary, ns=(temporary.stat().st_atime_ns, _version(info)))
    os.replace(temporary, local)
  finally:
    temporary.unlink(missing_ok=True)
  return local


def _version(info: Mapping[str, Any]) -> int:
  """What a store says of an object's version, as a time in nanoseconds that a file system can hold."""
  stated = json.dumps([str(info.get(k)) for k in VERSION])
  return int.from_bytes(hashlib.sha256(stated.encode()).digest()[:7], 'big') // 1000 * 1000


def _is_version(local: pathlib.Path, info: Mapping[str, Any]) -> bool:
  try:
    found = local.stat()
  except (FileNotFoundError, NotADirectoryError):
    return False
  return found.st_size == info['size'] and found.st_mtime_ns == _version(info)


def write(path: Given, content: bytes) -> None:
  """Puts one whole object into a store."""
  fs, url = store(path)
  with readable(url):
    put(fs, url, content)


def put(fs: Any, url: str, content: bytes | pathlib.Path) -> None:
  """Puts the content, or that of a file, into a store, and compares what Google's says that it has; errors are the client's."""
  google = url.startswith('gs:')
  if isinstance(content, pathlib.Path):
    fs.put_file(str(content), url, **({'consistency': 'size'} if google else {}))
    return
  how = {'consistency': 'md5'} if google else {}
  # gcsfs frames what it sends at once between line feeds and a mark. A carriage return at the end is then part of a line break, and
  # lost, and so is all after a mark. What goes in parts has no frame.
  if google and (content.endswith(b'\r') or FRAME in content):
    how['chunksize'] = len(content)
  fs.pipe_file(url, content, **how)


def keep(path: pathlib.Path) -> None:
  """Puts a file that was made in a copy of a store's folder into the store too, if that may be written to."""
  origin = paths.origin(path)
  if origin is not None:
    with contextlib.suppress(StoreError):
      write(origin, path.read_bytes())


class Pool(concurrent.futures.ThreadPoolExecutor):
  """Threads for transfers; what has not begun when it is closed is dropped."""

  def __init__(self):
    super().__init__(AT_ONCE)

  def close(self) -> None:
    self.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _alone(local: pathlib.Path) -> Iterator[None]:
  """One process at a time fetches the same thing; the others wait and find it there."""
  locks = paths.cache() / 'locks'
  locks.mkdir(parents=True, exist_ok=True)
  with open(locks / hashlib.sha256(str(local).encode()).hexdigest(), 'w') as handle:
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
