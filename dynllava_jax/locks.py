"""Directories that one process at a time may fill: conversion, training, preparation and evaluation keep others out by this.

The lock is the kernel's, on the directory itself. It ends with the process, however that ends, and leaves no file behind. File
systems without locks (some network mounts) give none, and then nobody is kept out.
"""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator


class BusyError(OSError):
  """Another process fills the directory; the message names it and says what to do."""


@contextlib.contextmanager
def sole_use(directory: pathlib.Path, flag: str, shared: bool = False) -> Iterator[None]:
  """Makes `directory` and keeps other processes out of it while the block runs.

  Args:
    directory: what is filled.
    flag: what names another one, such as '--out'.
    shared: let those in that say so, too.

  Raises:
    BusyError: another process has it. OSError: it cannot be made.
  """
  directory.mkdir(parents=True, exist_ok=True)
  handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
  try:
    if not _locked(handle, shared) or not _is_still(handle, directory):
      raise BusyError(f'{directory}: another process is writing there; wait until it has ended, or choose another {flag}')
    yield
  finally:
    os.close(handle)


def _locked(handle: int, shared: bool) -> bool:
  """Whether an open directory is this process's alone from now on, or that of several who share it."""
  try:
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:  # a file system without locks
    pass
  return True


def _is_still(handle: int, directory: pathlib.Path) -> bool:
  """Whether the name still leads to the open directory: the process that had the lock may just have renamed it."""
  try:
    return os.path.samestat(os.fstat(handle), directory.stat())
  except FileNotFoundError:
    return False
