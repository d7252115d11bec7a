"""Mixture of depths over image tokens: equal to what was recorded in any batch and arrangement; wrong builds; smaller caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from test_invariants import CFG, NEW, ROWS, TEXT, P, batch

from dynllava_jax import costs, methods
from dynllava_jax.arrangement import STACKED
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import DENSE, ConfigError, Piece, RoutersConfig, Stage
from dynllava_jax.convert.records import depth, runs
from dynllava_jax.convert.records.bases import open_record
from dynllava_jax.generate import Generator
from dynllava_jax.methods import LAYER_KINDS, pmod, videollm_mod
from dynllava_jax.methods.routing import LAYER, MLP
from dynllava_jax.models.dynllava import DynLlava
from dynllava_jax.models.params import cut_params
from dynllava_jax.models.passing import Passing
from dynllava_jax.models.stacks import stacks_of
from dynllava_jax.ops import routing

PAIRS = (Stage(layers=Piece('videollm_mod', {'keep': 0.25})),)
# Behind a cut and under a gate; layers of the last stage let different numbers pass.
FALLING = (
  Stage(),
  Stage(start=1, selector='uniform', image_tokens=12, layers=Piece('videollm_mod', {'layers': (1,), 'keep': 0.5})),
  Stage(start=2, selector='dynamic', image_tokens=8, layers=Piece('videollm_mod', {'layers': (2, 3), 'keep': 0.5, 'frames': 2})),
)


@pytest.fixture(scope='module')
def records():
  return {name: open_record(GOLDEN / 'methods' / name, GOLDEN) for name in ('videollm_mod', 'pmod')}


@pytest.mark.parametrize(
  'name, config', [('videollm_mod', 'public_b/four_frames'), pytest.param('pmod', '', marks=pytest.mark.slow)]
)
def test_recorded_rows_in_a_batch(records, name, config, monkeypatch):
  """With layers stacked and scanned; apart and alone are the slow test's."""
  monkeypatch.setattr(runs, 'best_for', lambda params: STACKED)
  found = list(depth.verify(records[name], alone=False, only=[config] if config else ()))
  assert [str(q) for q in found if not q.ok] == []
  compared = {q.name.removeprefix('in a batch: ') for q in found}
  left = [k for k in records[name].case if k.startswith(config) and k not in compared]
  assert [k for k in left if not any(part in k for part in ('/grad/', '/loss', 'chunk', 'train/'))] == []


INPUTS = ('input_ids', '/labels', 'chunk_ids', '/attention_mask', '/image_index')  # of what is compared


@pytest.mark.slow
@pytest.mark.parametrize('name', ['videollm_mod', 'pmod'])
def test_every_recorded_quantity_agrees(records, name):
  pytest.importorskip('torch', reason='reading the recorded .bin checkpoint needs torch')
  found = list(depth.verify(records[name]))
  assert [str(q) for q in found if not q.ok] == []
  compared = {q.name.rpartition(': ')[2].partition('[')[0] for q in found}
  assert [k for k in records[name].case if k not in compared and not k.endswith(INPUTS)] == []


def test_published_schedule(records):
  assert [str(q) for q in depth.schedule(records['pmod']) if not q.ok] == []


def rule(name, **fields):
  """A method with another rule."""

  def change(patch):
    kind = LAYER_KINDS[name]
    patch.setitem(LAYER_KINDS, name, dataclasses.replace(kind, routing=dataclasses.replace(kind.routing, **fields)))

  return change


def text_weighed(patch):
  original = routing.route

  def route(chosen, weight, image_start, length, rows, budget):
    made = original(chosen, weight, image_start, length, rows, budget)
    weight = jnp.where(made.is_image, made.weight, 0.5)
    return dataclasses.replace(made, weight=weight, is_image=jnp.ones_like(made.is_image))

  patch.setattr(routing, 'route', route)


def renumbered(patch):
  def angles(self, context):
    first = self.route.index.shape[1]
    return dataclasses.replace(context, cos=context.cos[:, :first], sin=context.sin[:, :first])

  patch.setattr(Passing, 'angles', angles)


