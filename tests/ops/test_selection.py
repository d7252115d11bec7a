"""Top-k and Gumbel-softmax keep decisions."""

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.ops.selection import gumbel_keep, keep_margin, top_indices


def test_top_indices_are_ascending_and_ties_take_the_lowest():
  scores = jnp.array([[0.1, 0.9, 0.5, 0.9], [1.0, 1.0, 1.0, 1.0]])
  np.testing.assert_array_equal(top_indices(scores, 2), [[1, 3], [0, 1]])


def test_keep_margin_is_keep_minus_drop():
  np.testing.assert_allclose(keep_margin(jnp.array([[2.0, 0.5], [0.0, 1.0]])), [1.5, -1.0])


def test_gumbel_keep_is_hard_forward_and_soft_backward():
  logits = jax.random.normal(jax.random.key(0), (64, 2))
  noise = jax.random.gumbel(jax.random.key(1), (64, 2))
  sample = gumbel_keep(logits, noise, jnp.float32(0.7))
  assert set(np.unique(np.round(sample, 6))) == {0.0, 1.0}
  soft = lambda x: jax.nn.softmax((jax.nn.log_softmax(x, -1) + noise) / 0.7, -1)[:, 0].sum()
  hard = lambda x: gumbel_keep(x, noise, jnp.float32(0.7)).sum()
  np.testing.assert_allclose(jax.grad(hard)(logits), jax.grad(soft)(logits), atol=1e-6)


def test_a_tie_keeps():
  assert gumbel_keep(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.float32(1.0))[0] == 1
