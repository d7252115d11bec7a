"""Rotary position embedding in LLaMA's half-split form (arXiv 2104.09864; pairs are (i, i + H/2))."""

import jax
import jax.numpy as jnp

from dynllava_jax.config import RopeScaling


def rope_angles(
  positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of every position and frequency.

  Args:
    positions: int32[B, T].
    head_dim: even.
    theta: base of the frequencies.
    scaling: how they are stretched, if at all.

  Returns:
    (cos, sin), each float32[B, T, head_dim // 2].
  """
  frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  if scaling is not None:
    frequencies = scaled_frequencies(frequencies, scaling)
  angles = positions[..., None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def scaled_frequencies(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
  """float32[H/2] -> float32[H/2], stretched.

  'linear' is position interpolation (arXiv 2306.15595). 'llama3' (Llama 3.1's reference code) divides those that turn less
  than `low_freq_factor` times over the original context, leaves those that turn more than
  `high_freq_factor` times, and blends in between.
  """
  if scaling.kind == 'linear':
    return frequencies / scaling.factor
  turns = scaling.original_max_positions * frequencies / (2 * jnp.pi)
  untouched = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  untouched = jnp.clip(untouched, 0, 1)
  return frequencies * (untouched + (1 - untouched) / scaling.factor)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates float[B, T, N, H] by float32[B, T, H/2] angles; computed in float32, returned in x.dtype."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
