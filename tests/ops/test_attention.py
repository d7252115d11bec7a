"""Attention forms against each other and against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynllava_jax.arrangement import TILED
from dynllava_jax.ops import attention
from dynllava_jax.ops.attention import (
  SMALLEST_BLOCK,
  attention_received,
  cached_attention,
  causal_attention,
  hollow_attention,
  policy_attention,
)
from dynllava_jax.ops.rope import apply_rope, rope_angles


@pytest.fixture(params=[4, 2], ids=['multi-head', 'grouped-query'])
def qkv(request):
  keys = jax.random.split(jax.random.key(0), 3)
  shape = (2, 9, request.param, 8)
  return (jax.random.normal(keys[0], (2, 9, 4, 8)), jax.random.normal(keys[1], shape), jax.random.normal(keys[2], shape))


def test_keeping_everything_is_causal_attention(qkv):
  np.testing.assert_allclose(policy_attention(*qkv, jnp.ones((2, 9))), causal_attention(*qkv), atol=3e-6)


def test_blocks_of_queries_change_nothing():
  """Against the formula of the authors' softmax over all keys at once, in float64, on two whole blocks and a part of one."""
  keys = jax.random.split(jax.random.key(2), 4)
  length = 2 * SMALLEST_BLOCK + 44
  q, k, v = (jax.random.normal(key, (1, length, 2, 8)) for key in keys[:3])
  policy = jax.random.bernoulli(keys[3], 0.3, (1, length)).astype(jnp.float32)
  x, y, z = (np.asarray(a[0], np.float64).transpose(1, 0, 2) for a in (q, k, v))
  scores = np.where(np.tri(length, dtype=bool), x @ y.transpose(0, 2, 1) / 8**0.5, -np.inf)

  def expected(kept, eps):
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * np.where(np.eye(length), 1.0, kept)
    return ((weights + eps / length) / (weights.sum(-1, keepdims=True) + eps) @ z).transpose(1, 0, 2)

  np.testing.assert_allclose(policy_attention(q, k, v, policy)[0], expected(np.asarray(policy), 1e-6), atol=3e-6)
  np.testing.assert_allclose(causal_attention(q, k, v)[0], expected(1.0, 0.0), atol=3e-6)


@pytest.mark.parametrize('kv_heads', [4, 2])
def test_gradient_of_the_policy_softmax_is_that_of_its_formula(kv_heads, monkeypatch):
  """Own gradient, over several blocks; policies between 0 and 1, so that theirs is not only where they are 1."""
  monkeypatch.setattr(attention, 'SMALLEST_BLOCK', 5)
  keys = jax.random.split(jax.random.key(4), 5)
  q = 3 * jax.random.normal(keys[0], (2, 17, 4, 8))  # rows whose largest key is dropped: there eps counts
  k, v = (jax.random.normal(key, (2, 17, kv_heads, 8)) for key in keys[1:3])
  policy = jnp.clip(1.5 * jax.random.uniform(keys[3], (2, 17)) - 0.4, 0, 1)
  towards = jax.random.normal(keys[4], q.shape)

  def formula(q, k, v, policy):
    k, v = (jnp.repeat(x, 4 // kv_heads, 2) for x in (k, v))
    scores = jnp.einsum('btnh,bsnh->bnts', q, k) / 8**0.5
    scores = jnp.where(jnp.tri(17, dtype=bool), scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)) * jnp.where(jnp.eye(17), 1.0, policy[:, None, None])
    weights = (weights + 1e-6 / 17) / (weights.sum(-1, keepdims=True) + 1e-6)
    return (jnp.einsum('bnts,bsnh->btnh', weights, v) * towards).sum()

  own = lambda *args: (policy_attention(*args) * towards).sum()
  expected, found = (jax.grad(f, (0, 1, 2, 3))(q, k, v, policy) for f in (formula, own))
  for a, b in zip(found, expected):
    np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * float(jnp.abs(b).max()))


def test_dropped_key_is_visible_to_itself_only(qkv):
  q, k, v = qkv
  policy = jnp.ones((2, 9)).at[:, 3].set(0)
  out = policy_attention(q, k, v, policy)
  changed = policy_attention(q, k, v.at[:, 3].add(5.0), policy)
  moved = jnp.abs(out - changed).max((0, 2, 3))
  assert moved[3] > 0.1
  assert moved[jnp.arange(9) != 3].max() < 1e-4  # eps / S leaks this much, as in the original


def test_cache_split_anywhere_is_causal_attention(qkv):
  q, k, v = qkv
  whole = causal_attention(q, k, v)
  pad = [(0, 0), (0, 4), (0, 0), (0, 0)]
  for split in (1, 5, 8):
    garbage = jnp.pad(k[:, :split], pad, constant_values=99.0), jnp.pad(v[:, :split], pad, constant_values=99.0)
    out = cached_attention(q[:, split:], k[:, split:], v[:, split:], *garbage, jnp.full(2, split))
    np.testing.assert_allclose(out, whole[:, split:], atol=3e-6)


