"""The KV cache as data: one stack per stage, or per kind of layers in it (`models.stacks`), each with its own static capacity.

Axes: L layers of the stage, B batch, C slots, K kv heads, H head dim, X both of these.
How they lie in memory is the model's `Arrangement`; nothing but `cached_arrays` and `ops.attention.cached_attention` looks at that.

Layers behind a selector that judges generated tokens are *gated*: a rejected token is visible to itself
only. Each row has a write pointer p (`length`); the new K/V are written at slot p, and p advances only
if the token is kept, so the next token overwrites a rejected one. Slots < p are what attention sees.

The gate has no hard limit, the buffer has: a row keeps at most `budget` generated tokens. When a further
one is kept, the generated token with the smallest keep margin, the new one included, is given up, and
counted in `evicted`. Counting tokens rather than free slots makes the rule independent of padding.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax.arrangement import STACKED, Arrangement
from dynllava_jax.cached_arrays import Layers, each, lying, not_before, put, put_layers, standing, widened, written

NEVER_EVICTED = jnp.inf  # margin of prompt tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
  """Image tokens of a stage whose generated tokens choose among them: once per row, all layers of a token side by side.

  Attributes:
    kv: float[B, M, L, 2, K, H], rotated keys, and values.
    keys: float[B, M, E], what they are scored by; None where that is the first layer's keys.
    present: bool[B], False in rows without image, where the rest is arbitrary.
  """

  kv: jax.Array
  keys: jax.Array | None
  present: jax.Array

  def of_layer(self, index: jax.Array | None, layer: jax.Array) -> jax.Array:
    """Those of int32[B, k], all for None, in a layer of the stage, int32[]: float[B, k, 2, K, H].

    One gather that reads nothing else. Its result is small enough for a TPU to keep it in VMEM, so that memory is read once.
    """
    if index is None:
      return jax.lax.dynamic_index_in_dim(self.kv, layer, 2, keepdims=False)
    return self.kv.at[jnp.arange(index.shape[0])[:, None], index, layer].get(mode='clip')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StageCache:
  """Keys and values of one stage, or of some of its layers that hold other tokens than the rest.

  Attributes:
    k, v: float[L, B, C, K, H], or of each layer an array whose axes are as `arrangement` has them; keys are stored rotated.
    length: int32[B], the write pointer: slots < length are visible.
    margin: float32[B, C], keep margin of the generated token in each slot, +inf elsewhere.
    generated: int32[B], generated tokens held.
    evicted: int32[B], generated tokens given up because the budget was full.
    shift: int32[B], how much earlier than `Cache.position` the next token is rotated in this stage, which numbers its tokens
      anew; None if it does not.
    first: int32[L, B], where a layer's visible slots begin, if layers hold different numbers of a prompt's tokens; None for 0.
    gated: whether generated tokens are judged. Static.
    budget: generated tokens a row may hold. Static.
    arrangement: how k and v lie, and whether they are `ops.int8.Int8`. Static.
    candidates: the image tokens where generated tokens choose among them; k and v then hold text alone. None otherwise.
    recent: int32[B, W], slots of the newest W generated tokens, which are judged later: that of number n at n % W; None for W = 0.
  """

  k: Layers
  v: Layers
  length: jax.Array
  margin: jax.Array
  generated: jax.Array
  evicted: jax.Array
  shift: jax.Array | None
  first: jax.Array | None
  gated: bool = dataclasses.field(metadata={'static': True})
  budget: int = dataclasses.field(metadata={'static': True})
  arrangement: Arrangement = dataclasses.field(default=STACKED, metadata={'static': True})
  candidates: Candidates | None = None
  recent: jax.Array | None = None

  @property
  def slots(self) -> int:
    """C."""
    return self.margin.shape[1]

  @property
  def given_room(self) -> int:
    """Tokens of prompt and later turns that there is room for besides generated ones."""
    return self.slots - self.budget - self.gated

  @property
  def later_room(self) -> jax.Array:
    """int32[B], how many of those have not come."""
    return self.given_room - (self.length - self.generated)

  @property
  def per_layer(self) -> tuple[Layers | jax.Array | None, ...]:
    """What each layer reads: k, v, first."""
    return self.k, self.v, self.first

  @property
  def arrays(self) -> tuple[Layers, ...]:
    """What takes the memory."""
    return self.k, self.v

  def with_rows(self, new: 'StageCache', at: jax.Array) -> 'StageCache':
    """As `insert`."""
    lies, more = self.arrangement, self.slots - new.slots
    margin = jnp.pad(new.margin, [(0, 0), (0, more)], constant_values=NEVER_EVICTED)
    names = ('length', 'generated', 'evicted', 'shift', 'recent')
    return dataclasses.replace(
      self,
      k=put_layers(self.k, new.k, lies, lies.keys, more, at),
      v=put_layers(self.v, new.v, lies, lies.values, more, at),
      margin=put(self.margin, margin, at),
      first=put(self.first, new.first, at, slice(None)),
      candidates=jax.tree.map(lambda old, rows: put(old, rows, at), self.candidates, new.candidates),
      **{name: put(getattr(self, name), getattr(new, name), at) for name in names},
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Left:
  """Where rows left the decoder.

  Attributes:
    stage: int32[B], the stage behind which the state was taken that the logits to come are made of.
    value: float32[B, I], what the exit of each stage measured of it, NaN where there is none or it was not asked.
  """

  stage: jax.Array
  value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """One `StageCache`, or `PrunedCache`, per stack of layers, stage by stage; int32[B] `position`: where the next token stands.

  `gate` is what a gate with a memory knows of the rows (`methods.gate.GateState`), None in runs without one;
  `left` where they left, None in runs without exits. Where all left earlier the last stages may be missing.
  """

  stages: tuple[Any, ...]
  position: jax.Array
  gate: Any = None
  left: Left | None = None

  @property
  def evicted(self) -> jax.Array:
    """int32[B], given up where a cache was full: generated tokens, which gated stages share; of pruned layers the sum."""
    return self.stages[-1].evicted + sum(stage.evicted for stage in self.stages[:-1] if not stage.gated)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
  """What a cache must have room for besides the prompt.

  Attributes:
    max_new_tokens: generated tokens, over all turns.
    later_tokens: tokens of later user turns that arrive as chunks.
    given_tokens: tokens of given answers, over all turns, which may be more than would be generated.
  """

  max_new_tokens: int
  later_tokens: int = 0
  given_tokens: int = 0


def generated_budget(gated: bool, text_keep_budget: float, spec: CacheSpec) -> int:
  """Generated or given tokens a stage has room for: the share of `max_new_tokens` where a gate may evict, else all there can be."""
  if gated and text_keep_budget < 1:
    return math.ceil(text_keep_budget * spec.max_new_tokens)
  return max(spec.max_new_tokens, spec.given_tokens)


def capacity(prompt_slots: int, budget: int, gated: bool, spec: CacheSpec) -> int:
  """Slots of a stage: prompt, later turns, generated tokens, and one where a gate puts what it rejects."""
  return prompt_slots + spec.later_tokens + budget + int(gated)


def room_behind(gated: bool, text_keep_budget: float, spec: CacheSpec) -> int:
  """Slots of a stage behind those of the prompt."""
  return capacity(0, generated_budget(gated, text_keep_budget, spec), gated, spec)


def with_room(k: jax.Array, v: jax.Array, room: int, arrangement: Arrangement) -> tuple[jax.Array, jax.Array]:
  """A layer's keys and values float[B, S, K, H] of a prompt, as its cache has them, with at least `room` more slots."""
  room += -(k.shape[1] + room) % arrangement.multiple

  lie = lambda x, axes: each(lambda axes, x: widened(x, axes, room), axes, lying(x, axes, arrangement))
  return lie(k, arrangement.keys), lie(v, arrangement.values)


