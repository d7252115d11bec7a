"""How the decoder's weights and cache lie in memory while a model runs: the one place that decides it, by what runs it.

`STACKED`: layers are stacked and scanned. TPU compilers read a slice of a stack where it lies, heads first; programs are small.
`APART`: every layer's arrays are its own and layers are unrolled. XLA's CPU compiler copies a slice before it multiplies with it,
and transposes what does not lie as its matrix product wants it: all weights and the whole cache, for every token.

Checkpoints and training know `STACKED` alone; `models.params.cut_params` makes either of a checkpoint.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Arrangement:
  """How a stage's arrays lie.

  Attributes:
    apart: whether layers are arrays of their own, and q, k and v one matrix; else stacked [L, ...].
    keys, values: axes of a layer's cache, of a letter each: B batch, C slots, K kv heads, H head dim.
  """

  apart: bool
  keys: str
  values: str


STACKED = Arrangement(apart=False, keys='bckh', values='bckh')
APART = Arrangement(apart=True, keys='bkhc', values='bkch')


def best(devices: Iterable[jax.Device]) -> Arrangement:
  """What is fastest where a model runs on these devices. Over several, layers stay stacked as they are split."""
  devices = list(devices)
  return APART if len(devices) == 1 and devices[0].platform == 'cpu' else STACKED


def best_for(params: Any) -> Arrangement:
  """`best` where a tree of arrays lies; what is not on a device yet goes to the first one."""
  found: set[jax.Device] = set()
  for leaf in jax.tree.leaves(params):
    found |= leaf.devices() if isinstance(leaf, jax.Array) else {jax.local_devices()[0]}
  return best(found)


def arrangement_of(llama: dict[str, Any]) -> Arrangement:
  """How a decoder's parameters in the form for a run lie."""
  return STACKED if 'stage_0' in llama else APART


def layer_names(starts: Sequence[int], num_layers: int) -> list[str]:
  """Where the parameters of each layer lie in `llama` if they lie apart: layer j of stage i in `stage_{i}_{j}`."""
  bounds = zip(starts, [*starts[1:], num_layers])
  return [f'stage_{i}_{j}' for i, (start, end) in enumerate(bounds) for j in range(end - start)]


def joined_projections(layer: dict[str, Any]) -> dict[str, Any]:
  """A layer's weights with q, k and v, [N, D, H] and [K, D, H], as one matrix `qkv` [D, (N + 2 K) H]."""
  flat = lambda w: w.transpose(1, 0, 2).reshape(w.shape[1], -1)
  rest = {name: w for name, w in layer.items() if name not in ('q', 'k', 'v')}
  return rest | {'qkv': jnp.concatenate([flat(layer[name]) for name in 'qkv'], 1)}


def lay_apart(llama: dict[str, Any]) -> dict[str, Any]:
  """A decoder whose layers are stacks of one layer each, `stage_0_0` and so on, as a run takes it. `llama` is consumed."""
  return {name: _from_stack(llama.pop(name)) if name.startswith('stage_') else llama[name] for name in list(llama)}


@jax.jit
def _from_stack(layer: dict[str, Any]) -> dict[str, Any]:
  return joined_projections(jax.tree.map(lambda x: x[0], layer))


def parted_projections(qkv: jax.Array, heads: int, kv_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The inverse: (q, k, v)."""
  by_head = qkv.reshape(qkv.shape[0], heads + 2 * kv_heads, -1).transpose(1, 0, 2)
  return tuple(jnp.split(by_head, [heads, heads + kv_heads]))
