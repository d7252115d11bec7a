"""The write pointer, the gate and the eviction rule, on caches small enough to follow by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from dynllava_jax import cache as kv
from dynllava_jax.arrangement import APART, STACKED, TILED

ARRANGEMENT = STACKED  # each in turn


@pytest.fixture(params=[STACKED, TILED, APART], ids=['stacked', 'tiled', 'apart'], autouse=True)
def arrangement(request, monkeypatch):
  monkeypatch.setitem(globals(), 'ARRANGEMENT', request.param)


def prompt_cache(lengths, slots=4, **kw):
  """A gated one-layer cache whose keys are 1, 2, 3, ... and whose values are their negatives."""
  k = jnp.broadcast_to(jnp.arange(1.0, slots + 1)[:, None, None], (len(lengths), slots, 1, 1))
  settings = dict(gated=True, text_keep_budget=0.5, spec=kv.CacheSpec(max_new_tokens=4, later_tokens=2)) | kw
  held = kv.with_room(k, -k, kv.room_behind(**settings), ARRANGEMENT)
  layers = ((x,) if ARRANGEMENT.apart else x[None] for x in held)
  return kv.from_prompt(*layers, jnp.asarray(lengths), arrangement=ARRANGEMENT, **settings)


def held(cache, name):
  """float[B, C]"""
  return np.asarray(getattr(cache, name)[0]).reshape(cache.margin.shape)


def feed(cache, token, keep, margin, active=None):
  batch = cache.length.shape[0]
  k = jnp.full((1, batch, 1, 1, 1), float(token))
  as_row = lambda x: jnp.broadcast_to(jnp.asarray(x), (batch,))
  return kv.append_judged(cache, k, -k, as_row(keep), as_row(jnp.float32(margin)), as_row(True if active is None else active))


def visible(cache, row=0):
  return list(held(cache, 'k')[row, : cache.length[row]].astype(int))


def test_capacity_is_prompt_plus_later_plus_budget_plus_one():
  cache = prompt_cache([4])
  tiled = lambda slots: slots + -slots % ARRANGEMENT.multiple
  assert cache.budget == 2 and held(cache, 'k').shape[1] == tiled(4 + 2 + 2 + 1)
  ungated = prompt_cache([4], gated=False)
  assert ungated.budget == 4 and held(ungated, 'k').shape[1] == tiled(4 + 2 + 4)


def test_rejected_token_is_overwritten_by_the_next():
  cache = feed(prompt_cache([3]), 50, keep=False, margin=-1.0)
  assert visible(cache) == [1, 2, 3]
  cache = feed(cache, 60, keep=True, margin=1.0)
  assert visible(cache) == [1, 2, 3, 60]
  np.testing.assert_array_equal(held(cache, 'v')[0, :4], [-1, -2, -3, -60])


def test_full_cache_gives_up_the_smallest_margin():
  cache = prompt_cache([4])
  for token, margin in ((10, 2.0), (20, 1.0), (30, 3.0)):
    cache = feed(cache, token, True, margin)
  assert sorted(visible(cache)) == [1, 2, 3, 4, 10, 30] and cache.evicted[0] == 1
  cache = feed(cache, 40, True, 0.5)  # the new token is itself the weakest
  assert sorted(visible(cache)) == [1, 2, 3, 4, 10, 30] and cache.evicted[0] == 2


def test_what_stays_are_the_largest_margins_of_all_kept():
  rng = np.random.default_rng(0)
  margins = rng.permutation(20).astype(float) + 1
  cache = prompt_cache([4], spec=kv.CacheSpec(max_new_tokens=20), text_keep_budget=0.25)
  for token, margin in enumerate(margins, 100):
    cache = feed(cache, token, True, margin)
  strongest = {100 + int(i) for i in np.argsort(-margins)[:5]}
  assert set(visible(cache)) == {1, 2, 3, 4} | strongest
  assert cache.evicted[0] == 15


def test_eviction_does_not_depend_on_spare_slots():
  """A short prompt in a wide bucket evicts exactly as one that fills it."""
  cache = prompt_cache([1, 4])
  for token, margin in ((10, 2.0), (20, 1.0), (30, 3.0)):
    cache = feed(cache, token, True, margin)
  assert sorted(visible(cache, 0)[1:]) == sorted(visible(cache, 1)[4:]) == [10, 30]
  np.testing.assert_array_equal(cache.evicted, [1, 1])


def test_chunk_is_kept_whole_and_never_evicted():
  cache = prompt_cache([2, 4])
  for token, margin in ((10, 2.0), (20, 1.0)):
    cache = feed(cache, token, True, margin)
  chunk = jnp.broadcast_to(jnp.array([71.0, 72.0])[None, None, :, None, None], (1, 2, 2, 1, 1))
  cache = kv.append_chunk(cache, chunk, -chunk, jnp.array([2, 1]))
  cache = feed(cache, 30, True, 9.0)
  assert visible(cache, 0) == [1, 2, 10, 30, 71, 72]
  assert visible(cache, 1) == [1, 2, 3, 4, 10, 30, 71]


def test_ended_rows_are_left_alone():
  before = prompt_cache([3, 3])
  after = feed(before, 50, True, 1.0, active=[True, False])
  assert visible(after, 0) == [1, 2, 3, 50] and visible(after, 1) == [1, 2, 3]
  np.testing.assert_array_equal(held(after, 'k')[1], held(before, 'k')[1])


@pytest.mark.parametrize('share, tokens, budget', [(0.5, 5, 3), (1.0, 7, 7), (0.01, 4, 1)])
def test_budget_rounds_up(share, tokens, budget):
  assert kv.generated_budget(True, share, kv.CacheSpec(max_new_tokens=tokens)) == budget
