"""Arrays of layers that a cache holds, as they lie in memory (`arrangement`): what is written to which slots and rows.

Axes: L layers of the stage, B batch, C slots, K kv heads, H head dim, X both of these.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax.arrangement import STACKED, Arrangement
from dynllava_jax.ops.int8 import SCALE_AXES, Int8, quantised, restored

Held = jax.Array | Int8
Layers = Held | tuple[Held, ...]  # of a stage: one stack of all layers, or an array for each


def put(old: jax.Array | None, rows: jax.Array | None, at: jax.Array, *before: Any) -> jax.Array | None:
  """`rows` in the places int32[N] `at` of an array [..., B, ...]; `before` indexes the axes in front of the rows'."""
  return None if old is None else old.at[*before, at].set(rows.astype(old.dtype), mode='drop', unique_indices=True)


def put_layers(old: Layers, rows: Layers, lies: Arrangement, axes: str, more: int, at: jax.Array) -> Layers:
  """The same of all layers, whose axes are as `axes` says; `rows` has `more` slots less."""
  if lies.apart:
    layer = lambda axes, a, b: put(a, widened(b, axes, more), at)
    return tuple(each(layer, axes, a, b) for a, b in zip(old, rows, strict=True))
  return each(lambda axes, a, b: put(a, widened(b, axes, more), at, layers_of(a, lies.flat, 1)), axes, old, rows)


def not_before(hidden: jax.Array) -> jax.Array:
  """int32[B], larger than any slot, which is not known before `hidden` float[B, T, D] is."""
  bits = jax.lax.bitcast_convert_type(hidden[:, 0, 0].astype(jnp.float32), jnp.uint32)
  return (bits >> 1 | 2**30).astype(jnp.int32)


def written(cache: Any, k: Layers, v: Layers, slot: jax.Array) -> dict[str, Layers]:
  """New keys and values, of each layer float[B, T, K, H], in the slots int32[B, T], or int32[L, B, T] where layers differ.

  Slots beyond the end are dropped.
  """
  lies, rows, differ = cache.arrangement, jnp.arange(slot.shape[-2])[:, None], slot.ndim == 3

  def put(axes: str, old: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    place = tuple({'b': rows, 'c': slot}.get(axis, slice(None)) for axis in axes)
    if not lies.apart:  # one scatter for all layers
      place = layers_of(old, differ or lies.flat or axes == SCALE_AXES, 2), *place
      new = new.reshape(*new.shape[:3], -1) if 'x' in axes else new
    return old.at[place].set(new.astype(old.dtype), mode='drop', unique_indices=True)

  def write(held: Layers, new: Layers, axes: str) -> Layers:
    made = quantised if lies.int8 else lambda x: x
    if not lies.apart:
      return each(lambda axes, a, b: put(axes, a, b, slot), axes, held, made(new))
    slots = slot if differ else [slot] * len(held)
    layers = zip(held, new, slots, strict=True)
    return tuple(each(lambda axes, a, b, c=c: put(axes, a, b, c), axes, a, made(b)) for a, b, c in layers)

  return {'k': write(cache.k, k, lies.keys), 'v': write(cache.v, v, lies.values)}


def layers_of(held: jax.Array, named: bool, behind: int) -> slice | jax.Array:
  """All layers of a stack, as an index with `behind` more axes of indices.

  Where heads are flat each layer is named: with layers in the window XLA's TPU compiler transposes the whole cache to write to it.
  """
  return jnp.arange(len(held)).reshape(-1, *[1] * behind) if named else slice(None)


def each(function: Callable[..., jax.Array], axes: str, *held: Held) -> Held:
  """`function(axes, *arrays)` of arrays, or of the values and of the scales of such as are held as int8."""
  if not isinstance(held[0], Int8):
    return function(axes, *held)
  return Int8(function(axes, *(x.values for x in held)), function(SCALE_AXES, *(x.scale for x in held)))


def lying(x: jax.Array, axes: str, lies: Arrangement) -> Held:
  """A layer's keys or values float[B, C, K, H] as they are held."""
  order = lambda axes, x: x.reshape(*x.shape[:2], -1) if 'x' in axes else x.transpose(['bckh'.index(a) for a in axes])
  return each(order, axes, quantised(x) if lies.int8 else x)


def standing(held: Held, axes: str, kv_heads: int) -> jax.Array:
  """The inverse of `lying`, also of stacked layers where they are not apart; of int8 what it stands for, in float32."""
  heads = lambda axes, x: x.reshape(*x.shape[:-1], kv_heads, -1) if 'x' in axes else x
  axes, held = axes.replace('x', 'kh'), each(heads, axes, held)
  plain = restored(held, axes)
  return plain if axes == STACKED.keys else plain.transpose([axes.index(a) for a in STACKED.keys])


def widened(x: jax.Array, axes: str, more: int) -> jax.Array:
  """With so many more slots; its last axes are `axes`."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - len(axes)) + [(0, more * (a == 'c')) for a in axes])
