"""A trace of some steps (`--profile=100:105`), beside TensorBoard's files, which shows it; so does xprof."""

import pathlib
from typing import Any

import jax

from dynllava_jax.config import ConfigError


def read_steps(text: str) -> range:
  """The steps that `FIRST:LAST` names, both included; ConfigError if it is no such pair."""
  first, _, last = text.partition(':')
  if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
    raise ConfigError(f'--profile={text}: expected the first and the last step to be traced, such as 100:105')
  return range(int(first), int(last) + 1)


class Trace:
  """Traces the steps of a range that the run comes to."""

  def __init__(self, steps: range, folder: pathlib.Path):
    """`folder`: the trace goes to `plugins/profile` in it."""
    self._steps, self._folder, self._running = steps, folder, False

  def before(self, step: int) -> None:
    """To be called before a step."""
    if step in self._steps and not self._running:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, results: Any) -> None:
    """To be called after a step, with what it computes."""
    if self._running and step == self._steps[-1]:
      jax.block_until_ready(results)
      self._stop()

  def _stop(self) -> None:
    if self._running:
      self._running = False
      jax.profiler.stop_trace()

  def __enter__(self) -> 'Trace':
    return self

  def __exit__(self, *_) -> None:
    self._stop()  # of a run that ended before
