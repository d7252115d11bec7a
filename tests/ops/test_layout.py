"""Index arithmetic of token layout, drawn out on small rows."""

import jax.numpy as jnp
import numpy as np

from dynllava_jax.ops import layout

POSITIONS = jnp.broadcast_to(jnp.arange(10), (2, 10))


def test_merge_puts_image_tokens_in_their_places_and_leaves_text_rows_alone():
  text, image = jnp.zeros((2, 6, 1)), jnp.array([[[7.0], [8.0], [9.0]]] * 2)
  merged = layout.merge_image(text, image, jnp.array([2, -1]))[..., 0]
  np.testing.assert_array_equal(merged, [[0, 0, 7, 8, 9, 0], [0] * 6])


def test_keep_mask_then_compact_keeps_positions():
  keep = layout.keep_mask(POSITIONS, jnp.array([10, 4]), jnp.array([3, -1]), 4, jnp.array([[1, 3], [0, 1]]))
  np.testing.assert_array_equal(keep[0], [1, 1, 1, 0, 1, 0, 1, 1, 1, 1])
  np.testing.assert_array_equal(keep[1], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
  index, length = layout.compact(keep, 8)
  np.testing.assert_array_equal(layout.gather_rows(POSITIONS, index)[0], [0, 1, 2, 4, 6, 7, 8, 9])
  np.testing.assert_array_equal(index[1, :4], [0, 1, 2, 3])
  np.testing.assert_array_equal(length, [8, 4])


def test_take_image_rows():
  x = POSITIONS[..., None].astype(jnp.float32)
  np.testing.assert_array_equal(layout.take_image_rows(x, jnp.array([3, 6]), 4)[..., 0], [[3, 4, 5, 6], [6, 7, 8, 9]])


def test_split_rows_and_join_rows_are_inverse():
  x = jnp.arange(20.0).reshape(2, 10)
  for starts in ([3, 6], [0, 4], [-1, 2]):
    text, image = layout.split_rows(x, jnp.array(starts), 4)
    joined = layout.join_rows(text, image, jnp.array(starts))
    for row, start in enumerate(starts):
      real = 10 if start >= 0 else 6
      np.testing.assert_array_equal(joined[row, :real], x[row, :real])
    if starts == [3, 6]:
      np.testing.assert_array_equal(text, [[0, 1, 2, 7, 8, 9], [10, 11, 12, 13, 14, 15]])
      np.testing.assert_array_equal(image, [[3, 4, 5, 6], [16, 17, 18, 19]])
