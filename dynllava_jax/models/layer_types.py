"""What the layers of a decoder's stage are given, and what they give.

Axes: B batch, T query, N heads, K kv heads, H head dim, L layers, M candidates, P image rows, R ranking rows.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dynllava_jax import cache as kv
from dynllava_jax.methods import Rows
from dynllava_jax.models.experts import Learning
from dynllava_jax.ops.pruning import Ballot, Softness
from dynllava_jax.ops.visibility import Visible
from dynllava_jax.pruned_cache import Held


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
  """Rows whose attention a selector ranks by: `place` int32[B, R] in the sequence, `weight` float32[B, R]."""

  place: jax.Array
  weight: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What every layer of a stage shares.

  Attributes:
    cos, sin: float32[B, T, H/2] rotary angles.
    policy: float[B, T] keep weight per key (training), or None.
    cache_length: int32[B] visible cache slots, or None without a cache.
    rows: where text and image stand, for the pieces of the stage; None if it has none.
    unmerged: int32[B, N], the row that stands at each place of the full sequence where rows are merged ones, as
      `layout.unmerged_rows` has it; `cos` and `sin` are then of N places. None otherwise.
    queries: rows that the next stage's selector ranks by, by their attention in the last layer; None if it does not.
    positions: int32[B, T], rotary positions, and next_position: int32[B], that of the token to come, for a compressor.
    visible: what of what stands before it each row sees, without a cache; None for all.
    target: float32[B, T, M], log-probabilities of image tokens whose distance from the attention to them is wanted; None if not.
    generated: bool[B, T], rows that are generated tokens, where each layer chooses what they see of the image; None otherwise.
    count: int32[B], which of the new tokens are real, where they vote on what a cache holds; None otherwise.
    softness: how votes are weighed in training; None in generation.
    candidates: image tokens beside the cache, and chosen: int32[B, k], those that are seen; None for all.
    learning: how experts are trained; None where they are only used.
    frozen: bool[B, T], rows that have left: their state stays as it is, and keys and values are made of it; None for none.
    keys_alone: nobody goes on: only keys and values are made. Static.
    room: slots behind the keys and values that a layer gives, so that they are stacked as the cache needs them. Static.
  """

  cos: jax.Array
  sin: jax.Array
  policy: jax.Array | None = None
  cache_length: jax.Array | None = None
  rows: Rows | None = None
  queries: Queries | None = None
  positions: jax.Array | None = None
  next_position: jax.Array | None = None
  room: int = dataclasses.field(default=0, metadata={'static': True})
  unmerged: jax.Array | None = None
  visible: Visible | None = None
  target: jax.Array | None = None
  candidates: kv.Candidates | None = None
  chosen: jax.Array | None = None
  generated: jax.Array | None = None
  learning: Learning | None = None
  frozen: jax.Array | None = None
  keys_alone: bool = dataclasses.field(default=False, metadata={'static': True})
  count: jax.Array | None = None
  softness: Softness | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOutput:
  """What a layer gives besides its stream; of a stage, stacked [L, ...].

  Attributes:
    k, v: float[B, T, K, H] of these tokens, keys rotated; what a compressor left of them where the stage has one. With
      `Context.room` as a cache has them, with as many slots of zeros behind. Of a stage, as `cache.Layers`.
    length, first, shift: int32[B], as `Compressed` has them; None without a compressor.
    attention: float32[B, N, P], what the image rows receive from `Context.queries`, zeros but for the last layer; None if
      not asked.
    candidates: float[B, M, 2, K, H], image rows' keys and values where generated tokens choose among them, for which k and v are
      without them; None otherwise.
    details: what records look at, by name.
    held: of a prompt whose rows vote, with `Context.room`; ballot: of new tokens that vote on a cache; None otherwise.
  """

  k: kv.Layers
  v: kv.Layers
  length: jax.Array | None = None
  first: jax.Array | None = None
  shift: jax.Array | None = None
  attention: jax.Array | None = None
  details: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  candidates: jax.Array | None = None
  held: Held | None = None
  ballot: Ballot | None = None


def joined_outputs(parts: Sequence[LayerOutput]) -> LayerOutput:
  """What the layers of a stage give, from what its parts do, [L, ...] each. Not all parts have the same details."""
  if len(parts) == 1:
    return parts[0]
  plain = [dataclasses.replace(part, details={}) for part in parts]
  return dataclasses.replace(jax.tree.map(lambda *a: jnp.concatenate(a), *plain), details=joined_details(parts))


def joined_details(parts: Sequence[LayerOutput]) -> dict[str, jax.Array]:
  """The details of layers that have them, one behind the other."""
  names = dict.fromkeys(name for part in parts for name in part.details)
  return {name: jnp.concatenate([part.details[name] for part in parts if name in part.details]) for name in names}


def stacked_outputs(outputs: Sequence[LayerOutput]) -> LayerOutput:
  """Of layers that lie apart: what they give stacked, but for keys and values."""
  small = [dataclasses.replace(o, k=None, v=None, details=jax.tree.map(lambda x: x[None], o.details)) for o in outputs]
  plain = [dataclasses.replace(o, details={}) for o in small]
  stacked = dataclasses.replace(jax.tree.map(lambda *parts: jnp.stack(parts), *plain), details=joined_details(small))
  return dataclasses.replace(stacked, k=tuple(o.k for o in outputs), v=tuple(o.v for o in outputs))
