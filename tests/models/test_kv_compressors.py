"""Compressed caches in the whole model: what they hold, that no row depends on another, and turns that come later."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_invariants import CFG, NEW, ROWS, TEXT, P, batch

from dynllava_jax import cache as kv
from dynllava_jax import costs, methods
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import DENSE, ConfigError, Piece, Stage
from dynllava_jax.generate import Generator
from dynllava_jax.methods import pyramidkv
from dynllava_jax.models.dynllava import DynLlava

LAYERS = CFG.llama.num_layers
PYRAMID = Piece('pyramidkv', {'ratio': 0.4, 'window': 3, 'kernel': 3, 'beta': 2, 'over': 'prompt'})
SNAPKV = Piece('snapkv', {'ratio': 0.5, 'window': 4, 'kernel': 3, 'rerotate': True})
# Layers of different lengths, over text too; then, behind a selector, over the image alone and with new positions.
MIXED = (Stage(compressor=PYRAMID), Stage(start=2, selector='fastv', image_tokens=8, compressor=SNAPKV))


@pytest.fixture(scope='module')
def mixed(tiny_params):
  generator = Generator(CFG, MIXED, tiny_params, max_new_tokens=NEW, eos_id=None, later_tokens=3)
  return generator, jax.device_get(generator(*batch()))


def test_rows_do_not_depend_on_each_other_or_padding_and_nothing_compiles_again(mixed):
  generator, together = mixed
  before = generator.compilations()
  order = [2, 0, 3, 1]
  shuffled = jax.device_get(generator(*batch([ROWS[i] for i in order], numbers=order)))
  assert generator.compilations() == before
  np.testing.assert_array_equal(shuffled.tokens, together.tokens[order])
  np.testing.assert_array_equal(jax.device_get(generator(*batch(text=TEXT + 5))).tokens, together.tokens)
  with pytest.raises(ConfigError, match='stage at layer 0: pyramidkv shrinks a cache, and uncached decoding has none'):
    generator.generate_uncached(*batch())


def test_what_a_cache_holds_and_where_it_goes_on(mixed):
  turn, _ = mixed[0].start(*batch())
  pyramid, snapkv = turn.cache.stages
  lengths = np.array([n + (P if at >= 0 else 0) for n, at in ROWS])
  options = methods.options_of(PYRAMID, 'compressor')
  budgets = [[pyramidkv.budget(n, layer, LAYERS, options) for n in lengths] for layer in (0, 1)]
  np.testing.assert_array_equal(pyramid.length - pyramid.first, budgets)
  assert pyramid.shift is None and budgets[0][0] > budgets[1][0]
  text = np.array([n for n, _ in ROWS])
  np.testing.assert_array_equal(snapkv.length, text + np.where([at >= 0 for _, at in ROWS], 4, 0))
  np.testing.assert_array_equal(turn.cache.position - snapkv.shift, snapkv.length)


def test_a_later_chunk_is_appended_to_layers_of_any_length(mixed):
  """As its tokens one by one: each sees what is left of the prompt in its layer, and what came before it in the chunk."""
  generator, _ = mixed
  prompt, pixels = batch()
  chunk = jnp.asarray(np.random.default_rng(3).integers(3, CFG.llama.vocab_size, (len(ROWS), 3)), jnp.int32)
  _, logits = generator.append(generator.start(prompt, pixels)[0], chunk, jnp.full(len(ROWS), 3))
  turn = generator.start(prompt, pixels)[0]
  for i in range(3):
    turn, _ = generator.step(turn, chunk[:, i], jnp.ones(len(ROWS), bool))
    np.testing.assert_allclose(logits[:, i], turn.logits, atol=1e-5)


def shapes(stages):
  """The cache of a batch, without computing it."""
  model, prompt = DynLlava(CFG, stages), batch()[0]
  image = jax.eval_shape(lambda: jnp.zeros((len(ROWS), P, CFG.llama.hidden_size)))
  spec = CacheSpec(max_new_tokens=NEW)

  def prefill(prompt, image):
    variables = model.init(jax.random.key(0), prompt, image, spec, method='prefill')
    return model.apply(variables, prompt, image, spec, method='prefill')[2]

  return jax.eval_shape(prefill, prompt, image)


def of_each(piece, starts):
  return tuple(Stage(start=start, compressor=piece) for start in starts)


@pytest.mark.parametrize(
  'stages, slots',
  [
    ((Stage(compressor=Piece('snapkv', {'ratio': 0.75})),), [TEXT + 4]),
    ((Stage(compressor=Piece('knorm', {'ratio': 0.7, 'over': 'prompt'})),), [int((TEXT + P) * 0.3)]),
    (of_each(PYRAMID, [0]), [25]),
    (of_each(PYRAMID, [0, 2]), [25, 14]),
    (of_each(PYRAMID, range(LAYERS)), [25, 20, 14, 9]),
    (MIXED, [25, TEXT + 4]),
  ],
  ids=['image', 'prompt', 'pyramid', 'pyramid in two', 'pyramid in all', 'mixed'],
)
def test_bytes_follow_from_the_formula(stages, slots):
  cache = shapes(stages)
  assert [s.k.shape[2] - NEW for s in cache.stages] == slots
  spec = CacheSpec(max_new_tokens=NEW)
  expected = costs.cache_bytes(CFG, stages, TEXT, spec, 4)
  assert [2 * 4 * s.k.size // len(ROWS) for s in cache.stages] == expected
  assert sum(expected) < sum(costs.cache_bytes(CFG, DENSE, TEXT, spec, 4))


@pytest.fixture(scope='module')
def dense(tiny_params):
  return Generator(CFG, DENSE, tiny_params, max_new_tokens=NEW, eos_id=None).start(*batch())[0]


def test_the_first_logits_are_dense_and_ratio_0_is_the_dense_cache(tiny_params, dense):
  for ratio in (0.0, 0.9):
    stages = (Stage(compressor=Piece('snapkv', {'ratio': ratio, 'rerotate': True})),)
    turn, _ = Generator(CFG, stages, tiny_params, max_new_tokens=NEW, eos_id=None).start(*batch())
    np.testing.assert_allclose(turn.logits, dense.logits, atol=1e-5)
    if ratio == 0:
      stage, whole = (kv.stacked(c.stages[0], CFG.llama.num_kv_heads) for c in (turn.cache, dense.cache))
      np.testing.assert_array_equal(stage.length, whole.length)
      for row, length in enumerate(np.asarray(whole.length)):
        np.testing.assert_array_equal(stage.k[:, row, :length], whole.k[:, row, :length])
        np.testing.assert_array_equal(stage.v[:, row, :length], whole.v[:, row, :length])


@pytest.mark.slow
def test_a_pyramid_in_several_stages_is_the_same_pyramid(tiny_params):
  run = lambda starts: Generator(CFG, of_each(PYRAMID, starts), tiny_params, max_new_tokens=NEW, eos_id=None)(*batch()).tokens
  one = run([0])
  np.testing.assert_array_equal(run([0, 2]), one)
  np.testing.assert_array_equal(run(range(LAYERS)), one)
