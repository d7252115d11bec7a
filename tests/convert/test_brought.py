"""Exit heads and memory tokens on their way in and out."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_parts import CLIP, CONFIG, LLAMA, PROJECTOR, WEIGHTS, write

from dynllava_jax import checkpoint, presets
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import ExitHeadConfig, MemoryConfig, RelevanceConfig
from dynllava_jax.convert import brought
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.export import export
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.source import Request

MEMORY = dict(slots=3, rate=4, rank=2, alpha=8.0, targets=['q', 'o'])
INFO = CheckpointInfo(model=dataclasses.replace(presets.TINY, predictor=None))


def added() -> dict[str, np.ndarray]:
  """Tensors by the authors' names, all different."""
  rng, (vocab, width), layers = np.random.default_rng(0), WEIGHTS['lm_head.weight'].shape, CONFIG['num_hidden_layers']
  shapes = {'exit.norm.weight': (width,), 'exit.head.weight': (vocab, width), 'memory_token_embed.weight': (6, width)}
  for i in range(layers):
    for name in 'qo':
      at = f'model.layers.{i}.self_attn.{name}_proj'
      shapes |= {f'{at}.lora_A.weight': (2, width), f'{at}.lora_B.weight': (width, 2)}
  return {name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.slow
def test_there_and_back(tmp_path):
  config = {k: v for k, v in CONFIG.items() if k != 'sparse_config'} | {
    brought.KEYS['exit_head']: {},
    brought.KEYS['memory']: MEMORY,
  }
  own = added()
  convert(Request(src=write(tmp_path / 'source', config, LLAMA | PROJECTOR | own), vision=CLIP), tmp_path / 'ours')
  model = checkpoint.read_info(tmp_path / 'ours').model
  assert model.exit_head == ExitHeadConfig() and model.memory == MemoryConfig(**MEMORY | {'targets': ('q', 'o')})
  with pytest.raises(ConversionError, match='exit head, memory tokens, which have no place in that layout'):
    export(tmp_path / 'ours', tmp_path / 'hf', 'llava-hf')
  export(tmp_path / 'ours', tmp_path / 'back', 'llava')
  found = {k: v for file in (tmp_path / 'back').glob('*.safetensors') for k, v in load_file(file).items()}
  for name, array in own.items():
    np.testing.assert_array_equal(found[name], array)
  written = json.loads((tmp_path / 'back' / 'config.json').read_text())
  assert written[brought.KEYS['exit_head']] == {} and written[brought.KEYS['memory']] == MEMORY
  export(tmp_path / 'ours', tmp_path / 'plain', 'llava', drop_predictors=True)
  plain = {k for file in (tmp_path / 'plain').glob('*.safetensors') for k in load_file(file)}
  assert not plain & own.keys() and brought.KEYS['memory'] not in json.loads((tmp_path / 'plain' / 'config.json').read_text())


def test_what_has_no_name_in_pytorch_is_left_behind_or_refused():
  scores = dataclasses.replace(INFO, model=dataclasses.replace(INFO.model, relevance=RelevanceConfig()))
  for layout in ('llava', 'peft'):
    with pytest.raises(ConversionError, match=f'--export={layout}: the model has score of image tokens, which have no place'):
      brought.exported(scores, layout, drop=False, keeps=True)
  assert brought.exported(scores, 'llava', drop=True, keeps=True) == INFO
  leaves = dataclasses.replace(INFO, model=dataclasses.replace(INFO.model, exit_head=ExitHeadConfig()))
  assert brought.exported(leaves, 'llava', drop=False, keeps=True) == leaves
