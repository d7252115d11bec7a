"""Token layout: where image, prompt and generated tokens stand, and how a sequence is cut to the kept ones.

A row of S positions is described by three numbers: its length, the position of its first image token (-1
without image) and the number of image tokens, which stand next to each other:

    tokens      s s s i i i i q q q 0 0          length 10, image_start 3, 4 image tokens
    keep        1 1 1 0 1 0 1 1 1 1 0 0
    positions   0 1 2 4 6 7 8 9 . .              after `compact` to 10 positions; length 8

Every remaining token keeps the position it had in the full sequence, so its kind can always be told from it.
"""

import jax
import jax.numpy as jnp


def merge_image(text: jax.Array, image: jax.Array, image_start: jax.Array) -> jax.Array:
  """Puts image tokens into their places between the text embeddings.

  Args:
    text: float[B, S, D]; image: float[B, P, D].
    image_start: int32[B], -1 for rows without image (their text is returned as it is).

  Returns:
    float[B, S, D].
  """
  slot, is_image = image_slots(jnp.arange(text.shape[1])[None], image_start, image.shape[1])
  return jnp.where(is_image[..., None], jnp.take_along_axis(image, slot[..., None], 1, mode='clip'), text)


def image_slots(positions: jax.Array, image_start: jax.Array, num_image: int) -> tuple[jax.Array, jax.Array]:
  """Which image token, if any, stands at each original position.

  Returns:
    (int32[B, S] index into the image's tokens, clipped to be valid; bool[B, S] whether it is one).
  """
  offset = positions - image_start[:, None]
  is_image = (image_start[:, None] >= 0) & (offset >= 0) & (offset < num_image)
  return jnp.clip(offset, 0, num_image - 1), is_image


def take_image_rows(x: jax.Array, image_start: jax.Array, num_image: int) -> jax.Array:
  """The image tokens float[B, P, D] of a sequence float[B, S, D]; arbitrary rows where there is no image."""
  index = jnp.maximum(image_start, 0)[:, None] + jnp.arange(num_image)
  return jnp.take_along_axis(x, index[..., None], 1, mode='clip')


def keep_mask(positions: jax.Array, length: jax.Array, image_start: jax.Array, num_image: int, kept_image: jax.Array) -> jax.Array:
  """All text and the chosen image tokens.

  Args:
    positions: int32[B, S] original positions; length: int32[B] real entries; image_start: int32[B].
    num_image: image tokens of the full sequence.
    kept_image: int32[B, M] indices into them.

  Returns:
    bool[B, S].
  """
  rows = jnp.arange(positions.shape[0])[:, None]
  chosen = jnp.zeros((positions.shape[0], num_image), bool).at[rows, kept_image].set(True)
  slot, is_image = image_slots(positions, image_start, num_image)
  real = jnp.arange(positions.shape[1]) < length[:, None]
  return real & (~is_image | jnp.take_along_axis(chosen, slot, 1, mode='clip'))


def compact(keep: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """Indices of the kept entries, in order, followed by arbitrary padding.

  Args:
    keep: bool[..., S]; at most `size` of a row may be set.
    size: static length of the result.

  Returns:
    (int32[..., size], int32[...] number of kept entries).
  """
  order = jnp.argsort(~keep, axis=-1, stable=True)
  return order[..., :size].astype(jnp.int32), keep.sum(-1, dtype=jnp.int32)


def unmerged_rows(image_start: jax.Array, group: jax.Array, num_image: int, size: int) -> jax.Array:
  """Which row of a sequence with merged image tokens stands at each place of the full one.

  Args:
    image_start: int32[B], -1 for rows without image; their surplus places are given to the last row, which is padding.
    group: int32[B, P], for each patch the image token that holds it; num_image: how many of those there are.
    size: S, rows of the short sequence.

  Returns:
    int32[B, S + P - num_image].
  """
  patches = group.shape[1]
  places = jnp.arange(size + patches - num_image, dtype=jnp.int32)[None]
  slot, is_image = image_slots(places, image_start, patches)
  has_image = image_start[:, None] >= 0
  behind = jnp.where(has_image & (places >= image_start[:, None] + patches), places - patches + num_image, places)
  return jnp.where(is_image, image_start[:, None] + gather_rows(group, slot), jnp.minimum(behind, size - 1))


def mean_rows(x: jax.Array, row: jax.Array, size: int) -> jax.Array:
  """The mean over all places x float[B, N, ...] of a row: float[B, size, ...]; `row` int32[B, N], each row has one at least."""
  rows = jnp.arange(x.shape[0])[:, None]
  sums = jnp.zeros((x.shape[0], size, *x.shape[2:]), jnp.float32).at[rows, row].add(x.astype(jnp.float32))
  count = jnp.zeros((x.shape[0], size), jnp.float32).at[rows, row].add(1)
  return (sums / count.reshape(count.shape + (1,) * (x.ndim - 2))).astype(x.dtype)


def gather_rows(x: jax.Array, index: jax.Array) -> jax.Array:
  """x[b, index[b, i]] for x of shape [B, S, ...]; indices must be valid."""
  return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), 1, mode='clip')


def text_places(image_start: jax.Array, num_image: int, size: int) -> jax.Array:
  """Where the first `size` text rows of a sequence stand: int32[B, size]. Its image tokens stand next to each other."""
  order = jnp.arange(size, dtype=jnp.int32)
  behind = (image_start[:, None] >= 0) & (order >= image_start[:, None])
  return order + jnp.where(behind, num_image, 0)


def split_rows(x: jax.Array, image_start: jax.Array, num_image: int) -> tuple[jax.Array, jax.Array]:
  """Text rows [B, S - P, ...] and image rows [B, P, ...] of a sequence [B, S, ...]; `join_rows` is the way back.

  The text of a row without image must fit into S - P; its image rows are arbitrary.
  """
  text = text_places(image_start, num_image, x.shape[1] - num_image)
  image = jnp.minimum(jnp.maximum(image_start, 0)[:, None] + jnp.arange(num_image), x.shape[1] - 1)
  return gather_rows(x, text), gather_rows(x, image)


def join_rows(text: jax.Array, image: jax.Array, image_start: jax.Array) -> jax.Array:
  """The inverse of `split_rows`; rows without image end with arbitrary padding."""
  num_image = image.shape[1]
  places = jnp.arange(text.shape[1] + num_image)[None]
  slot, is_image = image_slots(places, image_start, num_image)
  behind = (image_start[:, None] >= 0) & (places >= image_start[:, None])
  text_slot = jnp.minimum(places - jnp.where(behind, num_image, 0), text.shape[1] - 1)
  is_image = is_image.reshape(is_image.shape + (1,) * (text.ndim - 2))
  return jnp.where(is_image, gather_rows(image, slot), gather_rows(text, jnp.maximum(text_slot, 0)))
