"""Ctrl-C and SIGTERM: always counted, and SIGTERM with its grace time."""

import os
import signal
import time

import pytest

from dynllava_jax.training import stopping
from dynllava_jax.training.stopping import StopRequest


def test_ctrl_c_before_the_loop_counts_even_if_a_library_swallows_it():
  stop = StopRequest()
  try:
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), 2)
    stop.in_loop()
    assert stop.agreed(False)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), 2)
  finally:
    stop.restore()


def test_sigterm_asks_for_a_start_again_and_has_its_time(monkeypatch, capfd):
  """Ctrl-C has no limit: a person waits."""
  left = []
  monkeypatch.setattr(stopping.os, '_exit', left.append)
  for number, code, expected in ((signal.SIGTERM, stopping.AGAIN, [stopping.AGAIN]), (signal.SIGINT, stopping.BY_CTRL_C, [])):
    stop, left[:] = StopRequest(grace_seconds=0.05), []
    try:
      stop.in_loop()
      os.kill(os.getpid(), number)
      assert stop.agreed(False) and stop.code == code and not left
      time.sleep(0.2)
      assert left == expected
    finally:
      stop.restore()
  assert (
    '0.05 s after SIGTERM (config.grace_seconds) the run is not saved; what was saved before is intact' in capfd.readouterr().err
  )
  stop, left[:] = StopRequest(grace_seconds=0.05), []
  stop.in_loop()
  os.kill(os.getpid(), signal.SIGTERM)
  stop.restore()  # saved in time
  time.sleep(0.2)
  assert not left
