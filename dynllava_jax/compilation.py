"""Compiled programs kept on disk, so that a program that runs again starts without compiling: jax's own cache, on by default.

It lies in `compiled` of the user's cache folder (`paths.cache`); `DYNLLAVA_JAX_COMPILATION_CACHE` or `--compilation_cache` name
another one, and `off` keeps none. A cache that the user has set up with jax is left as it is. Processes share it: jax locks it, and
what was not used for longest goes when it is full. What cannot be read from it or written to it, as on a full disk, is compiled.
"""

import functools
import hashlib
import os
import pathlib
import platform
import warnings

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from dynllava_jax import paths

AT_MOST = 2**30  # bytes, of one kind of machine
LOCK, PROGRAM, USED = '.lockfile', '-cache', '-atime'  # names that jax gives: its lock, a program, and when it was used last


@functools.cache
def keep() -> pathlib.Path | None:
  """Turns the cache on for this process: the folder it uses, None if it is off, the user's own, or cannot be written."""
  warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')  # nothing is lost but time
  text = os.environ.get(paths.COMPILED)
  if jax.config.jax_compilation_cache_dir or text == paths.OFF:
    return None
  given = paths.given_compiled(text, paths.COMPILED) if text else None
  try:
    folder = (given or paths.cache() / 'compiled') / _machine()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(folder)
  except OSError as e:  # also a lock that others hold for too long
    if not text:
      return None
    why = e.strerror or e
    raise paths.PathError(f'{paths.COMPILED}={text}: cannot be written ({why}); choose another folder, or {paths.OFF}') from None
  jax.config.update('jax_compilation_cache_max_size', AT_MOST)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  jax.config.update('jax_compilation_cache_dir', str(folder))
  compilation_cache.reset_cache()  # it may have been asked for already, and found to be off
  return folder


def _machine() -> str:
  """A name of what programs for the CPU are compiled for: one folder may serve machines of several kinds."""
  try:
    flags = next(
      (line for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines() if line.startswith(('flags', 'Features'))), ''
    )
  except OSError:
    flags = platform.processor()
  return f'{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}'


def _remove_unfinished(folder: pathlib.Path) -> None:
  """Removes what a process left that ended while it wrote; with it jax could neither read that program nor make room."""
  with filelock.FileLock(folder / LOCK, timeout=10):
    for program in folder.glob(f'*{PROGRAM}'):
      used = program.with_name(program.name.removesuffix(PROGRAM) + USED)
      if not used.exists() or used.stat().st_size != 8:
        program.unlink()
        used.unlink(missing_ok=True)
