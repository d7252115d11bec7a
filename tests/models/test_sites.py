"""Pieces of methods together, with grouped heads, a gate and rows of every kind: neighbours, padding and caching change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_invariants import CFG, NEW, ROWS, TEXT, P, batch

from dynllava_jax import costs
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import DENSE, ConfigError, Piece, Stage
from dynllava_jax.generate import Generator
from dynllava_jax.models.dynllava import DynLlava
from dynllava_jax.ops.images import normalize

HOLLOW = Piece('redundancylens', {'attention_layers': (0,), 'attention_range': 3, 'ffn_layers': (0,)})
MERGING = Piece('look_m', {'hh_ratio': 0.4, 'recent_ratio': 0.2})
# Ranked by the stage before, then gated, then ranked by the entering stage and numbered anew behind the gate.
SELECTING = (
  Stage(layers=HOLLOW),
  Stage(start=1, selector='fastv', image_tokens=12),
  Stage(start=2, selector='dynamic', image_tokens=8),
  Stage(start=3, selector='pyramiddrop', image_tokens=4),
)
COMPRESSING = (Stage(layers=HOLLOW, compressor=MERGING), Stage(start=2, selector='fastv', image_tokens=8, compressor=MERGING))

# New rows among those of a second cut, and behind a gate.
RECYCLING = (
  Stage(),
  Stage(start=1, selector='sparsevlm', image_tokens=8),
  Stage(start=2, selector='sparsevlm', image_tokens=4),
  Stage(start=3, selector='dynamic', image_tokens=4),
)


@pytest.fixture(scope='module', params=[SELECTING, RECYCLING, COMPRESSING], ids=['selecting', 'recycling', 'compressing'])
def run(request, tiny_params):
  generator = Generator(CFG, request.param, tiny_params, max_new_tokens=NEW, eos_id=None)
  return generator, jax.device_get(generator(*batch()))


def test_rows_do_not_depend_on_each_other_and_nothing_compiles_again(run):
  generator, together = run
  before = generator.compilations()
  order = [2, 0, 3, 1]
  shuffled = jax.device_get(generator(*batch([ROWS[i] for i in order], numbers=order)))
  assert generator.compilations() == before
  np.testing.assert_array_equal(shuffled.tokens, together.tokens[order])
  for row in (1, 2):
    alone = jax.device_get(generator(*batch([ROWS[row]], numbers=[row])))
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_padding_changes_nothing(run):
  generator, together = run
  np.testing.assert_array_equal(jax.device_get(generator(*batch(text=TEXT + 7))).tokens, together.tokens)


def test_cached_equals_uncached_where_there_is_something_to_compare(run):
  generator, together = run
  if generator.model.stages == COMPRESSING:
    with pytest.raises(ConfigError, match='stage at layer 0: look_m shrinks a cache, and uncached decoding has none'):
      generator.generate_uncached(*batch())
    return
  uncached = jax.device_get(generator.generate_uncached(*batch()))
  np.testing.assert_array_equal(together.tokens, uncached.tokens)
  np.testing.assert_array_equal(together.kept, uncached.kept)
  np.testing.assert_allclose(together.margin, uncached.margin, atol=1e-4)


def test_a_cache_holds_what_is_left_of_the_prompt_and_no_more():
  """Allocated bytes follow from the compressor's own formula; rows of a renumbering stage go on right behind their slots."""
  model = DynLlava(CFG, COMPRESSING)
  prompt, _ = batch()
  shapes = jax.eval_shape(lambda: jnp.zeros((len(ROWS), P, CFG.llama.hidden_size)))
  spec = CacheSpec(max_new_tokens=NEW)

  def prefill(prompt, image):
    variables = model.init(jax.random.key(0), prompt, image, spec, method='prefill')
    return model.apply(variables, prompt, image, spec, method='prefill')[2]

  cache = jax.eval_shape(prefill, prompt, shapes)
  expected = costs.cache_bytes(CFG, COMPRESSING, TEXT, spec, 4)
  assert [2 * 4 * s.k.size // len(ROWS) for s in cache.stages] == expected
  assert sum(expected) < 0.75 * sum(costs.cache_bytes(CFG, DENSE, TEXT, spec, 4))


def test_a_later_turn_is_appended_uncut_right_behind_each_stages_own_tokens(tiny_params):
  """The chunk's logits are those of recomputing prompt and chunk, the set being the prompt's; positions are contiguous."""
  stages = (Stage(), Stage(start=1, selector='fastv', image_tokens=12), Stage(start=2, selector='pyramiddrop', image_tokens=4))
  generator = Generator(CFG, stages, tiny_params, max_new_tokens=2, eos_id=None, later_tokens=4)
  prompt, pixels = batch()
  chunk = jnp.asarray(np.random.default_rng(3).integers(3, CFG.llama.vocab_size, (len(ROWS), 4)), jnp.int32)
  turn, _ = generator.start(prompt, pixels)
  turn, _ = generator.append(turn, chunk, jnp.full(len(ROWS), 4))
  dense, kept, renumbered = turn.cache.stages
  assert dense.shift is None and kept.shift is None
  np.testing.assert_array_equal(turn.cache.position - renumbered.shift, renumbered.length)
  np.testing.assert_array_equal(renumbered.shift, [P - 4, P - 4, 0, P - 4])
  whole = np.pad(np.asarray(prompt.tokens), [(0, 0), (0, 4)])
  for row, length in enumerate(np.asarray(prompt.length)):
    whole[row, length : length + 4] = chunk[row]
  now = dataclasses.replace(prompt, tokens=jnp.asarray(whole), length=prompt.length + 4)

  @jax.jit
  def recompute(params):
    apply = lambda *args, method: generator.model.apply({'params': params}, *args, method=method)
    image = apply(normalize(pixels, CFG.vision), method='encode_images')
    return apply(apply(now, image, prompt.length, TEXT + 4, method='recompute')[0], method='logits')

  np.testing.assert_allclose(recompute(generator.params), turn.logits, atol=1e-4)