@pytest.mark.parametrize('new', [1, 3])
def test_cache_whose_heads_lie_side_by_side(qkv, new):
  """Slots before `cache_first` and from `cache_length` on are not seen."""
  q, k, v = qkv
  old, first, length = 9 - new, jnp.array([0, 2]), jnp.array([5, 4])
  held = k[:, :old], v[:, :old]
  seen = q[:, old:], k[:, old:], v[:, old:]
  expected = cached_attention(*seen, *held, length, first)
  flat = (x.reshape(*x.shape[:2], -1) for x in held)
  np.testing.assert_allclose(cached_attention(*seen, *flat, length, first, TILED), expected, atol=3e-6)


def test_query_is_left_with_itself_if_all_keys_are_dropped(qkv):
  q, k, v = qkv
  out = policy_attention(jnp.zeros_like(q), k, v, jnp.zeros((2, 9)))  # equal scores: eps is small beside the key's own
  np.testing.assert_allclose(out, jnp.repeat(v, q.shape[2] // v.shape[2], 2), atol=1e-5)


def test_rope_scores_depend_on_distance_only():
  x = jax.random.normal(jax.random.key(1), (1, 1, 1, 16))

  def score(a, b):
    rotate = lambda p: apply_rope(x, *rope_angles(jnp.array([[p]]), 16, 1e4))
    return float((rotate(a) * rotate(b)).sum())

  assert score(3, 10) == pytest.approx(score(103, 110), abs=1e-3)
  assert abs(score(3, 10) - score(3, 11)) > 1e-2


def softmax_weights(q, k, visible):
  """float64[B, N, R, S] from the definition; query heads in order belong to the kv heads in order."""
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  k = np.repeat(k, q.shape[2] // k.shape[2], 2)
  scores = np.einsum('brnh,bsnh->bnrs', q, k) / q.shape[-1] ** 0.5
  scores = np.where(visible, scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def test_attention_received_is_the_weighted_sum_of_softmax_rows(qkv):
  q, k, _ = qkv
  causal = softmax_weights(q, k, np.tri(9, dtype=bool))
  weight = jnp.asarray(np.random.default_rng(0).random((2, 9)), jnp.float32)
  expected = np.einsum('bnrs,br->bns', causal, weight)
  np.testing.assert_allclose(attention_received(q, k, weight), expected, atol=1e-6)
  place = jnp.array([[8, 2, 5], [0, 7, 7]])
  few = jnp.take_along_axis(q, place[..., None, None], 1)
  expected = np.einsum('bnrs,br->bns', np.take_along_axis(causal, np.asarray(place)[:, None, :, None], 2), weight[:, :3])
  np.testing.assert_allclose(attention_received(few, k, weight[:, :3], place), expected, atol=1e-6)


def test_attention_received_in_blocks_leaves_padding_out():
  keys = jax.random.split(jax.random.key(3), 2)
  length = SMALLEST_BLOCK + 40
  q, k = jax.random.normal(keys[0], (1, length, 2, 8)), jax.random.normal(keys[1], (1, length, 1, 8))
  real = length - 7
  received = attention_received(q, k, (jnp.arange(length) < real)[None].astype(jnp.float32))
  expected = softmax_weights(q, k, np.tri(length, dtype=bool))[:, :, :real].sum(2)
  np.testing.assert_allclose(received, expected, atol=3e-5)
  assert (np.asarray(received)[..., real:] == 0).all()


@pytest.mark.parametrize('window', [1, 3, 100])
def test_hollow_attention_is_causal_attention_under_its_mask(qkv, window):
  """Two rows with the image at other places, one of them thinned; a text-only row sees all before it."""
  q, k, v = (jnp.concatenate([x, x[:1] + 0.1]) for x in qkv)
  start = np.array([2, 3, -1])
  index = np.array([[0, 1, 2, 3], [0, 4, 5, 9], [0, 1, 2, 3]])
  visible = np.broadcast_to(np.tri(9, dtype=bool), (3, 9, 9)).copy()
  for row in range(2):
    for i in range(4):
      for j in range(4):
        visible[row, start[row] + i, start[row] + j] &= index[row, i] - index[row, j] < window
  weights = softmax_weights(q, k, visible[:, None])
  values = np.repeat(np.asarray(v, np.float64), 4 // v.shape[2], 2)
  expected = np.einsum('bnts,bsnh->btnh', weights, values)
  out = np.asarray(hollow_attention(q, k, v, jnp.asarray(start), jnp.asarray(index), window))
  np.testing.assert_allclose(out[:2], expected[:2], atol=3e-6)
  np.testing.assert_allclose(out[2, :5], expected[2, :5], atol=3e-6)  # the text of such a row fits beside the image


def test_hollow_attention_computes_no_keys_that_nobody_sees():
  image, text, window = 1024, 64, 64
  shape = jax.ShapeDtypeStruct((1, image + text, 2, 8), jnp.float32)
  flops = lambda f, *args: jax.jit(f).lower(shape, shape, shape, *args).compile().cost_analysis()['flops']
  numbers = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1, image), jnp.int32)
  hollow = flops(lambda q, k, v, start, index: hollow_attention(q, k, v, start, index, window), *numbers)
  assert hollow < 0.45 * flops(causal_attention)  # each image row: the text, and at most a block and a window of the image
