"""Progress of long work: a bar on a terminal, a line now and then in a log; rate and time left in both."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
  BarColumn,
  DownloadColumn,
  MofNCompleteColumn,
  Progress,
  ProgressColumn,
  Task,
  TextColumn,
  TimeRemainingColumn,
  TransferSpeedColumn,
)
from rich.text import Text

LINE_EVERY = 30.0  # seconds


class _Rate(ProgressColumn):
  """Items per second."""

  def render(self, task: Task) -> Text:
    return Text(f'{task.speed:,.1f}/s' if task.speed else '')


@contextlib.contextmanager
def progress(console: Console, title: str, total: int, *, done: int = 0, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
  """Yields a function that is told how many more are done.

  Args:
    console: where to show it.
    title, total: what is done, and how much of it there is.
    done: how much an earlier start did; not part of the rate.
    in_bytes: what is counted are bytes.
  """
  if not console.is_terminal:
    yield _lines(console, title, total, done, in_bytes)
    return
  amounts = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(), _Rate())
  columns = (TextColumn('{task.description}', markup=False), BarColumn(), *amounts, TimeRemainingColumn())
  with Progress(*columns, console=console, transient=True) as bar:
    task = bar.add_task(title, total=total, completed=done)
    yield lambda more: bar.advance(task, more)


def _lines(console: Console, title: str, total: int, done: int, in_bytes: bool) -> Callable[[int], None]:
  start = last = time.monotonic()
  now, shown = done, False

  def advance(more: int) -> None:
    nonlocal last, now, shown
    now += more
    clock = time.monotonic()
    if clock - last < LINE_EVERY and not (shown and now >= total):  # what is short needs no line
      return
    rate = max(now - done, 1e-9) / max(clock - start, 1e-9)
    if in_bytes:
      amounts = f'{now / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s'
    else:
      amounts = f'{now:,} of {total:,}, {rate:,.1f}/s'
    left = f', {(total - now) / rate / 60:.0f} min left' if now < total else ''
    console.print(f'{title}: {amounts}{left}', highlight=False, markup=False, emoji=False, soft_wrap=True)
    last, shown = clock, True

  return advance
