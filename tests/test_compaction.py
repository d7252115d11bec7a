"""Compaction of a cache: what stays is what it was, keys at their new places are those that would have been computed there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynllava_jax.arrangement import APART, STACKED, TILED, with_int8_cache
from dynllava_jax.cache import Cache, CacheSpec, from_prompt, stacked, with_room
from dynllava_jax.compaction import Survivors, compacted, why_not
from dynllava_jax.config import LlamaConfig
from dynllava_jax.ops.rope import apply_rope, rope_angles

CFG = LlamaConfig(vocab_size=8, hidden_size=16, mlp_dim=8, num_layers=2, num_heads=2, num_kv_heads=2)
LAYERS, BATCH, SLOTS, ROOM = 2, 2, 6, 3


def cache_of(keys, values, positions, arrangement):
  """A one-stage cache of unrotated keys float[L, B, S, K, H] that stand at int32[B, S]."""
  angles = rope_angles(positions, CFG.head_dim, CFG.rope_theta)
  layers = [with_room(apply_rope(k, *angles), v, ROOM, arrangement) for k, v in zip(keys, values)]
  k, v = zip(*layers) if arrangement.apart else (jax.tree.map(lambda *x: jnp.stack(x), *side) for side in zip(*layers))
  spec = CacheSpec(max_new_tokens=ROOM)
  length = jnp.full(BATCH, positions.shape[1], jnp.int32)
  stage = from_prompt(k, v, length, gated=False, text_keep_budget=1.0, spec=spec, arrangement=arrangement)
  return Cache((stage,), length)


@pytest.mark.parametrize(
  'arrangement', [STACKED, APART, TILED, with_int8_cache(TILED)], ids=['stacked', 'apart', 'tiled', 'tiled int8']
)
@pytest.mark.parametrize('rerotated', [True, False])
def test_what_stays_stands_where_it_would_have_stood(arrangement, rerotated):
  rng = np.random.default_rng(0)
  shape = (LAYERS, BATCH, SLOTS, CFG.num_kv_heads, CFG.head_dim)
  keys, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
  stays, length = np.array([[0, 3, 5, 0], [1, 2, 4, 5]]), np.array([3, 4], np.int32)
  places = np.arange(4)[None].repeat(BATCH, 0) if rerotated else stays
  before = cache_of(keys, values, jnp.arange(SLOTS)[None].repeat(BATCH, 0), arrangement)
  pad = lambda rows: jnp.asarray(np.pad(rows, [(0, 0), (0, before.stages[0].slots - 4)]), jnp.int32)
  survivors = Survivors((pad(stays),), (jnp.asarray(length),), (pad(places - stays),), jnp.asarray(length))
  after = jax.jit(compacted, static_argnums=2)(before, survivors, CFG)
  pick = lambda x: jnp.take_along_axis(x, jnp.asarray(stays)[None, :, :, None, None], 2)
  expected = stacked(cache_of(pick(keys), pick(values), jnp.asarray(places), arrangement).stages[0], CFG.num_kv_heads)
  found = stacked(after.stages[0], CFG.num_kv_heads)
  assert why_not(before) == '' and after.position.tolist() == length.tolist() == found.length.tolist()
  assert found.k.shape == stacked(before.stages[0], CFG.num_kv_heads).k.shape
  for row, count in enumerate(length):
    # Keys that are int8 are rounded once more when they are rotated, by half of 1 / 127 of a head's largest number.
    np.testing.assert_allclose(found.k[:, row, :count], expected.k[:, row, :count], atol=0.05 if arrangement.int8 else 2e-6)
    np.testing.assert_array_equal(found.v[:, row, :count], expected.v[:, row, :count])
