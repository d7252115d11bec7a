"""Image arithmetic that runs on the device."""

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import VisionConfig


def normalize(pixels: jax.Array, cfg: VisionConfig) -> jax.Array:
  """uint8[B, R, R, 3] to float32 with the tower's mean and standard deviation per channel."""
  mean, std = np.asarray(cfg.image_mean, np.float32), np.asarray(cfg.image_std, np.float32)
  return (pixels.astype(jnp.float32) / 255 - mean) / std
