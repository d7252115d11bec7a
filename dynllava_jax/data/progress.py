"""Progress of long work on the host: a bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_EVERY = 20.0  # seconds between lines where there is no terminal


class _Rate(ProgressColumn):
  """Units per second."""

  def render(self, task: Task) -> Text:
    return Text(f'{task.speed or 0:,.0f}/s')


def follow(items: Iterable[Any], title: str, total: int, size: Callable[[Any], int], done: int = 0) -> Iterator[Any]:
  """Yields the items and shows how far they are.

  Args:
    items: finished pieces of work.
    title, total: what is counted, and how much of it there is.
    size: how much one item counts for.
    done: how much was finished by an earlier start; not part of the rate.
  """
  console = Console()
  columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
  start = last = time.monotonic()
  now = done
  with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
    task = bar.add_task(title, total=total, completed=done)
    for item in items:
      yield item
      now += size(item)
      bar.update(task, completed=now)
      clock = time.monotonic()
      if not console.is_terminal and (clock - last > PLAIN_EVERY or now >= total):
        rate = (now - done) / max(clock - start, 1e-9)
        left = f', {(total - now) / max(rate, 1e-9):,.0f} s left' if now < total else ''
        console.print(f'{title}: {now:,} of {total:,}, {rate:,.0f}/s{left}', highlight=False)
        last = clock
