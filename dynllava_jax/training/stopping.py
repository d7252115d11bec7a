"""Ctrl-C and SIGTERM: before the first step they end the program, then they ask the loop to save and end."""

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
  """Watches SIGINT and SIGTERM. A second SIGINT always ends at once."""

  def __init__(self):
    """Until `in_loop`, SIGINT raises KeyboardInterrupt, and is remembered should a library swallow that."""
    self.requested, self._looping, self._interrupts = False, False, 0
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

  def agreed(self, logging: bool) -> bool:
    """Whether to end after this step. Several hosts must end after the same one, and only talk about it when they log."""
    if jax.process_count() == 1:
      return self.requested
    return logging and bool(multihost_utils.process_allgather(np.asarray(self.requested)).any())

  def restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
