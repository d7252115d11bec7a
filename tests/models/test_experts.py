"""Layers of experts: recorded gating and wrong builds, dense equal to upcycled, cutting and joining, conversion."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file
from test_invariants import CFG, NEW, batch

from dynllava_jax import checkpoint, costs, methods, presets, sharding
from dynllava_jax.arrangement import APART, STACKED
from dynllava_jax.config import DENSE, ConfigError, ExpertsConfig, LoraConfig, Piece, Stage, TrainConfig
from dynllava_jax.convert import moe_llava as layout
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.export import export
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records import moe_llava
from dynllava_jax.convert.records.bases import open_record
from dynllava_jax.convert.source import Request
from dynllava_jax.convert.upcycle import upcycle
from dynllava_jax.generate import Generator
from dynllava_jax.models.params import abstract_params, count_parameters, cut_params, join_params
from dynllava_jax.ops import experts

DYNAMIC = (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.25))


def with_experts(model, layers=(0, 2), **fields):
  return dataclasses.replace(model, llama=dataclasses.replace(model.llama, experts=ExpertsConfig(layers=layers, **fields)))


WIDE = with_experts(CFG)


@pytest.fixture(scope='module')
def record():
  return open_record(GOLDEN / 'methods' / 'moe_llava', GOLDEN)


@pytest.fixture(scope='module')
def upcycled(tiny_params):
  """The tiny model with copies of its MLPs in layers 0 and 2, and routers at random."""
  llama, rng = tiny_params['llama'], np.random.default_rng(0)
  stacks = {}
  for run in WIDE.llama.runs:
    stack = jax.tree.map(lambda x, run=run: x[run.start : run.stop], llama['layers'])
    if WIDE.llama.has_experts(run.start):
      dense = {name: stack.pop(name) for name in ('gate', 'up', 'down')}
      stack['experts'] = {name: jnp.repeat(w[:, None], 4, 1) for name, w in dense.items()}
      stack['router'] = jnp.asarray(rng.normal(size=(len(run), CFG.llama.hidden_size, 4)), jnp.float32)
    stacks[f'layers_{run.start}'] = stack
  return tiny_params | {'llama': {k: v for k, v in llama.items() if k != 'layers'} | stacks}


def failures(record):
  return {q.name for q in moe_llava.gating(record) if not q.ok}


def test_recorded_gating(record):
  assert failures(record) == set()


CHOOSE = experts.choose
WRONG = {
  'the second choice is not drawn': ('choose', lambda logits, top_k, noise=None: CHOOSE(logits, top_k)),
  'a first choice is the second too': ('choose', lambda logits, top_k, noise=None: jnp.repeat(CHOOSE(logits, 1), top_k, 1)),
  'lost weight is not made up for': ('_normed', lambda gates: gates),
  'a single gate counts as 1': ('_normed', lambda gates: gates / jnp.maximum(gates.sum(-1, keepdims=True), experts.EPS)),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_build_is_seen(record, name, monkeypatch):
  monkeypatch.setattr(experts, *WRONG[name])
  assert failures(record)


def test_padding_takes_no_place_and_is_in_no_mean():
  rng = np.random.default_rng(1)
  logits, noise = (jnp.asarray(rng.normal(size=(20, 4)), jnp.float32) for _ in range(2))
  real = jnp.asarray(rng.permutation(20) < 13)
  for top_k in (1, 2):
    among = experts.trained(logits, top_k, noise, real, 1.0)
    alone = experts.trained(logits[real], top_k, noise[real], jnp.ones(13, bool), 1.0)
    for name in ('expert', 'weight', 'place'):
      np.testing.assert_allclose(getattr(among, name)[real], getattr(alone, name), rtol=1e-6)
    np.testing.assert_allclose([among.balance, among.capacity], [alone.balance, alone.capacity], rtol=1e-6)
    assert (among.place[~real] == -1).all() and not np.asarray(among.weight[~real]).any()


def test_nothing_is_lost_with_room_for_all_and_both_ways_of_computing_agree():
  rng = np.random.default_rng(2)
  x, logits = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((12, 8), (12, 4)))
  gate, up, down = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((4, 8, 6), (4, 8, 6), (4, 6, 8)))
  used, trained = experts.used(logits, 2), experts.trained(logits, 2, jnp.zeros((12, 4)), jnp.ones(12, bool), 2.0)
  np.testing.assert_array_equal(used.expert, trained.expert)
  assert (trained.place >= 0).all()
  whole = experts.through_places(x, gate, up, down, trained, experts.places(12, 4, 2, 2.0))
  np.testing.assert_allclose(experts.through(x, gate, up, down, used), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('stages', [DENSE, DYNAMIC, (Stage(), Stage(start=1), Stage(start=3))], ids=['whole', 'two', 'three'])
@pytest.mark.parametrize('layers', [(0, 2), (0, 1), (1, 2, 3), (0, 1, 2, 3)], ids=str)
def test_cutting_and_joining(stages, layers):
  shapes = sharding.unboxed(abstract_params(with_experts(CFG, layers)))
  params = jax.tree.map(lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape), shapes['llama'])
  back = join_params(cut_params({'llama': params}, stages))['llama']
  assert jax.tree.structure(back) == jax.tree.structure(params)
  assert jax.tree.all(jax.tree.map(np.array_equal, params, back))
  apart = cut_params({'llama': params}, stages, APART)['llama']
  assert ['experts' in apart[name] for name in sorted(k for k in apart if k.startswith('stage'))] == [i in layers for i in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize('arrangement', [STACKED, APART], ids=['stacked', 'apart'])
def test_upcycled_answers_as_dense(tiny_params, upcycled, arrangement):
  """With a cache and without one, behind a cut and under a gate; rows do not depend on their neighbours."""
  dense = Generator(CFG, DYNAMIC, tiny_params, max_new_tokens=NEW, eos_id=None)
  expected = jax.device_get(dense(*batch()))
  wide = Generator(WIDE, DYNAMIC, cut_params(upcycled, DYNAMIC, arrangement), max_new_tokens=NEW, eos_id=None)
  found = jax.device_get(wide(*batch()))
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  np.testing.assert_array_equal(found.kept, expected.kept)


@pytest.mark.slow
def test_every_recorded_quantity_agrees(record):
  found = list(moe_llava.verify(record))
  assert [str(q) for q in found if not q.ok] == []
  compared = {q.name.rpartition(': ')[2].partition('[')[0] for q in found}
  given = ('ids', 'prompt', 'labels', 'uniform', 'gumbel', 'gumbel_0', 'gumbel_2', 'unit_top2/logits')
  assert [k for k in record.case if k not in compared and not k.endswith(given)] == []


@pytest.mark.slow
def test_checkpoints_on_their_way(tmp_path, tiny_params):
  """Upcycled from one of ours, to the authors' layout and back: the same parameters, each expert a copy."""
  base = GOLDEN / 'public_b'
  convert(Request(src=base / 'checkpoint', vision=base / 'clip'), tmp_path / 'dynamic')
  info = upcycle(tmp_path / 'dynamic', tmp_path / 'wide', 4)
  assert info.model.llama.experts.layers == tuple(range(0, info.model.llama.num_layers, 2))
  dense, wide = (checkpoint.load_params(tmp_path / name) for name in ('dynamic', 'wide'))
  for layer in info.model.llama.experts.layers:
    for expert in range(4):
      copy = wide['llama'][f'layers_{layer}']['experts']['up'][0, expert]
      np.testing.assert_array_equal(copy, dense['llama']['layers']['up'][layer])
  stages = checkpoint.read_info(tmp_path / 'wide').stages
  cut = checkpoint.load_params(tmp_path / 'wide', stages=stages)
  whole = cut_params(wide, stages, APART)
  assert jax.tree.all(jax.tree.map(np.array_equal, cut, {name: whole[name] for name in cut}))
  export(tmp_path / 'wide', tmp_path / 'theirs', 'moe-llava', drop_predictors=True)
  config = json.loads((tmp_path / 'theirs' / 'config.json').read_text())
  assert config['model_type'] == layout.MODEL_TYPE and config['moe']['num_experts'] == [4] * len(config['moe']['moe_layers_idx'])
  names = load_file(tmp_path / 'theirs' / 'model.safetensors')
  assert 'model.layers.0.mlp.deepspeed_moe.gate.wg.weight' in names and 'model.mm_projector.image_spatial_proj.0.weight' in names
  source, _ = convert(Request(src=tmp_path / 'theirs'), tmp_path / 'back')
  assert source.layout == 'MoE-LLaVA (the authors)' and source.info.model.llama.experts == info.model.llama.experts
  back = checkpoint.load_params(tmp_path / 'back')
  assert jax.tree.all(jax.tree.map(np.array_equal, back, {name: wide[name] for name in back}))
  with pytest.raises(ConversionError, match='--export=llava: the model has experts'):
    export(tmp_path / 'wide', tmp_path / 'llava', 'llava')
  with pytest.raises(ConversionError, match='has experts in layers .* already'):
    upcycle(tmp_path / 'wide', tmp_path / 'wider', 4)


