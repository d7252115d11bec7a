"""Max-pooling of the image tokens of rows by different kernels, in sequences whose length stays.

Axes: B batch, S sequence, D width.
"""

import jax
import jax.numpy as jnp

from dynllava_jax.ops import layout


def pool_rows(
  x: jax.Array,
  places: jax.Array,
  image_start: jax.Array,
  side: jax.Array,
  kernel: jax.Array,
  weight: jax.Array,
  largest: int,
  ceil: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Pools the grid of each row, multiplies it, and moves what stands behind it to the left; zeros follow.

  Args:
    x: float[B, S, D]; places: int32[B, S], where each row stood in the full sequence, -1 for padding, which is last.
    image_start: int32[B], -1 for rows without image.
    side: int32[B], the grid is `side` x `side`; kernel: int32[B].
    weight: float32[B].
    largest: the largest `kernel` that there may be.
    ceil: whether rows and columns that fill no square are one too, or left out.

  Returns:
    (float[B, S, D], int32[B, S] places, of a pooled token that of its first one; int32[B] side of what is left).
  """
  small = -(-side // kernel) if ceil else side // kernel
  old, new = (side * side)[:, None], (small * small)[:, None]
  slot = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
  start = jnp.maximum(image_start, 0)[:, None]
  has_image = (image_start >= 0)[:, None]
  number = slot - start
  is_image = has_image & (number >= 0) & (number < new)
  across = jnp.maximum(small, 1)[:, None]
  row, column = number // across * kernel[:, None], number % across * kernel[:, None]
  source = lambda down, right: start + (row + down) * side[:, None] + column + right
  inside = lambda index: jnp.clip(index, 0, x.shape[1] - 1)
  best = jnp.full(x.shape, -jnp.inf, x.dtype)
  for down in range(largest):
    for right in range(largest):
      within = (row + down < side[:, None]) & (column + right < side[:, None])
      taken = ((down < kernel) & (right < kernel))[:, None] & within
      value = layout.gather_rows(x, inside(source(down, right)))
      best = jnp.where(taken[..., None], jnp.maximum(best, value), best)
  behind = jnp.where(has_image & (number >= new), slot - new + old, slot)
  real = behind < x.shape[1]
  moved = layout.gather_rows(x, inside(behind)) * real[..., None].astype(x.dtype)
  index = jnp.where(is_image, source(0, 0), behind)
  moved_places = jnp.where(real | is_image, layout.gather_rows(places, inside(index)), -1)
  # Elsewhere `best` may be -inf, which times a gradient of 0 is no number.
  pooled = jnp.where(is_image[..., None], best, 0) * weight[:, None, None].astype(x.dtype)
  out = jnp.where(is_image[..., None], pooled, moved)
  return jnp.where((moved_places >= 0)[..., None], out, 0), moved_places, small
