"""How alike vectors are, in float32: what methods choose and merge tokens by."""

import jax
import jax.numpy as jnp


def unit(x: jax.Array) -> jax.Array:
  """float32[..., H] of length 1; a zero vector stays one."""
  x = x.astype(jnp.float32)
  squares = jnp.square(x).sum(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))


def cosines(x: jax.Array, y: jax.Array) -> jax.Array:
  """float32[B, n, m] of float[B, n, H] and float[B, m, H]; no gradient, as they serve choices."""
  x, y = jax.lax.stop_gradient((x, y))
  return jnp.einsum('bnh,bmh->bnm', unit(x), unit(y), precision='highest')
