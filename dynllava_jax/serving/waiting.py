"""A waiting room with a limit, whose clients take turns: first come, first served among the requests of each."""

import collections
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar('T')


class FullError(RuntimeError):
  """No room for another request; the message says how many are waiting."""


class Waiting(Generic[T]):
  """Requests by client. Not for several threads at once."""

  def __init__(self, limit: int):
    self.limit = limit
    self._lines: collections.OrderedDict[str, collections.deque[T]] = collections.OrderedDict()

  def __len__(self) -> int:
    return sum(map(len, self._lines.values()))

  def __iter__(self) -> Iterator[T]:
    return (item for line in self._lines.values() for item in line)

  def put(self, client: str, item: T) -> None:
    """Puts a request at the end of its client's line; FullError at the limit."""
    if len(self) >= self.limit:
      raise FullError(f'{len(self)} requests are waiting, which is the limit; try again later')
    self._lines.setdefault(client, collections.deque()).append(item)

  def in_turn(self) -> Iterator[T]:
    """All that wait, in the order in which `take` gives them."""
    lines = [collections.deque(line) for line in self._lines.values()]
    while lines:
      yield lines[0].popleft()
      lines = lines[1:] + lines[:1] if lines[0] else lines[1:]

  def take(self) -> T:
    """Whose turn it is, taken out; its client goes behind the others."""
    client, line = next(iter(self._lines.items()))
    item = line.popleft()
    self._lines.move_to_end(client) if line else self._lines.pop(client)
    return item

  def remove(self, items: Iterable[T]) -> None:
    """Takes these out, wherever they stand."""
    gone = set(map(id, items))
    lines = ((client, collections.deque(x for x in line if id(x) not in gone)) for client, line in self._lines.items())
    self._lines = collections.OrderedDict((client, line) for client, line in lines if line)
