"""How work is divided over hosts."""

from collections.abc import Sequence
from typing import TypeVar

from jax.sharding import Mesh

from dynllava_jax.sharding import batch_sharding

T = TypeVar('T')


def share(items: Sequence[T], hosts: int, host: int) -> list[T]:
  """Host `host`'s contiguous part: ceil(n / hosts) items each, fewer or none at the end, as LLaVA splits question files."""
  size = -(-len(items) // hosts)
  return list(items[host * size : (host + 1) * size])


def own_part(items: Sequence[T], size: int, mesh: Mesh) -> list[T]:
  """The items of a batch of `size` that this host's devices hold, in order; the batch is filled up with its last item.

  Not a contiguous part: on a torus of TPUs the rows of several hosts may interleave.
  """
  filled = [*items, *[items[-1]] * (size - len(items))]
  held = {rows.indices(size)[:2] for (rows,) in batch_sharding(mesh).addressable_devices_indices_map((size,)).values()}
  return [item for start, stop in sorted(held) for item in filled[start:stop]]
