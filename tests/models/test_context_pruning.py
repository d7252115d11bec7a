"""Dynamic Context Pruning: equal to what was recorded; rows, padding, caches and later turns change nothing; its training."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from test_invariants import CFG, NEW, ROWS, TEXT, P, batch, step_by_step

from dynllava_jax import costs, methods
from dynllava_jax.arrangement import STACKED, TILED
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import DENSE, ConfigError, Objective, Piece, PruningConfig, Stage
from dynllava_jax.convert.records import context_pruning
from dynllava_jax.convert.records.bases import open_record
from dynllava_jax.convert.verify import why_left
from dynllava_jax.generate import Generator
from dynllava_jax.losses import count, training_losses
from dynllava_jax.methods.training import Drawn
from dynllava_jax.models import trained, trained_votes
from dynllava_jax.models.batch import TrainInputs
from dynllava_jax.models.dynllava import DynLlava
from dynllava_jax.models.params import cut_params
from dynllava_jax.pruned_cache import FREE

DIM = 8
MODEL = dataclasses.replace(CFG, predictor=None, pruning=PruningConfig(dim=DIM))
PIECE = Piece('dynamic_context_pruning')
WHOLE = (Stage(layers=PIECE),)
# Behind a cut, in some layers alone.
CUT = (Stage(), Stage(start=1, selector='uniform', image_tokens=9, layers=PIECE), Stage(start=3))
WEIGHTS = ('vision', 'projector', 'llama')


def with_votes(params, bias=1.0, seed=0):
  """Interaction weights under which about half of the context is dropped in time."""
  rng, layers, width = np.random.default_rng(seed), CFG.llama.num_layers, CFG.llama.hidden_size
  maps = {name: jnp.asarray(rng.normal(0, width**-0.5, (layers, width, DIM)), jnp.float32) for name in 'qk'}
  return {name: params[name] for name in WEIGHTS} | {'pruning': {'layers': maps | {'bias': jnp.full((layers, 1), bias)}}}


@pytest.fixture(scope='module')
def params(tiny_params):
  return with_votes(tiny_params)


@pytest.fixture(scope='module')
def generator(params):
  return Generator(MODEL, WHOLE, params, max_new_tokens=NEW, eos_id=None, later_tokens=6)


@pytest.fixture(scope='module')
def together(generator):
  return jax.device_get(generator(*batch()))


def test_what_is_decoded_without_a_cache_is_the_same(generator, together):
  uncached = jax.device_get(generator.generate_uncached(*batch()))
  np.testing.assert_array_equal(together.tokens, uncached.tokens)
  assert together.evicted.tolist() == [0] * len(ROWS)


@pytest.mark.slow
def test_every_recorded_quantity_agrees():
  record = open_record(GOLDEN / 'methods' / 'dynamic_context_pruning', None)
  found = list(context_pruning.verify(record))
  assert [str(q) for q in found if not q.ok] == []
  compared = {q.name.rpartition(': ')[2].partition('[')[0] for q in found}
  left = why_left(record, [k for k in record.case if k not in compared])
  assert list(left) == ['what was given']


@pytest.mark.slow
def test_rows_and_padding_change_nothing(generator, together):
  order = [2, 0, 3, 1]
  shuffled = jax.device_get(generator(*batch([ROWS[i] for i in order], numbers=order)))
  np.testing.assert_array_equal(shuffled.tokens, together.tokens[order])
  for row in (1, 2):
    alone = jax.device_get(generator(*batch([ROWS[row]], numbers=[row])))
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
  np.testing.assert_array_equal(jax.device_get(generator(*batch(text=TEXT + 7))).tokens, together.tokens)


@pytest.mark.slow
@pytest.mark.parametrize('lies', [STACKED, dataclasses.replace(TILED, tower='xla')], ids=['stacked', 'tiled'])
def test_layers_that_are_scanned_give_the_same(params, together, lies):
  scanned = Generator(MODEL, WHOLE, params, max_new_tokens=NEW, eos_id=None, later_tokens=6, arrangement=lies)
  np.testing.assert_array_equal(jax.device_get(scanned(*batch())).tokens, together.tokens)


@pytest.mark.slow
def test_behind_a_cut_in_some_layers(params):
  cut = Generator(MODEL, CUT, params, max_new_tokens=NEW, eos_id=None)
  cached, uncached = jax.device_get((cut(*batch()), cut.generate_uncached(*batch())))
  np.testing.assert_array_equal(cached.tokens, uncached.tokens)


@pytest.mark.slow
def test_a_later_turn_is_as_if_it_had_been_in_the_prompt(generator):
  """Rows with chunks of other lengths, one with none; then what each layer holds is the same set."""
  prompt, pixels = batch()
  rng = np.random.default_rng(8)
  chunk, count = jnp.asarray(rng.integers(3, 90, (len(ROWS), 6)), jnp.int32), np.asarray([6, 2, 0, 4])
  turn, _ = generator.start(prompt, pixels)
  turn, _ = generator.append(turn, chunk, jnp.asarray(count, jnp.int32))
  whole = np.pad(np.asarray(prompt.tokens), [(0, 0), (0, 6)])
  for row, length in enumerate(np.asarray(prompt.length)):
    whole[row, length : length + count[row]] = chunk[row, : count[row]]
  whole = dataclasses.replace(prompt, tokens=jnp.asarray(whole), length=prompt.length + jnp.asarray(count, jnp.int32))
  at_once, _ = generator.start(whole, pixels)
  fed = count > 0
  np.testing.assert_allclose(turn.logits[fed], at_once.logits[fed], atol=1e-4)
  held = lambda turn: np.sort(np.asarray(turn.cache.stages[0].position), axis=-1)
  slots = min(held(turn).shape[2], held(at_once).shape[2])
  np.testing.assert_array_equal(held(turn)[..., -slots:], held(at_once)[..., -slots:])


@pytest.mark.slow
def test_votes_that_always_keep_are_the_dense_model(tiny_params):
  prompt, pixels = batch(ROWS[:2])
  tokens = np.random.default_rng(9).integers(3, CFG.llama.vocab_size, (2, 3)).astype(np.int32)
  run = lambda model, stages, params: Generator(model, stages, params, max_new_tokens=3, eos_id=None)
  sure = run(MODEL, WHOLE, with_votes(tiny_params, bias=1e4))
  dense = run(dataclasses.replace(MODEL, pruning=None), DENSE, {name: tiny_params[name] for name in WEIGHTS})
  (ours, turn), (expected, _) = (step_by_step(g, prompt, pixels, tokens) for g in (sure, dense))
  np.testing.assert_allclose(ours, expected, atol=1e-4)
  held = np.asarray(turn.cache.stages[0].position != FREE).sum(-1)
  np.testing.assert_array_equal(held, np.broadcast_to(np.asarray(prompt.length) + 2, held.shape))


@pytest.mark.slow
def test_a_cache_that_is_too_small_gives_tokens_up_and_says_so(params):
  small = (Stage(layers=dataclasses.replace(PIECE, options={'tokens': 8})),)
  bounded = Generator(MODEL, small, params, max_new_tokens=NEW, eos_id=None)
  turn, _ = bounded.start(*batch())
  assert turn.cache.stages[0].slots == 8
  generated = jax.device_get(bounded(*batch()))
  assert (generated.evicted > 0).all() and generated.finite.all()
  alone = jax.device_get(bounded(*batch([ROWS[1]], numbers=[1])))
  np.testing.assert_array_equal(alone.tokens[0], generated.tokens[1])
  np.testing.assert_array_equal(alone.evicted[0], generated.evicted[1])
  assert (jax.device_get(bounded(*batch(text=TEXT + 7))).evicted == generated.evicted).all()


def test_memory_and_costs():
  spec = CacheSpec(max_new_tokens=NEW)
  model = DynLlava(MODEL, WHOLE)
  prompt, _ = batch()
  image = jnp.zeros((len(ROWS), P, CFG.llama.hidden_size))
  run = lambda p, i: model.init_with_output(jax.random.key(0), p, i, spec, method='prefill')[0][2]
  (cache,) = jax.eval_shape(run, prompt, image).stages
  assert 4 * sum(x.size for x in cache.arrays) // len(ROWS) == costs.cache_bytes(MODEL, WHOLE, TEXT, spec, 4)[0]
  small = (Stage(layers=dataclasses.replace(PIECE, options={'tokens': 8})),)
  llama = CFG.llama
  per_slot = 2 * llama.num_kv_heads * llama.head_dim + DIM
  assert costs.cache_bytes(MODEL, small, TEXT, spec, 2) == [llama.num_layers * 8 * per_slot * 2]
  dense, whole = (costs.sample_flops(MODEL, stages, 8, [True] * 2, spec) for stages in (DENSE, WHOLE))
  rows, n = 8 + P, llama.num_layers
  votes = lambda queries, keys: DIM * (4 * llama.hidden_size * queries + 2 * keys)
  more = votes(rows, rows * (rows - 1) / 2) + votes(1, rows) + votes(1, rows + 1)
  assert whole - dense == pytest.approx(n * more)


@pytest.mark.slow
def test_the_term_is_of_real_rows_and_parts_add_up(params):
  """The loss of two halves of a batch, each with the counts of the whole, is that of the batch; a row's padding changes nothing."""
  prompt, _ = batch()
  image = jnp.asarray(np.random.default_rng(3).normal(0, 1, (len(ROWS), P, CFG.llama.hidden_size)), jnp.float32)
  labels = jnp.where(jnp.arange(prompt.tokens.shape[1]) > 4, prompt.tokens, -100)
  drawn = Drawn(dense=jnp.asarray([False, True, False, False]), told={'alpha': jnp.float32(1.5)})
  objective, parts = Objective(), trained.parts(MODEL, WHOLE)

  def loss(model, rows, pad=0):
    cut = lambda tree: jax.tree.map(lambda x: x[rows] if x.ndim else x, tree)
    wide = lambda x, value: jnp.pad(x, [(0, 0), (0, pad)], constant_values=value)
    some = cut(prompt)
    some = dataclasses.replace(some, tokens=wide(some.tokens, 0))
    inputs = TrainInputs(some.length, wide(cut(labels), -100), {trained_votes.NAME: cut(drawn)})
    out = model.train_forward(some, image[rows], inputs, objective)
    whole = TrainInputs(prompt.length, labels, {trained_votes.NAME: drawn})
    return training_losses(out, some, inputs, objective, parts, count(prompt, whole, objective, parts))

  def all_of_them(model):
    return [loss(model, rows, pad) for rows, pad in ((slice(None), 0), (slice(0, 2), 0), (slice(2, 4), 0), (slice(None), 5))]

  model = DynLlava(MODEL, WHOLE)
  whole, first, second, padded = jax.jit(lambda p: nn.apply(all_of_them, model)({'params': p}))(cut_params(params, WHOLE))
  for name in ('sparsity', 'held/0', 'held/3'):
    np.testing.assert_allclose(first.shown[name] + second.shown[name], whole.shown[name], rtol=1e-5)
    np.testing.assert_allclose(padded.shown[name], whole.shown[name], rtol=1e-5)
  assert 0.15 < whole.shown['sparsity'] < 0.3 and 0 < whole.shown['held/0'] < 1


REFUSED = {
  'does not go together with knorm': (Stage(layers=PIECE, compressor=Piece('knorm')),),
  'does not go together with the gate at layer 0': (Stage(gate=Piece('recency')), Stage(start=2, layers=PIECE)),
  'fastv ranks by attention to tokens that votes have dropped': (
    Stage(layers=PIECE),
    Stage(start=2, selector='fastv', image_tokens=4),
  ),
  'tokens is -1': (Stage(layers=Piece('dynamic_context_pruning', {'tokens': -1})),),
}


@pytest.mark.parametrize('message', REFUSED)
def test_runs_that_cannot_be_are_refused(message):
  with pytest.raises(ConfigError, match=message):
    methods.check_run(MODEL, REFUSED[message])


def test_a_model_without_weights_is_told_so():
  with pytest.raises(ConfigError, match='needs interaction weights, and this model has none'):
    methods.check_run(CFG, WHOLE)
