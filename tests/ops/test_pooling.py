"""Rows pooled by kernels of their own are what each is alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynllava_jax.methods import dpn
from dynllava_jax.ops import pooling

SIDE, TEXT = 5, 6
STARTS, KERNELS = [2, -1, 0, 3], [2, 1, 1, 4]


@pytest.mark.parametrize('ceil', [False, True])
def test_rows_are_pooled_by_their_own_kernels(ceil):
  size = SIDE * SIDE + TEXT
  x = np.random.default_rng(0).standard_normal((4, size, 3)).astype(np.float32)
  lengths = np.asarray([size, 4, size - 1, size - 2])
  places = np.where(np.arange(size) < lengths[:, None], np.arange(size), -1)
  side = jnp.asarray([SIDE, 0, SIDE, SIDE])
  given = jnp.asarray(x), jnp.asarray(places), jnp.asarray(STARTS), side, jnp.asarray(KERNELS), jnp.asarray([0.5, 1.0, 0.25, 2.0])
  out, where, small = jax.jit(pooling.pool_rows, static_argnames=('largest', 'ceil'))(*given, largest=4, ceil=ceil)
  assert small.tolist() == ([3, 0, 5, 2] if ceil else [2, 0, 5, 1])
  for row, (start, kernel, weight) in enumerate(zip(STARTS, KERNELS, [0.5, 1, 0.25, 2])):
    real = x[row, : lengths[row]]
    if start < 0:
      expected, came_from = real, np.arange(lengths[row])
    else:
      image, options = real[start : start + SIDE * SIDE], dpn.Options(kernel=kernel, ceil=ceil)
      pooled, first = dpn.pool(jnp.asarray(image[None]), options)
      expected = np.concatenate([real[:start], np.asarray(pooled[0]) * weight, real[start + SIDE * SIDE :]])
      behind = np.arange(start + SIDE * SIDE, lengths[row])
      came_from = np.concatenate([np.arange(start), start + np.asarray(first), behind])
    np.testing.assert_array_equal(out[row, : len(expected)], expected)
    assert not out[row, len(expected) :].any()
    np.testing.assert_array_equal(where[row, : len(expected)], came_from)
    assert (np.asarray(where[row, len(expected) :]) == -1).all()


def test_the_gradient_goes_to_the_largest_and_is_a_number():
  x, start = jnp.arange(2 * 6.0).reshape(2, 6, 1), jnp.asarray([1, -1])
  places = jnp.broadcast_to(jnp.arange(6), (2, 6))

  def total(x, weight):
    out, _, _ = pooling.pool_rows(x, places, start, jnp.asarray([2, 0]), jnp.asarray([2, 1]), weight, 2)
    return out.sum()

  of_x, of_weight = jax.grad(total, (0, 1))(x, jnp.ones(2))
  np.testing.assert_array_equal(of_x[..., 0], [[1, 0, 0, 0, 1, 1], [1] * 6])
  np.testing.assert_array_equal(of_weight, [4, 0])
