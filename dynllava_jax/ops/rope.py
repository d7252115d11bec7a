"""Rotary position embedding in LLaMA's half-split form (arXiv 2104.09864; pairs are (i, i + H/2))."""

import jax
import jax.numpy as jnp


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of every position and frequency.

  Args:
    positions: int32[B, T].
    head_dim: even.
    theta: base of the frequencies.

  Returns:
    (cos, sin), each float32[B, T, head_dim // 2].
  """
  frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angles = positions[..., None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates float[B, T, N, H] by float32[B, T, H/2] angles; computed in float32, returned in x.dtype."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
