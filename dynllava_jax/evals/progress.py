"""Progress of long work: a bar on a terminal, a line now and then in a log; rate and time left in both."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_EVERY = 30.0  # seconds


class Rate(ProgressColumn):
  """Answers per second."""

  def render(self, task: Task) -> Text:
    """As `12.3/s`."""
    return Text(f'{task.speed:.1f}/s' if task.speed else '')


@contextlib.contextmanager
def progress(console: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
  """Yields a function that is told how many more are done."""
  if not console.is_terminal:
    yield _lines(console, name, total)
    return
  columns = (TextColumn('{task.description}', markup=False), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
  with Progress(*columns, console=console, transient=True) as bar:
    task = bar.add_task(name, total=total)
    yield lambda count: bar.advance(task, count)


def _lines(console: Console, name: str, total: int) -> Callable[[int], None]:
  start = last = time.monotonic()
  done = 0

  def advance(count: int) -> None:
    nonlocal last, done
    done += count
    now = time.monotonic()
    if now - last >= LINE_EVERY:
      rate = done / (now - start)
      console.print(f'{name}: {done}/{total}, {rate:.1f}/s, {(total - done) / rate / 60:.0f} min left')
      last = now

  return advance
