"""A vision tower for smaller pictures: the same weights, position embeddings interpolated. The downsampled-image baseline."""

from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax.config import VisionConfig


def resize_tower(params: dict[str, Any], old: VisionConfig, new: VisionConfig) -> dict[str, Any]:
  """Parameters in checkpoint form for another image size, position embeddings resized bicubically on their grid.

  Args:
    params: with `vision/position_embedding` float[P + 1, D], class token first; shared, not changed.
    old, new: differ in `image_size`.

  Returns:
    The same tree if the sizes are equal.
  """
  if old.image_size == new.image_size:
    return params
  embedding = params['vision']['position_embedding']
  sides = [round(v.num_patches**0.5) for v in (old, new)]
  grid = embedding[1:].astype(jnp.float32).reshape(sides[0], sides[0], -1)
  grid = jax.image.resize(grid, (sides[1], sides[1], grid.shape[-1]), 'bicubic').reshape(sides[1] ** 2, -1)
  embedding = jnp.concatenate([embedding[:1], grid.astype(embedding.dtype)])
  return params | {'vision': params['vision'] | {'position_embedding': embedding}}