def test_what_does_not_go_together():
  with pytest.raises(ConfigError, match='goes by the channels of an MLP, and this model has experts'):
    methods.check_run(WIDE, (Stage(layers=Piece('redundancylens', {'ffn_layers': (1,)})),))
  with pytest.raises(ConfigError, match='does not go together with layers of experts'):
    methods.check_run(WIDE, (Stage(layers=Piece('videollm_mod', {'keep': 0.25})),))
  with pytest.raises(ConfigError, match='lora: adapters know no layers with experts'):
    TrainConfig(model=WIDE, lora=LoraConfig(), init_from='base')
  for fields, words in ((dict(count=1), 'count is 1'), (dict(top_k=3), 'top_k is 3'), (dict(layers=(2, 0)), 'ascending')):
    with pytest.raises(ConfigError, match=words):
      with_experts(presets.TINY, **fields)
  with pytest.raises(ConfigError, match='experts in layer 4, but there are 4 layers'):
    with_experts(presets.TINY, layers=(4,))


def test_what_experts_cost():
  mlp = 3 * CFG.llama.hidden_size * CFG.llama.mlp_dim
  more = count_parameters(sharding.unboxed(abstract_params(WIDE))) - count_parameters(sharding.unboxed(abstract_params(CFG)))
  assert more == 2 * (3 * mlp + 4 * CFG.llama.hidden_size)
  plain, wide = (costs.layer_flops(CFG, 10, 55), costs.layer_flops(WIDE, 10, 55, experts=True))
  assert wide - plain == 10 * 2 * (mlp + 4 * CFG.llama.hidden_size)
