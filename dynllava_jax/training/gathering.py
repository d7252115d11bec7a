"""The arrays of a step on the first host, where it alone writes them: until it is uploaded, a store's folder is on one disk.

A stack of layers comes layer by layer, so that a device holds no more than a layer besides its own part.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LAYERS = 'layers'  # in the name of a stack


def on_first_host(tree: Any, mesh: Mesh) -> Any:
  """Arrays over all hosts, as numpy on the first host, None in their places on the others. All hosts call it alike."""
  everywhere = NamedSharding(mesh, PartitionSpec())
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  return jax.tree.unflatten(structure, [_gathered(path, x, everywhere) for path, x in leaves])


def _gathered(path: tuple, x: jax.Array, everywhere: NamedSharding) -> np.ndarray | None:
  first = jax.process_index() == 0
  names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
  if x.is_fully_replicated:
    out = np.asarray(x.addressable_data(0)) if first else None
  elif LAYERS in names:
    out = np.empty(x.shape, x.dtype) if first else None
    for i in range(len(x)):
      row = np.asarray(_row(everywhere)(x, i).addressable_data(0))
      if first:
        out[i] = row
  else:
    out = np.asarray(_whole(everywhere)(x).addressable_data(0))
  return out


@functools.cache
def _row(sharding: NamedSharding) -> Any:
  return jax.jit(lambda x, i: x[i], out_shardings=sharding)


@functools.cache
def _whole(sharding: NamedSharding) -> Any:
  return jax.jit(lambda x: x, out_shardings=sharding)
