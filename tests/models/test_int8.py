"""Weights and KV caches as int8: they are what they stand for, in every arrangement, and no parameter is without its scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_invariants import CFG, DYNAMIC, NEW, batch
from test_sites import RECYCLING, SELECTING

from dynllava_jax import cache as kv
from dynllava_jax.arrangement import APART, STACKED, TILED, with_int8_cache
from dynllava_jax.config import DENSE
from dynllava_jax.generate import Generator
from dynllava_jax.models.matrices import MATRICES, SCALES, plain, smaller, to_int8
from dynllava_jax.models.params import cut_params
from dynllava_jax.ops.attention import cached_attention

ARRANGEMENTS = {'stacked': STACKED, 'tiled': dataclasses.replace(TILED, tower='xla'), 'apart': APART}
LAYERS, BATCH, SLOTS, HEADS, KV_HEADS, HEAD_DIM = 2, 3, 5, 4, 2, 8


def rounded(params):
  """(with int8 matrices, the same numbers in float32)."""
  llama, scales = smaller(jax.tree.map(jnp.copy, params['llama']))
  layers = dict(llama['layers'])
  for name in MATRICES:
    of_layers = [plain({name: w}, {name: s}, jnp.float32)[name] for w, s in zip(layers[name], scales['layers'][name])]
    layers[name] = jnp.stack(of_layers)
  return params | {'llama': llama, SCALES: scales}, params | {'llama': llama | {'layers': layers}}


def test_each_output_has_its_own_scale(tiny_params):
  """Half a step is the most that rounding changes, and the largest number of an output is a whole 127."""
  small, floats = rounded(tiny_params)
  for name, matrix in MATRICES.items():
    values, scale = small['llama']['layers'][name], small[SCALES]['layers'][name]
    inner = tuple(matrix.letters.index(c) + 1 for c in matrix.inner)
    assert values.dtype == jnp.int8 and (jnp.abs(values).max(inner) == 127).all()
    wrong = jnp.abs(floats['llama']['layers'][name] - tiny_params['llama']['layers'][name])
    assert (wrong <= 0.501 * jnp.expand_dims(scale, inner)).all()
  values, scale = to_int8('up', jnp.zeros((3, 2)), 0)
  assert not values.any() and jnp.isfinite(scale).all()
  assert not jnp.isfinite(to_int8('up', jnp.full((3, 2), jnp.nan), 0)[1]).any()  # so that it is found


def cache_of(k, v, lies, room=3):
  held = [kv.with_room(a, b, room, lies) for a, b in zip(k, v)]
  k, v = zip(*held) if lies.apart else (jax.tree.map(lambda *x: jnp.stack(x), *side) for side in zip(*held))
  length = jnp.asarray([5, 4, 2], jnp.int32)
  spec = kv.CacheSpec(max_new_tokens=room)
  return kv.from_prompt(k, v, length, gated=False, text_keep_budget=1.0, spec=spec, arrangement=lies)


@pytest.mark.parametrize('lies', ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_a_cache_of_int8_is_written_and_read_as_what_it_stands_for(lies):
  """Filled, appended to, put into other rows and attended to, beside a float cache of the same numbers."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  k, v = draw(LAYERS, BATCH, SLOTS, KV_HEADS, HEAD_DIM), draw(LAYERS, BATCH, SLOTS, KV_HEADS, HEAD_DIM)
  more_k, more_v = draw(LAYERS, BATCH, 1, KV_HEADS, HEAD_DIM), draw(LAYERS, BATCH, 1, KV_HEADS, HEAD_DIM)
  small = with_int8_cache(lies)
  caches, step = {}, (jnp.ones(BATCH, bool), jnp.zeros(BATCH), jnp.asarray([True, True, False]))
  for arrangement in (lies, small):
    one = cache_of(k, v, arrangement)
    one = kv.append_judged(one, more_k, more_v, *step)
    two = kv.insert(
      kv.Cache((one,), one.length), kv.Cache((cache_of(v, k, arrangement, room=1),), one.length), jnp.asarray([7, 0, 9])
    ).stages[0]
    caches[arrangement] = one, two
  for plain_cache, small_cache in zip(caches[lies], caches[small]):
    expected, found = kv.stacked(plain_cache, KV_HEADS), kv.stacked(small_cache, KV_HEADS)
    assert found.length.tolist() == expected.length.tolist() and found.k.shape[2] >= expected.k.shape[2]
    for a, b in ((expected.k, found.k), (expected.v, found.v)):
      np.testing.assert_allclose(a, b[:, :, : a.shape[2]], atol=0.51 * float(jnp.abs(a).max()) / 127)
  small_cache = caches[small][0]
  held = kv.stacked(small_cache, KV_HEADS)
  side = lambda x: jax.tree.map(lambda a: a[0], x) if not lies.apart else x[0]
  for new in (1, 2):
    q, own_k, own_v = draw(BATCH, new, HEADS, HEAD_DIM), draw(BATCH, new, KV_HEADS, HEAD_DIM), draw(BATCH, new, KV_HEADS, HEAD_DIM)
    expected = cached_attention(q, own_k, own_v, held.k[0], held.v[0], held.length)
    found = cached_attention(q, own_k, own_v, side(small_cache.k), side(small_cache.v), held.length, None, small)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    sixteen = [x.astype(jnp.bfloat16) for x in (q, own_k, own_v)]
    found = cached_attention(*sixteen, side(small_cache.k), side(small_cache.v), held.length, None, small)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.03)


