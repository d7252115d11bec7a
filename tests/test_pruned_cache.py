"""A cache whose layers hold other tokens: slots are used again, what finds none is given up and counted."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from programs import program

from dynllava_jax import cache as kv
from dynllava_jax.arrangement import APART, STACKED, TILED
from dynllava_jax.ops.pruning import Ballot, Survival
from dynllava_jax.pruned_cache import FREE, append, from_prompt, of_prompt

HIDDEN = jnp.ones((1, 1, 3))


def filled(values, limit, arrangement=STACKED, new=3):
  """A cache of one row whose layers' prompts have these values; token i has keys, values and interaction keys of i."""
  values = jnp.asarray(values, jnp.float32)
  size = values.shape[1]
  tokens = jnp.broadcast_to(jnp.arange(size, dtype=jnp.float32)[None, :, None, None], (1, size, 2, 4))
  spec = kv.CacheSpec(max_new_tokens=new)
  left = [
    of_prompt(tokens, tokens, tokens[..., 0], Survival(None, None, None, v[None]), limit or size + new, arrangement) for v in values
  ]
  k, v = (tuple(x[i] for x in left) if arrangement.apart else jnp.stack([x[i] for x in left]) for i in (0, 1))
  held = type(left[0][2])(*(jnp.stack([getattr(x[2], f.name) for x in left]) for f in dataclasses.fields(left[0][2])))
  positions = jnp.arange(10, 10 + size, dtype=jnp.int32)[None]
  settings = dict(tokens=limit, spec=spec, shift=None, arrangement=arrangement)
  return from_prompt(k, v, held, positions, jnp.full(1, size, jnp.int32), **settings)


def fed(cache, old, new, position, count=None, number=100.0):
  """New tokens of `number`, `number` + 1, ... with these votes of all layers."""
  old, new = jnp.asarray(old, jnp.float32)[:, None], jnp.asarray(new, jnp.float32)[:, None]
  layers, _, size = new.shape
  one = jnp.broadcast_to((number + jnp.arange(size, dtype=jnp.float32))[:, None, None], (layers, 1, size, 2, 4))
  k = tuple(one) if cache.arrangement.apart else one
  ballot = Ballot(
    None, None, jnp.pad(old, [(0, 0), (0, 0), (0, cache.slots - old.shape[2])], constant_values=-jnp.inf), new, one[..., 0]
  )
  count = jnp.full(1, size if count is None else count, jnp.int32)
  return append(cache, HIDDEN, k, k, ballot, jnp.full(1, position, jnp.int32), count, size == 1)


def contents(cache):
  """By layer, {position: number that is in its slot}."""
  stacked, position = kv.stacked(cache, 2), np.asarray(cache.position)[:, 0]
  found = []
  for layer, places in enumerate(position):
    slots = np.flatnonzero(places != FREE)
    for part in (stacked.k[layer, 0, :, 0, 0], stacked.v[layer, 0, :, 1, 3], cache.key[layer][0, :, 0]):
      numbers = np.asarray(part)[slots]
      assert len(found) == layer or found[layer] == dict(zip(places[slots].tolist(), numbers.tolist()))
      found[layer:] = [dict(zip(places[slots].tolist(), numbers.tolist()))]
  return found


inf, gone = np.inf, -np.inf


@pytest.mark.parametrize('arrangement', [STACKED, APART, TILED], ids=['stacked', 'apart', 'tiled'])
def test_slots_are_used_again_and_the_smallest_score_is_given_up(arrangement):
  cache = filled([[0.5, gone, 2.0, inf], [0.1, 0.2, 0.3, inf]], 3, arrangement)
  assert contents(cache) == [{10: 0, 12: 2, 13: 3}, {11: 1, 12: 2, 13: 3}]
  assert cache.evicted.tolist() == [1]
  one_left = np.where(np.asarray(cache.position)[0, 0, :3] == 12, 1.0, gone)
  cache = fed(cache, [one_left, [0.4, 0.2, 0.3]], [[inf], [inf]], 14)
  # Layer 0 dropped two; layer 1 is full and gives up what is in its second slot.
  assert contents(cache)[0] == {12: 2, 14: 100} and contents(cache)[1] == {11: 1, 14: 100, 13: 3}
  assert cache.evicted.tolist() == [2] and cache.generated.tolist() == [1] and cache.length.tolist() == [5]


def test_a_row_that_has_ended_stays_as_it_is():
  before = filled([[0.5, gone, 2.0, inf]], 0)
  after = fed(before, [np.where(np.asarray(before.position)[0, 0] == FREE, gone, 0.0)], [[gone]], 14, count=0)
  assert contents(after) == contents(before) and after.length.tolist() == before.length.tolist()
  assert after.evicted.tolist() == [0]


def test_of_a_chunk_the_best_find_room():
  cache = filled([[0.5, 0.2, 2.0, inf]], 4)
  cache = fed(cache, [[0.5, 0.2, gone, 0.7]], [[0.3, gone, 0.1, inf, gone]], 14, count=4)
  # Alive are 0.5, 0.2, 0.7 and 0.3, 0.1, inf: the smallest two leave.
  assert contents(cache) == [{10: 0, 13: 3, 14: 100, 17: 103}]
  assert cache.evicted.tolist() == [2] and cache.generated.tolist() == [0]


@pytest.mark.parametrize('arrangement', [STACKED, APART, TILED], ids=['stacked', 'apart', 'tiled'])
def test_rows_take_the_place_of_others_in_a_larger_cache(arrangement):
  large, small = filled([[inf] * 12], 0, arrangement), filled([[0.5, gone, 2.0, inf]], 0, arrangement)
  whole = lambda cache: kv.Cache((cache,), cache.length)
  at = jnp.zeros(1, jnp.int32)
  put = kv.insert(whole(large), whole(small), at).stages[0]
  assert contents(put) == contents(small) and put.slots == large.slots
  assert put.later_room.tolist() == [8]


def test_room_for_all_gives_nothing_up():
  cache = filled([[1.0] * 5 + [inf]], 0)
  for number in range(3):
    cache = fed(cache, [np.where(np.asarray(cache.position)[0, 0] == FREE, gone, 1.0)], [[inf]], 16 + number)
  assert cache.evicted.tolist() == [0] and (cache.position != FREE).sum() == 9


def test_shares_of_picture_question_and_answer():
  """An image of 4 at place 2 of a prompt of 10, then 5 tokens; slots in any order, some free."""
  position = np.asarray([12, FREE, 3, 0, 5, FREE, 14])
  held = program('held')
  assert held.shares(position, 2, 4, 10, 15) == (0.5, 1 / 6, 0.4)
  assert np.isnan(held.shares(position, 2, 4, 10, 10)[2])
