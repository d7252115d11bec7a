"""The KV cache of a stage whose layers prune their own context: every layer holds other tokens, in slots that are used again.

A token that a layer's query drops leaves its slot at once, and the next one takes it; where nothing is free the token with the
smallest score is given up, and counted. Beside `cache.StageCache`, with what generation, engine and chat ask of either.
Axes: L layers of the stage, B batch, T new tokens, C slots, K kv heads, H head dim, R interaction dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax import cache as kv
from dynllava_jax.arrangement import STACKED, Arrangement
from dynllava_jax.cached_arrays import Layers, not_before, put, put_layers, written
from dynllava_jax.ops import layout
from dynllava_jax.ops.pruning import Ballot, Survival

FREE = -1  # position of a slot that holds nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
  """What a layer's prompt leaves besides keys and values.

  Attributes:
    key: float[B, C, R], what later tokens score the slots by.
    place: int32[B, C], which row of the sequence is in each slot, `FREE` for none.
    given_up: int32[B], rows that were alive and found no slot.
  """

  key: jax.Array
  place: jax.Array
  given_up: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrunedCache:
  """Keys and values of one stage.

  Attributes:
    k, v: as in `cache.StageCache`; key: float[L, B, C, R], what new tokens score the slots by, or of each layer float[B, C, R].
    position: int32[L, B, C], of the token in each slot, in the conversation, `FREE` for none.
    length: int32[B], tokens that have come so far; generated: int32[B], those of them that were generated.
    evicted: int32[B], tokens given up because a layer was full, added up over the layers.
    shift: as in `cache.StageCache`.
    limit: tokens that a layer may hold. Static.
    room: tokens that may come in all, and budget: generated ones. Static.
    arrangement: how k and v lie. Static.
  """

  k: Layers
  v: Layers
  key: Layers
  position: jax.Array
  length: jax.Array
  generated: jax.Array
  evicted: jax.Array
  shift: jax.Array | None
  limit: int = dataclasses.field(metadata={'static': True})
  room: int = dataclasses.field(metadata={'static': True})
  budget: int = dataclasses.field(metadata={'static': True})
  arrangement: Arrangement = dataclasses.field(default=STACKED, metadata={'static': True})

  gated = False  # generated tokens are not judged as they come
  candidates = None  # no image tokens lie beside it

  @property
  def slots(self) -> int:
    """C."""
    return self.position.shape[2]

  @property
  def given_room(self) -> int:
    """As in `StageCache`: what it was made for. More only makes it fuller than it was meant to be."""
    return self.room - self.budget

  @property
  def later_room(self) -> jax.Array:
    """As in `StageCache`."""
    return self.given_room - (self.length - self.generated)

  @property
  def per_layer(self) -> tuple[Layers | jax.Array | None, ...]:
    """What each layer reads: k, v, nothing about a first slot, what is scored, slots in use."""
    return self.k, self.v, None, self.key, self.position != FREE

  @property
  def arrays(self) -> tuple[Layers, ...]:
    """As in `StageCache`."""
    return self.k, self.v, self.key

  def with_rows(self, new: 'PrunedCache', at: jax.Array) -> 'PrunedCache':
    """As `cache.insert`."""
    more = self.slots - new.slots
    held = {
      name: put_layers(getattr(self, name), getattr(new, name), self.arrangement, axes, more, at) for name, axes in self._axes
    }
    position = jnp.pad(new.position, [(0, 0), (0, 0), (0, more)], constant_values=FREE)
    counts = {name: put(getattr(self, name), getattr(new, name), at) for name in ('length', 'generated', 'evicted', 'shift')}
    return dataclasses.replace(self, **held, position=put(self.position, position, at, slice(None)), **counts)

  @property
  def _axes(self) -> tuple[tuple[str, str], ...]:
    return ('k', self.arrangement.keys), ('v', self.arrangement.values), ('key', 'bcr')


def limit(tokens: int, rows: int, room: int) -> int:
  """Tokens that a layer may hold of a prompt of `rows` and `room` later ones: so many, or all for `tokens` 0."""
  return min(tokens, rows + room) if tokens else rows + room


def of_prompt(
  k: jax.Array, v: jax.Array, key: jax.Array, survival: Survival, size: int, arrangement: Arrangement
) -> tuple[jax.Array, jax.Array, Held]:
  """What a layer's prompt leaves in a cache for `size` tokens.

  Args:
    k, v: float[B, S, K, H]; key: float[B, S, R].
    survival: of the prompt.
    size: `limit`.
    arrangement: how k and v are to lie.

  Returns:
    (keys and values as a cache has them, the rest of it).
  """
  rows, value = k.shape[1], survival.value
  place = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), value.shape)
  if size < rows:
    place = jnp.sort(jax.lax.top_k(value, size)[1], axis=1)
    k, v, key, value = (layout.gather_rows(x, place) for x in (k, v, key, value))
  here = value.shape[1]
  alive = (survival.value > -jnp.inf).sum(-1, dtype=jnp.int32)
  k, v = kv.with_room(k, v, size - here, arrangement)
  axes = arrangement.keys
  more = jax.tree.leaves(k)[0].shape[axes.index('c') - len(axes)] - here
  place = jnp.pad(jnp.where(value > -jnp.inf, place, FREE), [(0, 0), (0, more)], constant_values=FREE)
  return k, v, Held(jnp.pad(key, [(0, 0), (0, more), (0, 0)]), place, jnp.maximum(alive - size, 0))


def from_prompt(
  k: Layers,
  v: Layers,
  held: Held,
  positions: jax.Array,
  length: jax.Array,
  *,
  tokens: int,
  spec: kv.CacheSpec,
  shift: jax.Array | None,
  arrangement: Arrangement,
) -> PrunedCache:
  """A cache that holds what a prompt left.

  Args:
    k, v, held: of all layers, as `of_prompt` makes them.
    positions: int32[B, S], of the stage's rows in the full sequence; length: int32[B], how many are real.
    tokens: that a layer may hold, 0 for all.
    spec: what the cache has room for; shift, arrangement: as in `PrunedCache`.
  """
  budget = kv.generated_budget(False, 1.0, spec)
  behind = kv.room_behind(False, 1.0, spec)
  rows = positions.shape[1]
  of_slot = jax.vmap(lambda place: layout.gather_rows(positions, jnp.maximum(place, 0)))(held.place)
  return PrunedCache(
    k=k,
    v=v,
    key=tuple(held.key) if arrangement.apart else held.key,
    position=jnp.where(held.place == FREE, FREE, of_slot),
    length=length,
    generated=jnp.zeros_like(length),
    evicted=held.given_up.sum(0),
    shift=shift,
    limit=limit(tokens, rows, behind),
    room=rows + behind,
    budget=budget,
    arrangement=arrangement,
  )


def append(
  cache: PrunedCache,
  hidden: jax.Array,
  k: Layers,
  v: Layers,
  ballot: Ballot,
  position: jax.Array,
  count: jax.Array,
  generated: bool,
) -> PrunedCache:
  """Applies the votes of new tokens, and writes those of them that stay.

  Args:
    cache: the stage's, as it was read; hidden: float[B, T, D], what its layers made of the new tokens.
    k, v: of each layer float[B, T, K, H].
    ballot: of all layers, [L, ...].
    position: int32[B], of the first new token in the conversation; count: int32[B], real new tokens.
    generated: whether they are.
  """
  number = min(ballot.new.shape[2], cache.limit)
  weakest, slot = jax.lax.top_k(-ballot.old[..., : cache.limit], number)  # free ones first
  strongest, token = jax.lax.top_k(ballot.new, number)
  slot = jnp.where(strongest > -weakest, slot, cache.slots + jnp.arange(number))  # distinct, as the scatter promises
  if cache.arrangement.apart:
    slot = jnp.minimum(slot, not_before(hidden)[:, None])
  pick = lambda new, at: jnp.take_along_axis(new, at.reshape(*at.shape, *[1] * (new.ndim - at.ndim)), at.ndim - 1)
  if ballot.new.shape[2] > 1:
    each = lambda new: tuple(map(pick, new, token)) if isinstance(new, tuple) else pick(new, token)
    k, v = each(k), each(v)
  key = pick(ballot.key, token)
  layer, row = jnp.arange(slot.shape[0])[:, None, None], jnp.arange(slot.shape[1])[:, None]
  left = jnp.where(ballot.old > -jnp.inf, cache.position, FREE)
  if cache.arrangement.apart:
    keys = tuple(old.at[row, at].set(new.astype(old.dtype), mode='drop') for old, new, at in zip(cache.key, key, slot))
  else:
    keys = cache.key.at[layer, row, slot].set(key.astype(cache.key.dtype), mode='drop', unique_indices=True)
  alive = sum((values > -jnp.inf).sum(-1, dtype=jnp.int32) for values in (ballot.old, ballot.new))
  return dataclasses.replace(
    cache,
    **written(cache, k, v, slot),
    key=keys,
    position=left.at[layer, row, slot].set(position[:, None] + token, mode='drop', unique_indices=True),
    length=cache.length + count,
    generated=cache.generated + count * generated,
    evicted=cache.evicted + jnp.maximum(alive - cache.limit, 0).sum(0),
  )
