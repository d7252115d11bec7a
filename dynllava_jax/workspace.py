"""A folder of an object store that a program fills: it works on the local disk, and what it wrote is uploaded.

Objects appear whole, folders do not. So the files that say that others are whole (`MARKERS`) are uploaded after all others, and
deleted before them; what is read passes over what has no marker yet. A store has no locks either: who fills a folder holds a lease,
an object with an owner and a time that is renewed while the program runs (`lease`).

What is on the local disk while the program runs is in the cache (`remote`), and is removed when all of it is uploaded.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from dynllava_jax import paths, remote
from dynllava_jax.lease import LEASE, Lease, lease, started
from dynllava_jax.locks import BusyError
from dynllava_jax.paths import Given
from dynllava_jax.remote import StoreError

PERIOD = 10.0  # seconds between uploads
LOOKS = 20  # at a folder, until two of them find the same names
SMALL = 8 * 2**20  # bytes; files up to this size are compared by content before they are uploaded again
# What says that other files are whole, in the order in which it is uploaded.
MARKERS = ('integrity.json', 'features.json', 'run.json', 'metrics.jsonl', 'config.json', 'model.json', 'dataset_info.json')
# Hidden names that are no temporary ones: what an interrupted preparation goes on with, and files of zarr.
KEPT = ('.unfinished', '.zarray', '.zattrs', '.zgroup')
Name = str  # of a file, relative to the folder


@dataclasses.dataclass(frozen=True)
class _File:
  size: int
  time: int
  sha256: str  # '' for what is not small


@contextlib.contextmanager
def workspace(
  path: Given,
  flag: str,
  *,
  wanted: Callable[[Name], bool] = lambda name: True,
  stub: Callable[[Name], bool] = lambda name: False,
  at_once: bool = False,
) -> Iterator[pathlib.Path]:
  """The folder to work in: a local path itself, of a store a local one that is uploaded while the block runs and when it ends.

  Args:
    path: what the user gave.
    flag: what named it, such as '--out'.
    wanted: which of the files there the program needs to see.
    stub: which of these it needs only to know of; they are empty files of the right size.
    at_once: upload only when the block has ended without an error.

  Raises:
    StoreError: the store cannot be read or written. BusyError: another program fills the folder.
  """
  if paths.is_local(path):
    yield path
    return
  own = _own_folder()
  local = paths.place(path, own)
  try:
    with lease(path, flag) as held:
      local.mkdir(parents=True)
      folder = _Mirror(path, local, held)
      folder.fill(wanted, stub)
      with folder.uploading(at_once):
        yield local
      folder.finish()
  finally:
    shutil.rmtree(paths.cache() / own, ignore_errors=True)


@contextlib.contextmanager
def copied(path: Given, wanted: Callable[[Name], bool] = lambda name: True) -> Iterator[pathlib.Path]:
  """A copy of a store's folder for as long as the block runs; what is changed in it stays here. Arguments as of `workspace`.

  Raises:
    StoreError: the store cannot be read.
  """
  own = _own_folder()
  local = paths.place(path, own)
  try:
    local.mkdir(parents=True)
    remote.fetch_all(path, {n: o for n, o in remote.listing(path).items() if n != LEASE and wanted(n)}, local)
    yield local
  finally:
    shutil.rmtree(paths.cache() / own, ignore_errors=True)


def _own_folder() -> str:
  """A folder of this process in the cache; those of processes that are gone are removed."""
  for left in paths.cache().glob('work/*.*'):
    process, _, began = left.name.partition('.')
    if process.isdigit() and started(int(process)) != began:
      shutil.rmtree(left, ignore_errors=True)
  return f'work/{os.getpid()}.{started(os.getpid())}'


class _Mirror:
  """Local files and what of them is in the store."""

  def __init__(self, path: Given, local: pathlib.Path, held: Lease):
    self.path, self.local, self.held = path, local, held
    self.fs, self.url = remote.store(path)
    self.there: dict[Name, _File | None] = {}  # None: in the store, in whatever state
    self.stop = threading.Event()

  def fill(self, wanted: Callable[[Name], bool], stub: Callable[[Name], bool]) -> None:
    """Brings what the program needs to see; what an upload left half done goes."""
    objects = {n: o for n, o in remote.listing(self.path).items() if n != LEASE and wanted(n)}
    if remote.UPLOADING in objects:
      with remote.readable(self.url):
        begun = json.loads(self.fs.cat_file(f'{self.url}/{remote.UPLOADING}'))
      self._delete([n for n in begun if n in objects])
      self._delete([remote.UPLOADING])
      objects = {n: o for n, o in objects.items() if n not in begun and n != remote.UPLOADING}
    self._delete(sorted(objects.keys() - remote.whole(objects)))
    objects = {n: o for n, o in objects.items() if n in remote.whole(objects)}
    remote.fetch_all(self.path, {n: o for n, o in objects.items() if not stub(n)}, self.local)
    for name, info in objects.items():
      if stub(name):
        (self.local / name).parent.mkdir(parents=True, exist_ok=True)
        with open(self.local / name, 'wb') as file:
          file.truncate(info['size'])
      self.there[name] = self._file(name)

  @contextlib.contextmanager
  def uploading(self, at_once: bool) -> Iterator[None]:
    """Uploads every few seconds while the block runs, and when it ends in an error; at once: only lists what will come."""
    if at_once:
      yield
      self._list_upload()
      return
    thread = threading.Thread(target=self._work, daemon=True)
    thread.start()
    try:
      yield
    except BaseException:
      self.stop.set()
      if not self.held.lost:  # else the thread may be waiting for a store that does not answer
        with self._keeping():
          thread.join()
      try:
        self.finish()
      except OSError as e:
        print(e, file=sys.stderr)
      raise
    self.stop.set()
    with self._keeping():
      thread.join()

  def _work(self) -> None:
    while not self.stop.wait(PERIOD):
      try:
        self.sync()
      except BusyError:
        return  # the lease was lost: nothing of ours may go there any more
      except OSError as e:
        print(f'{self.url}: cannot be uploaded to ({e}); trying again', file=sys.stderr)

  def finish(self) -> None:
    """The last upload; if it fails, what is here is kept and the error says where."""
    with self._keeping():
      self.sync()

  @contextlib.contextmanager
  def _keeping(self) -> Iterator[None]:
    """What is not uploaded when the block fails, or is interrupted, is put where it stays."""
    try:
      yield
    except (OSError, KeyboardInterrupt) as e:
      kept = paths.cache() / 'kept' / f'{self.local.name}.{time.time_ns()}'
      kept.parent.mkdir(exist_ok=True)
      os.replace(self.local, kept)
      where = f'what is not uploaded is in {kept}'
      if isinstance(e, KeyboardInterrupt):
        raise KeyboardInterrupt(*e.args, where) from None
      raise StoreError(f'{e}; {where}') from None

  def sync(self) -> None:
    """Makes the store what the folder is. StoreError, BusyError: it cannot be, or not by this process any more."""
    self.held.check()
    now = self._settled()
    changed = [n for n, f in now.items() if self._differs(n, f)]
    gone = [n for n in self.there if n not in now and n != remote.UPLOADING]
    overwritten = [n for n in changed if n in self.there and not _is_marker(n)]
    steps = [n for n in (*changed, *gone) if _is_step_marker(n) and n in self.there]
    void = [n for n in steps if _covers(n, overwritten)]
    self._delete(void)  # while files of a step are replaced, nothing says that it is whole
    data, markers = [n for n in changed if not _is_marker(n)], [n for n in changed if _is_marker(n)]
    left = set()
    for some in ([n for n in data if _is_note(n)], [n for n in data if not _is_note(n)]):
      with contextlib.closing(remote.Pool()) as pool:
        left |= {n for n, there in zip(some, pool.map(self._upload, some)) if not there}  # a step may go while it is uploaded
      if any(_is_note(n) for n in left):  # what it told of must not come without it; the next look finds what came instead
        return
    for name in sorted(markers, key=lambda n: (MARKERS.index(n.rpartition('/')[2]), n)):
      if not _covers(name, left):
        self._upload(name)
    if not any(n in now and _is_step_marker(n) for n in self.there):  # an older step stays until a newer one is there
      gone = [n for n in gone if not _step(n)]
    self._delete([n for n in gone if _is_marker(n) and n not in void])
    self._delete(sorted((n for n in gone if not _is_marker(n)), key=_is_note))
    if not left and remote.UPLOADING in self.there:
      self._delete([remote.UPLOADING])

  def _list_upload(self) -> None:
    names = [n for n, f in self._scan().items() if self._differs(n, f)]
    remote.write(self.path / remote.UPLOADING, json.dumps(names).encode())
    self.there[remote.UPLOADING] = None

  def _settled(self) -> dict[Name, os.stat_result]:
    """The files at one moment: else something is seen to be gone, and what came in its place is not."""
    now = self._scan()
    for _ in range(LOOKS):
      before, now = now, self._scan()
      if before.keys() == now.keys():
        break
    return now

  def _scan(self) -> dict[Name, os.stat_result]:
    found = {}
    for folder, folders, files in os.walk(self.local):
      folders[:] = [f for f in folders if not _is_temporary(f)]
      for file in files:
        file_path = pathlib.Path(folder, file)
        if not _is_temporary(file) and not file_path.is_symlink():
          with contextlib.suppress(FileNotFoundError):
            found[file_path.relative_to(self.local).as_posix()] = file_path.stat()
    return found

  def _differs(self, name: Name, now: os.stat_result) -> bool:
    known = self.there.get(name)
    if known is None or now.st_size != known.size:
      return True
    if now.st_mtime_ns == known.time:
      return False
    return not known.sha256 or known.sha256 != _sha256(self.local / name)

  def _file(self, name: Name) -> _File:
    found = (self.local / name).stat()
    return _File(found.st_size, found.st_mtime_ns, _sha256(self.local / name) if found.st_size <= SMALL else '')

  def _upload(self, name: Name) -> bool:
    """Uploads one file; whether it was still there."""
    self.held.check()
    local, url = self.local / name, f'{self.url}/{name}'
    try:
      before = local.stat()
      if before.st_size <= remote.WHOLE_BYTES:  # it may be growing: what was read is what is known to be there
        content = local.read_bytes()
        known = _File(len(content), before.st_mtime_ns, hashlib.sha256(content).hexdigest() if len(content) <= SMALL else '')
      else:
        content, known = None, _File(before.st_size, before.st_mtime_ns, '')
      with remote.readable(url):
        remote.put(self.fs, url, local if content is None else content)
    except FileNotFoundError:
      self.there.setdefault(name, None)  # perhaps begun
      return False
    self.there[name] = known
    return True

  def _delete(self, names: Iterable[Name]) -> None:
    for name in names:
      url = f'{self.url}/{name}'
      with contextlib.suppress(FileNotFoundError), remote.readable(url):
        self.fs.rm_file(url)
      self.there.pop(name, None)


def _sha256(path: pathlib.Path) -> str:
  with contextlib.suppress(OSError), path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
  return ''


def _is_marker(name: Name) -> bool:
  return name.rpartition('/')[2] in MARKERS


def _is_note(name: Name) -> bool:
  """Whether a file tells whose other files are, as the notes of an unfinished preparation do: there first, and gone last."""
  return '.unfinished' in name.split('/')[:-1]


def _is_step_marker(name: Name) -> bool:
  return name.rpartition('/')[2] == remote.STEP_MARKER


def _step(name: Name) -> str:
  """The folder of the checkpoint step that a file lies in, '' if in none: the name of a step is a number."""
  parts = name.split('/')
  return next(('/'.join(parts[: i + 1]) for i in range(len(parts) - 1) if parts[i].isdigit()), '')


def _covers(marker: Name, names: Iterable[Name]) -> bool:
  """Whether a marker speaks of one of the files: of what is in its folder or below it. Steps have markers of their own."""
  folder = marker.rpartition('/')[0]
  return any((not folder or n.startswith(f'{folder}/')) and _step(n) == _step(marker) for n in names)


def _is_temporary(name: str) -> bool:
  return (name.startswith('.') and name not in KEPT) or name.endswith('.tmp') or '.orbax-checkpoint-tmp' in name