def told(params, stages, **options):
  generator = Generator(CFG, stages, params, max_new_tokens=NEW, eos_id=None, **options)
  turn, _ = generator.start(*batch())
  given = jnp.asarray(np.random.default_rng(1).integers(3, CFG.llama.vocab_size, (4, NEW)), jnp.int32)
  return np.asarray(turn.logits), np.asarray(generator.force(turn, given, jnp.full(4, NEW))[0].log_prob)


@pytest.mark.slow
@pytest.mark.parametrize('stages', [SELECTING, RECYCLING], ids=['selecting', 'recycling'])
def test_int8_weights_multiply_as_what_they_stand_for(stages, tiny_params):
  """Also where a method looks into a layer: rows that skip its MLP, keys of the layer that is entered."""
  small, floats = rounded(tiny_params)
  expected = told(floats, stages, arrangement=STACKED)
  for lies in ARRANGEMENTS.values():
    for a, b in zip(expected, told(small, stages, arrangement=lies)):
      np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.slow
def test_an_int8_cache_changes_little_and_is_smaller(tiny_params):
  (logits, expected), (same, found) = (told(tiny_params, DYNAMIC, int8_cache=int8) for int8 in (False, True))
  np.testing.assert_array_equal(logits, same)  # a prompt is read before it is held
  assert 0 < np.abs(found - expected).max() < 0.1 and (found[:, 0] == expected[:, 0]).all()


def test_int8_matrices_need_their_scales(tiny_params):
  small, _ = rounded(tiny_params)
  make = lambda params: Generator(CFG, DENSE, params, max_new_tokens=NEW, eos_id=None)
  with pytest.raises(ValueError, match='params: .*llama/layers/down is int8, expected floating-point|is int8, expected floating'):
    make({name: group for name, group in small.items() if name != SCALES})
  layers = small[SCALES]['layers']
  for change, message in (
    ({n: s for n, s in layers.items() if n != 'o'}, 'llama/layers/o is int8 and needs scales of 4x64; none are there'),
    (layers | {'up': layers['up'][:, 1:]}, 'llama/layers/up is int8 and needs scales of 4x96; found 4x95'),
    (layers | {'attention_norm': layers['o']}, 'scales/layers/attention_norm is given, but llama/layers/attention_norm is no int8'),
  ):
    with pytest.raises(ValueError, match=f'^params: {message}'):
      make(small | {SCALES: {'layers': change}})
  cut = cut_params(small, DENSE, APART)
  assert cut[SCALES]['stage_0_0']['qkv'].shape == (cut['llama']['stage_0_0']['qkv'].shape[1],)