def from_prompt(
  k: Layers,
  v: Layers,
  length: jax.Array,
  *,
  gated: bool,
  text_keep_budget: float,
  spec: CacheSpec,
  shift: jax.Array | None = None,
  first: jax.Array | None = None,
  arrangement: Arrangement = STACKED,
  candidates: Candidates | None = None,
  window: int = 0,
) -> StageCache:
  """A cache that holds a prompt's keys and values, as `with_room` makes them with `room_behind`; the rest as in `StageCache`."""
  budget = generated_budget(gated, text_keep_budget, spec)
  axes = arrangement.keys
  batch, slots = (jax.tree.leaves(k)[0].shape[axes.index(axis) - len(axes)] for axis in 'bc')
  return StageCache(
    k=k,
    v=v,
    length=length,
    margin=jnp.full((batch, slots), NEVER_EVICTED, jnp.float32),
    generated=jnp.zeros(batch, jnp.int32),
    evicted=jnp.zeros(batch, jnp.int32),
    shift=shift,
    first=first,
    gated=gated,
    budget=budget,
    arrangement=arrangement,
    candidates=candidates,
    recent=jnp.zeros((batch, window), jnp.int32) if window else None,
  )


def insert(cache: Cache, new: Cache, at: jax.Array) -> Cache:
  """The rows of `new` in the places int32[N] `at` of a cache of the same run with as many slots or more.

  What was in those places is gone; slots that `new` does not have are beyond all write pointers.
  """
  stages = tuple(old.with_rows(rows, at) for old, rows in zip(cache.stages, new.stages))
  gate, left = (
    jax.tree.map(lambda old, rows: put(old, rows, at), *pair) for pair in ((cache.gate, new.gate), (cache.left, new.left))
  )
  return Cache(stages, put(cache.position, new.position, at), gate, left)


