"""Keys and values as int8 with one scale for each head of a token, by which the largest of its numbers becomes 127."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

SCALE_AXES = 'bkc'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """Of a layer, or of a stack of layers: int8 `values`, their axes as in `arrangement`, and float32 `scale` [B, K, C].

  Slots are the scales' last axis, which a TPU fills up to 128: kv heads would leave most of it empty.
  """

  values: jax.Array
  scale: jax.Array


def quantised(x: jax.Array) -> Int8:
  """Of float[..., B, C, K, H], with scales as float32[..., B, C, K]."""
  largest = jnp.abs(x).max(-1).astype(jnp.float32)
  scale = jnp.where(largest != 0, largest, 1) / 127
  return Int8(jnp.round(x / scale[..., None]).astype(jnp.int8), scale)


def restored(held: Any, axes: str) -> Any:
  """Float32 numbers of what is held as int8, its last axes named as in `arrangement`, heads apart; anything else as it is."""
  if not isinstance(held, Int8):
    return held
  order = [axes.replace('h', '').index(a) for a in SCALE_AXES]
  scale = jnp.moveaxis(held.scale, [-3, -2, -1], [n - 3 for n in order])
  return held.values.astype(jnp.float32) * jnp.expand_dims(scale, axes.index('h') - 4)
