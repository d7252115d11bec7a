"""Ctrl-C and SIGTERM: before the first step they end the program, then they ask the loop to save and end.

Exit codes, for what starts the program again:

    0    the run is finished
    75   stopped by SIGTERM, or another host went away: start the same command again (EX_TEMPFAIL of sysexits.h)
    130  Ctrl-C
    1    an error, which one line names; starting again does not mend it
    above 128, such as 143: killed by a signal, before the first step or before it could save; start again
"""

import os
import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

AGAIN = 75
BY_CTRL_C = 130


class Interrupted(Exception):
  """The run was asked to stop; its state is saved. `code`: what the program exits with."""

  def __init__(self, message: str, code: int = AGAIN):
    super().__init__(message)
    self.code = code


class StopRequest:
  """Watches SIGINT and SIGTERM. A second SIGINT always ends at once, and so does SIGTERM when its time is over."""

  def __init__(self, grace_seconds: float = 0.0):
    """Until `in_loop`, SIGINT raises KeyboardInterrupt, and is remembered should a library swallow that.

    Args:
      grace_seconds: the process ends so long after SIGTERM, whatever it does; 0 for never.
    """
    self.requested, self._looping, self._interrupts, self._grace = False, False, 0, grace_seconds
    self._timer: threading.Timer | None = None
    self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._ask)}

  def in_loop(self) -> None:
    """From now on both only ask."""
    self._looping = True
    self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask)

  def _ask(self, number, frame):
    del frame
    self.requested = True
    self._interrupts += number == signal.SIGINT
    if number == signal.SIGINT and (self._interrupts > 1 or not self._looping):
      raise KeyboardInterrupt
    if number == signal.SIGTERM and self._grace and not self._timer:
      self._timer = threading.Timer(self._grace, self._give_up)
      self._timer.daemon = True
      self._timer.start()

  def _give_up(self) -> None:
    """In the timer's thread."""
    when = f'{self._grace:g} s after SIGTERM (config.grace_seconds) the run is not saved'
    os.write(2, f'error: {when}; what was saved before is intact, start the same command again to go on\n'.encode())
    os._exit(AGAIN)

  @property
  def code(self) -> int:
    """What the program exits with if it stops now."""
    return BY_CTRL_C if self._interrupts else AGAIN

  def agreed(self, talking: bool) -> bool:
    """Whether to end after this step, see `any_host`."""
    return any_host(self.requested, talking)

  def restore(self) -> None:
    """The state is saved, or never will be."""
    for number, handler in self._before.items():
      signal.signal(number, handler)
    if self._timer:
      self._timer.cancel()


def any_host(wish: bool, talking: bool) -> bool:
  """Whether any process has the wish. Several must do things after the same step, and only talk about them now and then."""
  if jax.process_count() == 1:
    return wish
  return talking and bool(multihost_utils.process_allgather(np.asarray(wish)).any())
