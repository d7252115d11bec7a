"""Strict construction: every mistake is one readable ConfigError."""

import json

import pytest
from ml_collections import ConfigDict

from dynllava_jax import presets
from dynllava_jax.config import DENSE, ConfigError, ModelConfig, Piece, Stage, TrainConfig, check_stages, from_config_dict, to_dict


def tiny(**changes):
  return ConfigDict(dict(model=to_dict(presets.TINY), batch_size=8) | changes)


def test_round_trip_through_json():
  cfg = from_config_dict(
    TrainConfig,
    tiny(stages=[dict(start=0), dict(start=2, selector='dynamic', image_keep_rate=0.25)], sparsity=dict(image_keep_rate=0.25)),
  )
  assert from_config_dict(TrainConfig, json.loads(json.dumps(to_dict(cfg)))) == cfg
  assert cfg.model == presets.TINY and cfg.stages[1].image_keep_rate == 0.25


def test_pieces_are_groups_outside_and_hashable_inside():
  plain = dict(reducer=dict(name='a', dominant=11, blocks=[1, 2]), stages=[dict(start=0, options=dict(y=2.5, x=True))])
  cfg = from_config_dict(TrainConfig, tiny(**plain))
  assert cfg.reducer == Piece('a', {'blocks': (1, 2), 'dominant': 11})
  assert hash(cfg.reducer) == hash(Piece('a', cfg.reducer.options))
  assert cfg.stages == (Stage(options={'x': True, 'y': 2.5}),) and cfg.stages[0].options == (('x', True), ('y', 2.5))
  stored = json.loads(json.dumps(to_dict(cfg)))
  assert stored['reducer'] == dict(plain['reducer'], blocks=[1, 2]) and stored['stages'][0]['options'] == {'x': True, 'y': 2.5}
  assert from_config_dict(TrainConfig, stored) == cfg


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(bach_size=4), "config.bach_size: unknown key; did you mean 'batch_size'"),
    (dict(batch_size=4.5), r'config.batch_size: expected int, got 4.5 \(float\)'),
    (dict(batch_size=True), 'config.batch_size: expected int, got True'),
    (dict(batch_size=0), 'batch_size is 0, expected a positive number'),
    (
      dict(stages=[dict(start=0), dict(start=2, selector='dynamic', image_keep_rate=1.5)]),
      r'config.stages\[1\]: stage at layer 2: image_keep_rate is 1.5, expected a share in \(0, 1\]',
    ),
    (dict(stages=[dict(start=0), dict(start=9, selector='dynamic')]), 'starts at layer 9, but the decoder has 4 layers'),
    (dict(stages=[dict(start=1)]), 'the first stage must start at layer 0'),
    (dict(stages=[dict(start=0), dict(start=2, selector='dynamic', image_keep_rate=0.01)]), 'leaves none of the 16 image tokens'),
    (dict(stages=[dict(start=0, image_keep_rate=0.5)]), "selector 'all' keeps every token"),
    (dict(stages=[dict(start=0, image_tokens=8)]), "selector 'all' keeps every token"),
    (dict(stages=[dict(start=0), dict(start=2, selector='uniform', image_tokens=17)]), '17 are more than the 16 of the run'),
    (
      dict(stages=[dict(start=0), dict(start=2, selector='uniform', image_tokens=4, image_keep_rate=0.5)]),
      'image_tokens 4 and image_keep_rate 0.5 both say how many image tokens stay',
    ),
    (dict(stages=[dict(start=0, options=3)]), r'config.stages\[0\].options: expected a group of settings, got 3'),
    (dict(stages=[dict(start=0, compressor=dict(budget=3))]), r'config.stages\[0\].compressor.name: expected the name of a method'),
    (dict(reducer='visionzip'), r"config.reducer: expected a group with a name, such as dict\(name='fastervlm'\), got 'visionzip'"),
    (dict(stages='dense'), "config.stages: expected a list, got 'dense'"),
    (dict(sparsity=dict(image_keep_rate=0.0)), 'image_keep_rate is 0.0'),
    (dict(sparsity=dict(tau_end=float('nan'))), 'expected a finite number'),
    (dict(stages=[dict(start=0), dict(start=2, selector='dynamic', image_keep_rate=0.5)]), 'but the dynamic stage keeps 0.5'),
    (dict(seed=-1), 'seed is -1, expected 0 to 4294967295'),
    (dict(seed=10**20), 'seed is 100000000000000000000, expected 0 to 4294967295'),
    (dict(optimizer=dict(weight_decay=-1.0)), 'weight_decay is -1.0, expected 0 or more'),
    (dict(sparsity=dict(mask_loss_weight=-5.0)), 'mask_loss_weight is -5.0, expected 0 or more'),
    (dict(sparsity=dict(min_answer_len=-3)), 'min_answer_len is -3, expected 0 or more'),
    (
      dict(frozen=('vision', 'projector', 'llama', 'image_predictor', 'text_predictor')),
      'frozen: vision, projector, llama, image_predictor, text_predictor leaves nothing to train',
    ),
    (
      dict(model=to_dict(presets.TINY) | dict(llama=dict(num_heads=0))),
      'config.model.llama: llama: num_heads is 0, expected a positive',
    ),
    (dict(frozen=('visoin',)), "'visoin' is no parameter group"),
    (dict(dtype='float16'), 'expected float32 or bfloat16'),
    (dict(optimizer=dict(warmup_share=1.0)), r'warmup_share is 1.0, expected \[0, 1\)'),
  ],
)
def test_mistakes_are_named(changes, message):
  with pytest.raises(ConfigError, match=message) as error:
    from_config_dict(TrainConfig, tiny(**changes))
  assert '\n' not in str(error.value)


def test_missing_key_is_named():
  with pytest.raises(ConfigError, match='config: missing model'):
    from_config_dict(TrainConfig, ConfigDict(dict(batch_size=8)))


def test_dynamic_needs_predictors():
  with pytest.raises(ConfigError, match='needs predictors'):
    check_stages((Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.2)), presets.LLAVA_1_5_7B)


@pytest.mark.parametrize('projector, depth', [('linear', 1), ('mlp2x_gelu', 2), ('mlp3x_gelu', 3)])
def test_projector_depth(projector, depth):
  assert ModelConfig(projector=projector).projector_depth == depth


@pytest.mark.parametrize('projector', ['mlp_gelu', 'mlpx_gelu', 'mlp0x_gelu', 'resampler', 'mlp2x_relu'])
def test_unknown_projector(projector):
  with pytest.raises(ConfigError, match='expected linear or mlpNx_gelu'):
    ModelConfig(projector=projector)


def test_budget_truncates_the_float_product():
  assert Stage(start=2, selector='uniform', image_keep_rate=0.2).kept_image_tokens(576) == 115
  check_stages(DENSE, presets.TINY)


def test_an_absolute_budget_is_that_many_and_nothing_where_there_is_no_image():
  stage = Stage(start=2, selector='uniform', image_tokens=32)
  assert [stage.kept_image_tokens(n) for n in (576, 64, 0)] == [32, 32, 0]
