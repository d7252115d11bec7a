"""Mixture of depths over image tokens: which of them pass a layer, and how the others come back behind it.

All text passes. What passes is one short sequence in the old order, so causal attention needs no mask; the rest waits where it is.
Axes: B batch, S rows of the sequence, S' those that pass, P image tokens, D width, C cache slots.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.ops import layout


def best(scores: jax.Array, quota: int | jax.Array, frames: int = 1) -> jax.Array:
  """bool[B, P]: of float32[B, P] scores the `quota` largest of each of `frames` equal parts. Ties: lowest index.

  `quota` may be an int32[]: layers that are scanned together may each have their own.
  """
  parts = scores.reshape(*scores.shape[:-1], frames, -1)
  order = jnp.argsort(jax.lax.stop_gradient(parts), axis=-1, stable=True, descending=True)
  return (jnp.argsort(order, axis=-1) < quota).reshape(scores.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Route:
  """Who passes a layer.

  Attributes:
    passes: bool[B, S], and is_image: bool[B, S].
    weight: float32[B, S], of image rows; 1 for all others.
    index: int32[B, S'], rows that pass, in order, arbitrary ones behind; length: int32[B], how many.
  """

  passes: jax.Array
  is_image: jax.Array
  weight: jax.Array
  index: jax.Array
  length: jax.Array

  def take(self, x: jax.Array) -> jax.Array:
    """The rows that pass: [B, S, ...] -> [B, S', ...]."""
    return layout.gather_rows(x, self.index)

  def put_back(self, passed: jax.Array, waited: jax.Array) -> jax.Array:
    """The whole sequence of the rows float[B, S', D] that have passed and those of float[B, S, D] that have not."""
    place = jnp.maximum(jnp.cumsum(self.passes, axis=-1, dtype=jnp.int32) - 1, 0)
    return jnp.where(self.passes[..., None], layout.gather_rows(passed, place), waited)


def route(chosen: jax.Array, weight: jax.Array, image_start: jax.Array, length: jax.Array, rows: int, budget: int) -> Route:
  """The route of a sequence of `rows` rows.

  Args:
    chosen: bool[B, P], image tokens that pass, `budget` of a row at most.
    weight: float32[B, P], of all of them.
    image_start: int32[B], -1 for rows without image, whose text must fit into S - P + budget; length: int32[B], real rows.
  """
  places = jnp.arange(rows)[None]
  slot, is_image = layout.image_slots(places, image_start, chosen.shape[1])
  passes = (places < length[:, None]) & (~is_image | layout.gather_rows(chosen, slot))
  index, passing = layout.compact(passes, rows - chosen.shape[1] + budget)
  return Route(passes, is_image, jnp.where(is_image, layout.gather_rows(weight, slot), 1.0), index, passing)


def right_aligned(x: jax.Array, first: jax.Array) -> jax.Array:
  """Moves the rows [B, C, ...] of a cache back by int32[B] `first` slots; what then stands before them is arbitrary."""
  return layout.gather_rows(x, jnp.maximum(jnp.arange(x.shape[1])[None] - first[:, None], 0))
