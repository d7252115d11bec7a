"""How work is divided over hosts."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar('T')


def share(items: Sequence[T], hosts: int, host: int) -> list[T]:
  """Host `host`'s contiguous part: ceil(n / hosts) items each, fewer or none at the end, as LLaVA splits question files."""
  size = -(-len(items) // hosts)
  return list(items[host * size : (host + 1) * size])
