"""Numbers kept in bfloat16 that small steps must still move: rounded up or down at random, right on average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

LOST = 16  # bits of a float32 that bfloat16 does not have


def round_at_random(key: jax.Array, x: jax.Array) -> jax.Array:
  """float32[...] -> bfloat16[...], to one of the two neighbours, each as often as it is near; exact numbers stay."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  rounded = jax.lax.bitcast_convert_type(bits >> LOST << LOST, jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def store(key: jax.Array, tree: Any, like: Any) -> Any:
  """The tree's numbers in the dtypes of `like`; float32 that becomes bfloat16 is rounded at random."""
  leaves, structure = jax.tree.flatten(tree)

  def cast(i, x, old):
    if x.dtype == jnp.float32 and old.dtype == jnp.bfloat16:
      return round_at_random(jax.random.fold_in(key, i), x)
    return x.astype(old.dtype)

  return structure.unflatten([cast(i, x, old) for i, (x, old) in enumerate(zip(leaves, jax.tree.leaves(like)))])


def cast_floats(tree: Any, dtype: Any) -> Any:
  """All floating point numbers of a tree in `dtype`."""
  return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


class StoredMoments(NamedTuple):
  """State of `moments_in`: what `inner` keeps, and how often it was rounded."""

  count: jax.Array
  inner: Any


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """`inner`, which sees float32 gradients and parameters whatever they are stored as."""

  def update(updates, state, params=None):
    return inner.update(cast_floats(updates, jnp.float32), state, cast_floats(params, jnp.float32))

  return optax.GradientTransformation(lambda params: inner.init(cast_floats(params, jnp.float32)), update)


def moments_in(dtype: Any, inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """`inner`, whose state is stored in `dtype` between the steps and computed in float32."""

  def init(params):
    return StoredMoments(jnp.zeros((), jnp.int32), cast_floats(inner.init(params), dtype))

  def update(updates, state, params=None):
    updates, new = inner.update(updates, cast_floats(state.inner, jnp.float32), params)
    return updates, StoredMoments(state.count + 1, store(jax.random.key(state.count), new, state.inner))

  return optax.GradientTransformation(init, update)
