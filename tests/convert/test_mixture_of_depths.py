"""p-MoD's checkpoints: their names and settings; layers without a router have zeros."""

import numpy as np
import pytest
from conftest import GOLDEN
from tiny_parts import CLIP, CONFIG, LLAMA, PROJECTOR, planned, write

from dynllava_jax import checkpoint
from dynllava_jax.config import ConfigError, Piece, RoutersConfig, Stage
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.export import export
from dynllava_jax.convert.inputs import ConversionError
from dynllava_jax.convert.source import Request

ROUTERS = dict(np.load(GOLDEN / 'methods' / 'pmod' / 'weights.npz'))
SETTINGS = {
  'model_type': 'pmod_llava_llama',
  'mod_target_layers': 'shiftedcos_decay_0.85_0.15',
  'mod_target_token_type': 'vision_all',
  'mod_router_factor': 0.5,
  'mod_weight_norm': 'tanh_0.2_1',
  'mod_bias_enabled': True,
}
# As the record has it: the schedule ends at the last of 4 layers, so layers 1, 2 and 3 have a router.
ROUTED = (1, 2, 3)


def theirs(key):
  """The name that a tensor has in a checkpoint of p-MoD."""
  for layer in ROUTED:
    key = key.replace(f'model.layers.{layer}.', f'model.layers.{layer}.decoder_layer.')
  return key


def folder(path, config=(), without=()):
  weights = {theirs(k): v for k, v in (LLAMA | PROJECTOR).items()} | {k: v for k, v in ROUTERS.items() if k not in without}
  base = {k: v for k, v in CONFIG.items() if k != 'sparse_config'}
  return write(path / 'pmod', base | SETTINGS | dict(config), weights)


def test_names_and_settings(tmp_path):
  found, plan = planned(src=folder(tmp_path), vision=CLIP)
  assert found.info.model.routers == RoutersConfig(method='pmod', bias=True, layers=ROUTED)
  options = dict(schedule='shiftedcos', most=0.85, least=0.15, factor=0.5, gain=0.2, centre=1.0)
  assert found.info.stages == (Stage(), Stage(start=1, layers=Piece('pmod', options)))
  assert plan['routers/layers/kernel[2]'].tensor.key == 'model.layers.2.router.router.weight'
  assert plan['llama/layers/q[3][0]' if 'llama/layers/q[3][0]' in plan else 'llama/layers/q[3]'].tensor.key == (
    'model.layers.3.decoder_layer.self_attn.q_proj.weight'
  )
  assert 'routers/layers/kernel[0]' not in plan
  np.testing.assert_array_equal(plan['routers/layers/kernel[1]'].load(), ROUTERS['model.layers.1.router.router.weight'][0])


@pytest.mark.parametrize(
  ('config', 'without', 'message'),
  [
    (
      {'mod_target_layers': 'all'},
      (),
      "mod_target_layers is 'all', expected such as shiftedcos_decay",
    ),
    ({'mod_weight_norm': 'softmax'}, (), "mod_weight_norm 'softmax' is not supported"),
    ({'mod_target_token_type': 'vision_hr'}, (), "mod_target_token_type 'vision_hr' is not supported"),
    ({}, ('model.layers.2.router.router.bias',), r'routers/layers/bias\[2\]: missing'),
    ({'mod_target_layers': 'interleave'}, (), r'model.layers.2.router.router.weight .*unknown'),
  ],
)
def test_what_does_not_fit_is_one_line(tmp_path, config, without, message):
  with pytest.raises((ConversionError, ConfigError), match=message):
    planned(src=folder(tmp_path, config, without), vision=CLIP)


@pytest.mark.slow
def test_converted_it_is_loaded_with_zeros_where_there_is_no_router(tmp_path):
  convert(Request(src=folder(tmp_path), vision=CLIP), tmp_path / 'ours')
  info = checkpoint.read_info(tmp_path / 'ours')
  params = checkpoint.load_params(tmp_path / 'ours', None)
  kernel, bias = (np.asarray(params['routers']['layers'][name], np.float32) for name in ('kernel', 'bias'))
  assert info.model.routers.layers == ROUTED and not kernel[0].any() and bias[0] == 0
  for layer in ROUTED:
    np.testing.assert_array_equal(kernel[layer], ROUTERS[f'model.layers.{layer}.router.router.weight'][0])
    np.testing.assert_array_equal(bias[layer], ROUTERS[f'model.layers.{layer}.router.router.bias'][0])
  with pytest.raises(ConversionError, match='the model has routers, which have no place in that layout'):
    export(tmp_path / 'ours', tmp_path / 'back', 'llava')