def stacked(cache: StageCache, kv_heads: int) -> StageCache:
  """The same cache with k and v as float[L, B, C, K, H]: to look at, a copy where they lie otherwise."""
  lies = cache.arrangement

  def stack(held: Layers, axes: str) -> jax.Array:
    if lies.apart:
      return jnp.stack([standing(x, axes, kv_heads) for x in held])
    return standing(held, axes, kv_heads)

  if lies.keys == STACKED.keys and not lies.int8:
    return cache
  k, v = stack(cache.k, lies.keys), stack(cache.v, lies.values)
  return dataclasses.replace(cache, k=k, v=v, arrangement=STACKED)


def rotary_positions(cache: StageCache, position: jax.Array) -> jax.Array:
  """Positions int32[B, T] in the conversation -> int32[B, T], as the stage numbers them."""
  return position if cache.shift is None else position - cache.shift[:, None]


def read_for(cache: StageCache, hidden: jax.Array) -> StageCache:
  """The same cache, whose write pointers cannot be known before `hidden` float[B, T, D] is there, for which it is read.

  Otherwise nothing says that a layer that lies apart is read before it is written, and XLA's CPU compiler copies it twice for
  every token. It drops `optimization_barrier` before it looks for that; no pass of it simplifies this.
  """
  if not cache.arrangement.apart:
    return cache
  return dataclasses.replace(cache, length=jnp.minimum(cache.length, not_before(hidden)))


def append_chunk(cache: StageCache, k: Layers, v: Layers, count: jax.Array, keep: jax.Array | None = None) -> StageCache:
  """Appends the first `count[b]` of T tokens k, v: of each layer float[B, T, K, H].

  Of these only what bool[B, T] `keep` says, if given. The caller guarantees that they fit (`CacheSpec.later_tokens`); what does
  not fit is not written.
  """
  steps = jnp.arange(k[0].shape[1])
  beyond = cache.slots + steps  # distinct, as the scatter promises unique indices
  stays = steps < count[:, None]
  if keep is not None:
    stays &= keep
  place = cache.length[:, None] + jnp.cumsum(stays, axis=1, dtype=jnp.int32) - 1
  slot = jnp.where(stays, place, beyond)
  length = cache.length + stays.sum(-1, dtype=jnp.int32)
  return dataclasses.replace(cache, **written(cache, k, v, slot), length=length)


def append_judged(
  cache: StageCache,
  k: Layers,
  v: Layers,
  keep: jax.Array,
  margin: jax.Array,
  active: jax.Array,
  number: jax.Array | None = None,
) -> StageCache:
  """Writes one generated token per row and applies the gate.

  Args:
    cache: the stage's cache.
    k, v: of each layer float[B, 1, K, H].
    keep: bool[B]; margin: float32[B], the larger the more worth keeping.
    active: bool[B]; rows that have ended write nothing.
    number: int32[B], of the token among the generated ones. In a cache with `recent` slots it is not the new token that is judged,
      but the one that leaves them; `keep` is True where there is none.
  """
  if cache.recent is not None:
    return _append_later_judged(cache, k, v, keep, margin, active, number)
  rows = jnp.arange(keep.shape[0])
  keep = keep & active
  full = keep & (cache.generated >= cache.budget)
  weakest = jnp.argmin(cache.margin, axis=-1)
  weakest_margin = cache.margin[rows, weakest]
  replaces = full & (margin > weakest_margin)  # otherwise the new token itself is given up
  nowhere = cache.slots
  slot = jnp.where(replaces, weakest, jnp.where(active, cache.length, nowhere)).astype(jnp.int32)
  stays = keep & (~full | replaces)
  grows = (keep & ~full).astype(jnp.int32)
  return dataclasses.replace(
    cache,
    **written(cache, k, v, slot[:, None]),
    margin=cache.margin.at[rows, jnp.where(stays, slot, nowhere)].set(margin, mode='drop'),
    length=cache.length + grows,
    generated=cache.generated + grows,
    evicted=cache.evicted + full.astype(jnp.int32),
  )


def _append_later_judged(cache, k, v, keep, margin, active, number) -> StageCache:
  """The new token takes the slot of the one that leaves, if that is dropped, else a new one, or the weakest one's of a full row."""
  rows, window, nowhere = jnp.arange(keep.shape[0]), cache.recent.shape[1], cache.slots
  place = number % window
  leaving = cache.recent[rows, place]
  stays = keep & active
  margins = cache.margin.at[rows, jnp.where(stays & (number >= window), leaving, nowhere)].set(margin, mode='drop')
  full = stays & (cache.generated >= cache.budget)
  slot = jnp.where(full, jnp.argmin(margins, axis=-1), jnp.where(stays, cache.length, leaving))
  slot = jnp.where(active, slot, nowhere).astype(jnp.int32)
  grows = (stays & ~full).astype(jnp.int32)
  return dataclasses.replace(
    cache,
    **written(cache, k, v, slot[:, None]),
    margin=margins.at[rows, slot].set(NEVER_EVICTED, mode='drop'),
    length=cache.length + grows,
    generated=cache.generated + grows,
    evicted=cache.evicted + full.astype(jnp.int32),
    recent=cache.recent.at[rows, jnp.where(active, place, window)].set(slot, mode='drop'),
  )