def frames_together(patch):
  original = routing.best
  patch.setattr(routing, 'best', lambda scores, quota, frames: original(scores, quota * frames))


WRONG = {
  'videollm_mod: best of all frames': ('videollm_mod', frames_together, 'kept_image_index'),
  'videollm_mod: text weighed': ('videollm_mod', text_weighed, 'prefill_logits'),
  'videollm_mod: waiting rows weighed': ('videollm_mod', rule('videollm_mod', scales_waiting=True), 'image_hidden'),
  'videollm_mod: the MLP alone weighed': ('videollm_mod', rule('videollm_mod', scales=MLP), 'image_hidden'),
  'videollm_mod: squashed': ('videollm_mod', rule('videollm_mod', weight=lambda s, o: jnp.tanh(s)), 'image_hidden'),
  'videollm_mod: positions anew': ('videollm_mod', renumbered, 'k_3'),
  'pmod: waiting rows as they were': ('pmod', rule('pmod', scales_waiting=False), 'image_hidden'),
  'pmod: the whole change weighed': ('pmod', rule('pmod', scales=LAYER), 'image_hidden'),
  'pmod: weight that falls with the score': ('pmod', rule('pmod', weight=lambda s, o: 1 - 0.2 * jnp.tanh(s)), 'image_hidden'),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', WRONG)
def test_wrong_builds_are_noticed(records, case, monkeypatch):
  """By a quantity of the prefill; what is decoded from it is not looked at."""
  name, change, quantity = WRONG[case]
  change(monkeypatch)
  answer = runs.Runner.answer
  monkeypatch.setattr(runs.Runner, 'answer', lambda self, asked, steps, text=0: answer(self, asked[:1], 1, text))
  config = ['public_b/four_frames'] if name == 'videollm_mod' else ()
  wrong = (q.name for q in depth.verify(records[name], alone=False, only=config) if not q.ok)
  assert any(quantity in n for n in wrong)


def test_stacks_of_layers_that_take_turns():
  spans = lambda stages, layers: [(s.stage, list(s.layers)) for s in stacks_of(stages, layers)]
  assert spans(DENSE, 4) == [(0, [0, 1, 2, 3])]
  assert spans(PAIRS, 4) == [(0, [0, 2]), (0, [1, 3])]
  assert spans(FALLING, 4) == [(0, [0]), (1, [1]), (2, [2, 3])]
  falling = (Stage(), Stage(start=1, layers=Piece('pmod')))
  assert spans(falling, 4) == [(0, [0]), (1, [1, 2, 3])]
  thirds = (Stage(layers=Piece('videollm_mod', {'layers': (2, 5)})),)
  assert spans(thirds, 6) == [(0, [0, 3]), (0, [1, 4]), (0, [2, 5])]
  assert [list(s.layers) for s in stacks_of((Stage(layers=Piece('pmod')),), 4)] == [[0], [1], [2], [3]]


@pytest.fixture(scope='module')
def routed():
  return dataclasses.replace(CFG, routers=RoutersConfig(method='videollm_mod'))


def with_routers(params, seed=0):
  kernel = np.random.default_rng(seed).standard_normal((CFG.llama.num_layers, CFG.llama.hidden_size)) * 0.3
  return params | {'routers': {'layers': {'kernel': jnp.asarray(kernel, jnp.float32)}}}


@pytest.mark.slow
@pytest.mark.parametrize('stages', [PAIRS, FALLING], ids=['pairs', 'falling'])
def test_rows_padding_and_caching_change_nothing(routed, gating_params, stages):
  generator = Generator(routed, stages, with_routers(gating_params), max_new_tokens=NEW, eos_id=None)
  together = jax.device_get(generator(*batch()))
  before = generator.compilations()
  order = [2, 0, 3, 1]
  shuffled = jax.device_get(generator(*batch([ROWS[i] for i in order], numbers=order)))
  assert generator.compilations() == before
  np.testing.assert_array_equal(shuffled.tokens, together.tokens[order])
  alone = jax.device_get(generator(*batch([ROWS[2]], numbers=[2])))
  np.testing.assert_array_equal(alone.tokens[0], together.tokens[2])
  np.testing.assert_array_equal(jax.device_get(generator(*batch(text=TEXT + 7))).tokens, together.tokens)
  uncached = jax.device_get(generator.generate_uncached(*batch()))
  np.testing.assert_array_equal(together.tokens, uncached.tokens)
  np.testing.assert_array_equal(together.kept, uncached.kept)


@pytest.mark.parametrize('stages', [PAIRS, FALLING], ids=['pairs', 'falling'])
def test_a_cache_holds_what_passes_and_no_more(routed, tiny_params, stages):
  model, spec = DynLlava(routed, stages), CacheSpec(max_new_tokens=NEW)
  prompt, _ = batch()
  image = jnp.zeros((len(ROWS), P, CFG.llama.hidden_size))
  prefill = lambda params: model.apply({'params': params}, prompt, image, spec, method='prefill')[2]
  shapes = jax.eval_shape(prefill, cut_params(with_routers(tiny_params), stages))
  expected = costs.cache_bytes(routed, stages, TEXT, spec, 4)
  assert [2 * 4 * s.k.size // len(ROWS) for s in shapes.stages] == expected
  assert sum(expected) < 0.9 * sum(costs.cache_bytes(routed, DENSE, TEXT, spec, 4))


def test_costs_follow_what_passes(routed):
  per_layer = costs.paper_setting(routed, PAIRS).tokens_per_layer
  assert per_layer == (P, P // 4, P, P // 4)
  spec = CacheSpec(max_new_tokens=4)
  run, dense = (costs.sample_flops(routed, s, 8, [True] * 4, spec) for s in (PAIRS, DENSE))
  rows = lambda n: costs.layer_flops(routed, 8 + n, (8 + n) * (9 + n) / 2)
  keys = 2 * 4 * 4 * routed.llama.num_heads * routed.llama.head_dim * (P - P // 4)  # of four tokens in two layers
  assert dense - run == pytest.approx(2 * (rows(P) - rows(P // 4)) + keys - 2 * 2 * P * routed.llama.hidden_size)


REFUSED = {
  'pmod: needs routers, and this model has those of videollm_mod': (Stage(), Stage(start=1, layers=Piece('pmod'))),
  r'names layers \[0\], the stage has 1 to 3': (Stage(), Stage(start=1, layers=Piece('videollm_mod', {'layers': (0,)}))),
  'none of the layers 2 to 2': (Stage(), Stage(start=2, layers=Piece('videollm_mod')), Stage(start=3)),
  'frames is 3, which does not divide': (Stage(layers=Piece('videollm_mod', {'frames': 3})),),
  'lets none of 16 image tokens pass': (Stage(layers=Piece('videollm_mod', {'keep': 0.01})),),
  'knorm needs all of them': (Stage(layers=Piece('videollm_mod'), compressor=Piece('knorm')),),
  'ranks by the attention of layer 1': (Stage(layers=Piece('videollm_mod')), Stage(start=2, selector='fastv', image_tokens=4)),
}


@pytest.mark.parametrize('message', REFUSED)
def test_runs_that_cannot_be_are_refused(routed, message):
  with pytest.raises(ConfigError, match=message):
    methods.check_run(routed, REFUSED[message])


def test_a_model_without_routers_is_told_so():
  with pytest.raises(ConfigError, match='needs routers, and this model has none; train them with configs/methods.py:videollm_mod'):
    methods.check_run(CFG, PAIRS)


def test_options_that_cannot_be():
  for settings in ({'keep': 0.0}, {'frames': 0}, {'layers': (-1,)}):
    with pytest.raises(ConfigError):
      videollm_mod.Options(**settings)
  for settings in ({'schedule': 'falling'}, {'least': 0.0}, {'layers': (1,)}, {'schedule': 'constant'}):
    with pytest.raises(ConfigError):
      pmod.Options(**settings)
