"""Interaction weights of Dynamic Context Pruning beside a LLaVA's projections: read by their authors' names, and written back."""

import json

import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

from dynllava_jax import checkpoint
from dynllava_jax.config import Piece, PruningConfig, Stage
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.export import export
from dynllava_jax.convert.inputs import ConversionError
from dynllava_jax.convert.source import Request


@pytest.mark.slow
def test_read_and_written_back(tmp_path):
  pytest.importorskip('torch', reason='reading the recorded .bin checkpoint needs torch')
  convert(Request(src=GOLDEN / 'public_b' / 'checkpoint'), tmp_path / 'dynamic')
  export(tmp_path / 'dynamic', tmp_path / 'llava', 'llava', drop_predictors=True)
  weights, config = (tmp_path / 'llava' / name for name in ('model.safetensors', 'config.json'))
  tensors, told = load_file(weights), json.loads(config.read_text())
  rng, width = np.random.default_rng(0), told['hidden_size']
  for layer in range(told['num_hidden_layers']):
    at = f'model.layers.{layer}.self_attn'
    tensors |= {f'{at}.{n}_int.weight': rng.normal(0, 1, (6, width)).astype(np.float32) for n in 'qk'}
    tensors[f'{at}.int_bias'] = np.full(1, layer, np.float32)
  for file in (tmp_path / 'llava').glob('*.json'):
    if file.name not in ('config.json',) and 'integrity' in file.name:
      file.unlink()
  save_file(tensors, weights, metadata={'format': 'pt'})
  config.write_text(json.dumps(told | {'dynllava_pruning': {'dim': 6}}))
  convert(Request(src=tmp_path / 'llava'), tmp_path / 'ours')
  info, params = checkpoint.read_info(tmp_path / 'ours'), checkpoint.load_params(tmp_path / 'ours')
  assert info.model.pruning == PruningConfig(dim=6)
  assert info.stages == (Stage(layers=Piece('dynamic_context_pruning')),)
  np.testing.assert_array_equal(params['pruning']['layers']['k'][1], tensors['model.layers.1.self_attn.k_int.weight'].T)
  assert params['pruning']['layers']['bias'][:, 0].tolist() == list(range(info.model.llama.num_layers))
  export(tmp_path / 'ours', tmp_path / 'back', 'llava')
  back = load_file(tmp_path / 'back' / 'model.safetensors')
  assert back.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(back[name], value, err_msg=name)
  assert json.loads((tmp_path / 'back' / 'config.json').read_text())['dynllava_pruning']['dim'] == 6
  with pytest.raises(ConversionError, match='weights by which layers vote on their context, which have no place in that layout'):
    export(tmp_path / 'ours', tmp_path / 'hf', 'llava-hf')
