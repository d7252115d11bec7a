"""What a user writes as a path, to a path: the one place for flags, arguments and config fields of all programs.

    ~/runs/a   runs/[1] 50%/   'a b'      pathlib.Path: `~` expanded, every other character taken as it is
    gs://bucket/run   s3://bucket/run     etils.epath.Path, see `remote` for how the programs read and fill such folders

What cannot work is refused before anything is imported, read or made.
"""

import functools
import importlib.util
import os
import pathlib
import re
import unicodedata
from typing import Any

CACHE = 'DYNLLAVA_JAX_CACHE'  # environment variable: where files of object stores lie on this machine, see `remote`
COMPILED = 'DYNLLAVA_JAX_COMPILATION_CACHE'  # environment variable: where compiled programs are kept, see `compilation`
OFF = 'off'  # its value, or that of the flag, that keeps none
STORES = {'gs': 'gcsfs', 's3': 's3fs'}  # scheme -> package that speaks it
SHIPPED = ('configs/', 'examples/')  # what comes with the project besides the package
LONGEST_NAME = 200  # bytes; file systems take 255, and temporary names add to a name
LONGEST_PATH = 3800  # bytes; the system takes 4096, and programs add names below it
_SCHEME = re.compile(r'([A-Za-z][A-Za-z0-9+.-]+):(/|$)')
Given = Any  # pathlib.Path, or etils.epath.Path for an object store; importing the latter takes a tenth of a second


class PathError(OSError):
  """A path that no program can use; the message says where it was given, why, and what to write."""


def given(text: str, where: str) -> Given:
  """The path that a user wrote.

  Args:
    text: what was written.
    where: the flag, argument or config field, for messages.

  Raises:
    PathError: empty, too long, not printable, of an unknown user, or of a store that is not supported or whose package is missing.
  """
  text = expanded(text, where)
  return _of_store(text) if is_url(text) else pathlib.Path(text)


def given_compiled(text: str, where: str) -> pathlib.Path | None:
  """The folder where a user wants compiled programs kept, None for `off`; PathError as for `given`, or if it is a store's."""
  if text == OFF:
    return None
  if not is_local(path := given(text, where)):
    raise PathError(f'{where}: {text}: compiled programs are kept on this machine; give a folder of it, or {OFF}')
  return path.absolute()


def expanded(text: str, where: str) -> str:
  """The text of a path, checked, with `~`, `..` and the slashes at its end resolved; PathError as for `given`."""
  if not text.strip():
    raise PathError(f'{where}: is empty; give a path, or leave it out')
  if strange := next((c for c in text if unicodedata.category(c) in ('Cc', 'Cs')), None):
    raise PathError(f'{where}: {text!a} holds the character {strange!a}, which no path here may; rename it')
  scheme = _SCHEME.match(text)
  return _checked_url(text, scheme[1], where) if scheme else _checked_local(text, where)


def shipped(text: str) -> str:
  """A path below configs/ or examples/: if the current folder has none, that of the checkout or the installation."""
  if text.startswith(SHIPPED) and not os.path.exists(text):
    package = pathlib.Path(__file__).parent
    for root in (package, package.parent):
      if (root / text).exists():
        return str(root / text)
  return text


def is_url(text: str) -> bool:
  """Whether a checked text names something in an object store."""
  return text.startswith(tuple(f'{scheme}://' for scheme in STORES))


def is_local(path: Given) -> bool:
  """Whether a given path is on this machine."""
  return isinstance(path, pathlib.Path)


def cache() -> pathlib.Path:
  """Where files of object stores lie on this machine; PathError as for `given`, or if the user has no home and names no place."""
  if text := os.environ.get(CACHE):
    if not is_local(path := given(text, CACHE)):
      raise PathError(f'{CACHE}: {text}: the cache is kept on this machine; give a folder of it')
    return path.absolute()
  try:
    return pathlib.Path('~/.cache/dynllava_jax').expanduser().absolute()
  except RuntimeError:
    raise PathError(f'this user has no home folder; set HOME, or {CACHE} to a folder that can be written') from None


def place(path: Given, kind: str) -> pathlib.Path:
  """Where something of a store lies in the cache. `kind`: 'read', or the folder of a process in 'work'."""
  scheme, _, key = os.fspath(path).partition('://')
  return cache() / kind / scheme / key


def named(text: Any) -> str:
  """Text for people in which places of the cache have their names in the store."""
  text = str(text)
  try:
    root = str(cache())
  except PathError:  # then nothing of a store is here
    return text
  return re.sub(re.escape(root) + r'/(?:read|shards|work/[\w.]+)/(\w+)/', r'\1://', text) if root in text else text


def overlap(a: Given, b: Given) -> bool:
  """Whether one of two paths of a store is, or lies in, the other; local ones are compared by who knows of links."""
  return not is_local(a) and not is_local(b) and (a.is_relative_to(b) or b.is_relative_to(a))


def origin(path: pathlib.Path) -> Given | None:
  """What a place of the cache is a copy of; None of any other path."""
  text = named(path)
  return _of_store(text) if is_url(text) else None


@functools.cache
def _of_store(url: str) -> Given:
  # Else gcsfs asks every bucket for its kind through another client.
  os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  from etils import epath

  return epath.Path(url)


def _checked_url(text: str, scheme: str, where: str) -> str:
  known = ' and '.join(f'{s}://' for s in STORES)
  if scheme not in STORES:
    raise PathError(
      f'{where}: {text}: {scheme}: is not supported; give a path on this machine ({known} work too; ./{scheme}: is a folder)'
    )
  bucket, *names = text.removeprefix(f'{scheme}:').removeprefix('//').rstrip('/').split('/')
  if not text.startswith(f'{scheme}://') or not bucket:
    raise PathError(f'{where}: {text}: names no bucket; expected {scheme}://BUCKET/NAME')
  if not all(names) or {'.', '..'} & set(names):
    raise PathError(f'{where}: {text}: has an empty name, . or .. in it, which object stores do not resolve; write it without')
  _check_length(pathlib.PurePosixPath(bucket, *names), text, where)
  if importlib.util.find_spec(STORES[scheme]) is None:
    raise PathError(f'{where}: {scheme}:// needs the package {STORES[scheme]}; pip install -r requirements-cloud.txt')
  return '/'.join((f'{scheme}:/', bucket, *names))


def _checked_local(text: str, where: str) -> str:
  try:
    path = pathlib.Path(text).expanduser()
  except RuntimeError:
    who = 'this user has no home folder' if text.split('/')[0] == '~' else 'there is no such user'
    raise PathError(f'{where}: {text}: {who}; write ./~name for a folder of that name') from None
  try:
    whole = os.path.abspath(path)
  except FileNotFoundError:
    raise PathError(f'{where}: {text}: the current folder was removed; go to another one') from None
  _check_length(pathlib.Path(whole), text, where)
  return os.path.realpath(path) if '..' in path.parts else str(path)  # tensorstore, and so Orbax, takes no `..`


def _check_length(path: pathlib.PurePath, text: str, where: str) -> None:
  longest = max(map(os.fsencode, path.parts), key=len, default=b'')
  if len(longest) > LONGEST_NAME:
    raise PathError(f'{where}: {text[:60]}...: a name in it has {len(longest)} bytes, at most {LONGEST_NAME} work here')
  if len(os.fsencode(path)) > LONGEST_PATH:
    raise PathError(f'{where}: {text[:60]}...: has {len(os.fsencode(path))} bytes, at most {LONGEST_PATH} work here')
