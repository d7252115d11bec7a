"""Votes on the context against their definition, one query after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynllava_jax.ops.pruning import Softness, Votes, log_keep, pruned_attention, vote


@pytest.mark.parametrize('alpha', [1.0, 1.5, 2.0, 4.0, 8.0])
def test_alpha_sigmoid_by_its_definition(alpha):
  """Two numbers that add up to 1, whose alpha-logarithms differ by the score; 0 and 1 beyond 1 / (alpha - 1)."""
  scores = np.linspace(-3, 3, 25)
  p = np.exp(np.asarray(log_keep(jnp.asarray(scores, jnp.float32), jnp.float32(alpha)), np.float64))
  power = alpha - 1
  beyond = np.abs(scores) * power >= 1
  np.testing.assert_array_equal(p[beyond], scores[beyond] > 0)
  p, inside = p[~beyond], scores[~beyond]
  log = np.log if alpha == 1 else lambda x: (x**power - 1) / power
  np.testing.assert_allclose(log(p) - log(1 - p), inside, atol=1e-5)
  slope = jax.vmap(jax.grad(lambda s: jnp.exp(log_keep(s, jnp.float32(alpha)))))(jnp.asarray(scores, jnp.float32))
  np.testing.assert_array_equal(np.asarray(slope)[beyond], 0)
  np.testing.assert_allclose(np.asarray(slope)[~beyond], 1 / (p ** (alpha - 2) + (1 - p) ** (alpha - 2)), rtol=1e-4)


def arrays(size, seed=0, rows=2, dim=4):
  rng = np.random.default_rng(seed)
  make = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), jnp.float32)
  votes = Votes(make(rows, size, dim), make(rows, size, dim), jnp.full(1, 1.5))
  return make(rows, size, 4, 8), make(rows, size, 2, 8), make(rows, size, 2, 8), votes


def by_definition(votes, row, length, keep):
  """(scores, what is left of each key for each query), [S, S]."""
  q, k = np.asarray(votes.q[row], np.float64), np.asarray(votes.k[row], np.float64)
  scores, size = q @ k.T / 2 + 1.5, len(q)
  left = np.ones((size, size))
  for j in range(size):
    for i in range(j + 1, size):
      left[i, j] = left[i - 1, j] * (keep(scores[i, j]) if i < length else 1)
  return scores, left


@pytest.mark.parametrize('softness', [None, 2.0])
def test_attention_over_what_is_left_in_blocks_of_queries(softness):
  """300 rows are three blocks; padding has no vote."""
  q, k, v, votes = arrays(300)
  lengths = (300, 170)
  soft = None if softness is None else Softness(jnp.float32(softness))
  out, survival = jax.jit(pruned_attention)(q, k, v, votes, jnp.asarray(lengths), soft)
  keep = (lambda s: float(s > 0)) if softness is None else (lambda s: min(max((s + 1) / 2, 0.0), 1.0))  # alpha 2 is a clipped line
  for row, length in enumerate(lengths):
    scores, left = by_definition(votes, row, length, keep)
    np.testing.assert_allclose(survival.of_keys[row], left, atol=1e-5)
    np.testing.assert_allclose(survival.total[row], left[: length - 1, :length].sum(), rtol=1e-5)
    weights = np.einsum('tngh,snh->ngts', np.asarray(q[row]).reshape(300, 2, 2, 8), np.asarray(k[row])) * 8**-0.5
    weights = np.tril(np.exp(weights) * left)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum('ngts,snh->tngh', weights, np.asarray(v[row])).reshape(300, 4, 8)
    np.testing.assert_allclose(out[row, :length], expected[:length], atol=1e-4)
    if softness is None:
      value = np.where(left[length - 1] > 0, scores[length - 1], -np.inf)
      value[length - 1], value[length:] = np.inf, -np.inf
      np.testing.assert_allclose(survival.value[row], value, atol=1e-5)


def test_dense_rows_keep_everything():
  q, k, v, votes = arrays(12)
  softness = Softness(jnp.float32(2.0), jnp.asarray([True, False]))
  _, survival = pruned_attention(q, k, v, votes, jnp.asarray([12, 12]), softness)
  assert survival.of_keys[0].min() == 1 and survival.of_keys[1].min() < 1
  assert survival.total.tolist()[0] == 11 * 12


def test_a_chunk_votes_as_its_tokens_do_one_by_one():
  """On a cache with holes, of rows with fewer tokens than the chunk, and with none."""
  _, _, _, votes = arrays(5, rows=3)
  rng = np.random.default_rng(3)
  keys, held = jnp.asarray(rng.normal(0, 1, (3, 7, 4)), jnp.float32), jnp.asarray(rng.random((3, 7)) < 0.7)
  count = jnp.asarray([5, 3, 0])
  ballot = vote(votes, keys, held, count)
  for row in range(3):
    alive, among = np.asarray(held[row]), np.zeros(5, bool)
    for step in range(int(count[row])):
      one = Votes(votes.q[row, step][None, None], votes.k[row, step][None, None], votes.bias)
      alive = alive & np.asarray(one.scores(keys[row][None])[0, 0] > 0)
      among = among & np.asarray(one.scores(votes.k[row][None])[0, 0] > 0)
      among[step] = True
      np.testing.assert_array_equal(ballot.seen[row, step], alive)
      np.testing.assert_array_equal(ballot.among[row, step], among)
    np.testing.assert_array_equal(ballot.old[row] > -jnp.inf, alive)
    np.testing.assert_array_equal(ballot.new[row] > -jnp.inf, among)
  assert jnp.isposinf(ballot.new[0, 4]) and jnp.isposinf(ballot.new[1, 2])
