"""Scores by which generated tokens choose among image tokens, against loops written from their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from dynllava_jax.config import ConfigError, RelevanceConfig
from dynllava_jax.methods import revisit

BATCH, ROWS, CANDIDATES, WIDTH, SIZE = 2, 3, 7, 10, 8
TURN = np.float32(np.random.default_rng(9).normal(size=(SIZE, SIZE)))


def rotate(x):
  """Some linear map in place of a rotation by position."""
  return x @ TURN


def numbers(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def weights_of(name):
  shapes = revisit.REVISITS[name].weights(WIDTH, RelevanceConfig(score=name, width=SIZE, num_heads=2))
  return {key: numbers(*shape, seed=i + 5) for i, (key, shape) in enumerate(shapes.items())}


def expected(name, x, image, w):
  """The score of one row float[D] for each candidate float[M, D]."""
  q, k = rotate(x @ w['q']), rotate(image @ w['k'])
  if name == 'dot':
    return k @ q / np.sqrt(SIZE)
  if name == 'mlp':
    return np.array([np.tanh(q + one) @ w['v'][:, 0] for one in k])
  seen = softmax(k @ q / np.sqrt(SIZE)) @ (image @ w['v'])
  y = q + rotate(seen @ w['o'])
  hidden = y / np.sqrt(np.mean(y**2) + 1e-6) @ w['up']
  hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
  return rotate(image @ w['pointer']) @ (y + hidden @ w['down']) / np.sqrt(SIZE)


@pytest.mark.parametrize('name', ['dot', 'mlp', 'transformer'])
def test_learned_scores_are_their_formulas_whatever_the_order_of_candidates(name):
  piece, w = revisit.REVISITS[name], weights_of(name)
  x, image = numbers(BATCH, ROWS, WIDTH, seed=1), numbers(BATCH, CANDIDATES, WIDTH, seed=2)
  score = lambda image: np.asarray(piece.score(piece.queries(x, rotate, w), piece.keys(image, rotate, w), w, rotate))
  found = score(image)
  want = [[expected(name, row, candidates, w) for row in rows] for rows, candidates in zip(x, image)]
  np.testing.assert_allclose(found, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())
  order = np.random.default_rng(3).permutation(CANDIDATES)
  np.testing.assert_allclose(score(image[:, order]), found[..., order], rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_attention_is_a_softmax_in_each_head_and_then_a_mean():
  heads, kv_heads, head_dim = 4, 2, 6
  q, k = numbers(BATCH, ROWS, heads, head_dim), numbers(BATCH, CANDIDATES, kv_heads, head_dim, seed=1)
  want = np.zeros((BATCH, ROWS, CANDIDATES))
  for b, t, h in np.ndindex(BATCH, ROWS, heads):
    want[b, t] += softmax(k[b, :, h // (heads // kv_heads)] @ q[b, t, h] / np.sqrt(head_dim)) / heads
  np.testing.assert_allclose(revisit.attention_score(q, k, {}), want, rtol=1e-5, atol=1e-6)
  raw = np.einsum('btnh,bmnh->btm', q, k.repeat(2, 2))  # the mean of products without a softmax is another choice
  assert (np.argsort(raw, -1)[..., -3:] != np.argsort(want, -1)[..., -3:]).any()


def test_ties_go_to_the_lowest_index():
  scores = jnp.array([[1.0, 2.0, 2.0, 0.0, 2.0, 2.0], [0.0] * 6])
  index = revisit.choose(scores, 3)
  np.testing.assert_array_equal(index, [[1, 2, 4], [0, 1, 2]])
  np.testing.assert_array_equal(revisit.seen(index, 6), [[0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize('options', [{}, {'tokens': 3, 'keep_rate': 0.5}, {'keep_rate': 1.5}, {'tokens': -1}])
def test_a_number_that_cannot_be_is_refused(options):
  with pytest.raises(ConfigError):
    revisit.Options(**options)


def test_a_share_is_of_the_runs_image_tokens():
  assert revisit.Options(keep_rate=0.1).count(576) == 57
