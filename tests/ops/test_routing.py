"""Who passes a layer with a router, and how the others come back."""

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.ops import routing

P, TEXT = 6, 4
START, LENGTH = jnp.asarray([2, -1, 0]), jnp.asarray([10, 3, 8])


def test_the_best_pass_and_ties_go_to_the_lowest_index():
  scores = jnp.asarray([[1.0, 3, 3, -2, 3, 0], [0, 0, 0, 0, 0, 0], [-1, -2, -3, -4, -5, -6]])
  chosen = jax.jit(routing.best, static_argnames='frames')
  np.testing.assert_array_equal(chosen(scores, 2), [[0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
  np.testing.assert_array_equal(chosen(scores, 1, frames=3), [[0, 1, 1, 0, 1, 0], [1, 0] * 3, [1, 0] * 3])
  assert chosen(scores, jnp.asarray(6)).all() and not chosen(scores, jnp.asarray(0)).any()


def test_rows_that_wait_come_back_as_they_were_and_text_is_not_weighed():
  chosen = jnp.asarray([[0, 1, 0, 0, 1, 0]] * 3, bool)
  weight = jnp.full((3, P), 7.0)
  route = routing.route(chosen, weight, START, LENGTH, TEXT + P, 2)
  x = jnp.arange(3 * 10 * 2, dtype=jnp.float32).reshape(3, 10, 2)
  assert route.length.tolist() == [6, 3, 4] and route.take(x).shape == (3, TEXT + 2, 2)
  assert route.index[0].tolist() == [0, 1, 3, 6, 8, 9] and route.index[1, :3].tolist() == [0, 1, 2]
  back = route.put_back(-route.take(x), x)
  passed = np.zeros((3, 10), bool)
  passed[0, [0, 1, 3, 6, 8, 9]] = passed[1, :3] = passed[2, [1, 4, 6, 7]] = True
  np.testing.assert_array_equal(back, np.where(passed[..., None], -x, x))
  np.testing.assert_array_equal(route.weight, np.where(route.is_image, 7, 1))
  assert route.is_image.sum(-1).tolist() == [P, 0, P]


def test_keys_move_to_the_end_of_their_slots():
  k = jnp.arange(2 * 4.0).reshape(2, 4, 1, 1)
  moved = routing.right_aligned(k, jnp.asarray([2, 0]))[..., 0, 0]
  assert moved[0, 2:].tolist() == [0, 1] and moved[1].tolist() == [4, 5, 6, 7]
