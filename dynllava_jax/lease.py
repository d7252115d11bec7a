"""Folders of an object store that one program at a time may fill. Stores have no locks, so there is a lease: an object with its
owner and a time, renewed while the program runs.

A lease that has not been renewed for `LASTS` seconds is taken over, and at once if its owner ran on this machine and is gone. Where
the store can create an object only if there is none (Google's and Amazon's do), two programs that start together cannot both get
it; elsewhere each reads back after a moment what it wrote. Clocks of machines that share a folder may differ by less than `LASTS`.
"""

import contextlib
import json
import os
import pathlib
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from dynllava_jax import remote
from dynllava_jax.locks import BusyError
from dynllava_jax.paths import Given

LEASE = '.lease.json'
RENEWED = 15.0  # seconds
LASTS = 120.0  # seconds
SETTLES = 0.3  # seconds


class Lease:
  """A held lease."""

  def __init__(self, path: Given, flag: str):
    self.fs, folder = remote.store(path)
    self.folder, self.flag, self.url = folder, flag, f'{folder}/{LEASE}'
    self.owner = {'owner': secrets.token_hex(8), 'host': socket.gethostname(), 'process': os.getpid(), 'machine': _machine()}
    self.owner['started'] = started(os.getpid())
    self.renewed, self.lost = 0.0, ''
    self._stop = threading.Event()

  def take(self) -> None:
    """BusyError: another program has it. StoreError: the store cannot be read or written."""
    other = self._read()
    if other:
      left = other.get('time', 0) + LASTS - time.time()
      if left > 0 and not _ended(other):
        raise BusyError(
          f'{self.folder}: another program is writing there (process {other.get("process")} on {other.get("host")}); wait until it '
          f'has ended, or choose another {self.flag}. If it was killed, the folder is free in {left:.0f} s'
        )
      self._delete()
    with contextlib.suppress(FileExistsError):
      self._write(mode='create')
    time.sleep(SETTLES)
    found = self._read() or {}
    if found.get('owner') != self.owner['owner']:
      raise BusyError(
        f'{self.folder}: another program began to write there at the same time (on {found.get("host")}); wait until it has ended, '
        f'or choose another {self.flag}'
      )
    self.renewed = time.monotonic()

  def check(self) -> None:
    """BusyError if the lease may be another program's by now."""
    if not self.lost and time.monotonic() - self.renewed > LASTS:
      self.lost = f'the store could not be reached for {LASTS:.0f} s'
    if self.lost:
      raise BusyError(f'{self.folder}: no longer written to, {self.lost}; start again when no other program writes there')

  def keep(self) -> None:
    """Renews it until `end`; if that is not possible the program is asked to end, as by Ctrl-C."""
    while not self._stop.wait(RENEWED):
      try:
        other = self._read() or {}
        if other.get('owner') != self.owner['owner']:
          self.lost = f'another program took it over (process {other.get("process")} on {other.get("host")})'
        else:
          self._write(mode='overwrite')
          self.renewed = time.monotonic()
        self.check()
      except BusyError:
        os.kill(os.getpid(), signal.SIGINT)
        return
      except OSError:
        pass  # it lasts a while

  def end(self) -> None:
    """Gives it back."""
    self._stop.set()
    with contextlib.suppress(OSError):
      if not self.lost and (self._read() or {}).get('owner') == self.owner['owner']:
        self._delete()

  def _read(self) -> dict[str, Any] | None:
    try:
      with remote.readable(self.url):
        content = self.fs.cat_file(self.url)
    except FileNotFoundError:
      return None
    with contextlib.suppress(ValueError):
      found = json.loads(content)
      if isinstance(found, dict):
        return found
    return {}

  def _write(self, mode: str) -> None:
    with remote.readable(self.url):
      try:
        self.fs.pipe_file(self.url, json.dumps(self.owner | {'time': time.time()}).encode(), mode=mode)
      except Exception as e:
        if mode == 'create' and self._read() is not None:
          raise FileExistsError(self.url) from e
        raise

  def _delete(self) -> None:
    with contextlib.suppress(FileNotFoundError), remote.readable(self.url):
      self.fs.rm_file(self.url)


@contextlib.contextmanager
def lease(path: Given, flag: str) -> Iterator[Lease]:
  """Holds the lease of a folder while the block runs. `flag`: what names another folder, such as '--out'.

  Raises:
    BusyError: another program has it. StoreError: the store cannot be read or written.
  """
  held = Lease(path, flag)
  held.take()
  thread = threading.Thread(target=held.keep, daemon=True)
  thread.start()
  try:
    yield held
  finally:
    held.end()


def _ended(owner: dict[str, Any]) -> bool:
  """Whether it is known that a process of this machine is gone; not known of other machines."""
  machine, process = owner.get('machine'), owner.get('process')
  return bool(machine) and machine == _machine() and isinstance(process, int) and started(process) != owner.get('started')


def _machine() -> str:
  """This start of this machine, and the set of processes that can be seen; '' where the system does not tell."""
  try:
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip() + ' ' + os.readlink('/proc/self/ns/pid')
  except OSError:
    return ''


def started(process: int) -> str | None:
  """When a process began, in the system's ticks; None if there is none."""
  try:
    return pathlib.Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]
  except OSError:
    return None
