"""How work is divided over hosts."""

from collections.abc import Sequence
from typing import TypeVar

from jax.sharding import Mesh

from dynllava_jax.sharding import batch_hosts

T = TypeVar('T')


def share(items: Sequence[T], hosts: int, host: int) -> list[T]:
  """Host `host`'s contiguous part: ceil(n / hosts) items each, fewer or none at the end, as LLaVA splits question files."""
  size = -(-len(items) // hosts)
  return list(items[host * size : (host + 1) * size])


def own_part(items: Sequence[T], size: int, mesh: Mesh) -> list[T]:
  """This host's part of a batch of `size`, which is filled up with copies of its last item to one shape for all batches."""
  return share([*items, *[items[-1]] * (size - len(items))], *batch_hosts(mesh))
