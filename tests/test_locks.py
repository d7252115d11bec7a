"""Who may write into a directory: one process at a time, and the next one as soon as it is gone, killed or not."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from dynllava_jax.locks import BusyError, sole_use

HOLDER = """
import pathlib, sys, time
from dynllava_jax.locks import sole_use
with sole_use(pathlib.Path(sys.argv[1]), '--out'):
  print('holds', flush=True)
  time.sleep(60)
"""


def test_a_killed_process_leaves_no_lock(tmp_path):
  place = tmp_path / 'out [1]'
  with subprocess.Popen([sys.executable, '-c', HOLDER, place], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
    assert holder.stdout.readline() == 'holds\n'
    with (
      pytest.raises(BusyError, match=r'out \[1\]: another process is writing there; .*, or choose another --out'),
      sole_use(place, '--out'),
    ):
      pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
  with sole_use(place, '--out'):
    assert list(place.iterdir()) == [], 'nothing tells of the lock'


def test_a_lock_ends_with_its_block(tmp_path):
  with pytest.raises(ValueError, match='of the block'), sole_use(tmp_path, '--out'):
    raise ValueError('of the block')
  with sole_use(tmp_path, '--out'), pytest.raises(BusyError), sole_use(tmp_path, '--out'):
    pass


def test_a_directory_that_was_renamed_is_another_one(tmp_path, monkeypatch):
  """The process before may rename what it filled, between the moment it is opened here and the lock."""
  import fcntl

  lock = fcntl.flock

  def renamed(handle, how):
    (tmp_path / 'a').rename(tmp_path / 'b')
    lock(handle, how)

  monkeypatch.setattr(fcntl, 'flock', renamed)
  with pytest.raises(BusyError), sole_use(tmp_path / 'a', '--out'):
    pass
