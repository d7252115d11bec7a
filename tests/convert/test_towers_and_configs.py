"""What a checkpoint's configs say, and towers in other places and spellings."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_parts import CASE, CLIP, CONFIG, WEIGHTS, planned, write

from dynllava_jax import checkpoint, presets
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.export import export
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.source import Request, open_source


def test_settings_that_both_layouts_have_go_along(tmp_path):
  told = {'bos_token_id': 5, 'eos_token_id': 7, 'max_position_embeddings': 777}
  convert(Request(src=write(tmp_path / 'source', CONFIG | told, WEIGHTS), vision=CLIP), tmp_path / 'ours')
  export(tmp_path / 'ours', tmp_path / 'hf', 'llava-hf', drop_predictors=True)
  config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  assert told.items() <= config['text_config'].items()
  (tmp_path / 'hf' / 'config.json').write_text(json.dumps(config | {'pad_token_id': 3}))
  convert(Request(src=tmp_path / 'hf'), tmp_path / 'again')
  export(tmp_path / 'again', tmp_path / 'back', 'llava')
  assert (told | {'pad_token_id': 3}).items() <= json.loads((tmp_path / 'back' / 'config.json').read_text()).items()


@pytest.mark.parametrize(
  'stated, expected', [({'image_token_index': None}, 512), ({'image_token_index': None, 'image_token_id': 9}, 9)]
)
def test_config_whose_image_token_is_null(tmp_path, stated, expected):
  convert(Request(src=CASE / 'checkpoint'), tmp_path / 'ours')
  export(tmp_path / 'ours', tmp_path / 'hf', 'llava-hf', drop_predictors=True)
  config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  (tmp_path / 'hf' / 'config.json').write_text(json.dumps(config | stated))
  convert(Request(src=tmp_path / 'hf'), tmp_path / 'again')
  export(tmp_path / 'again', tmp_path / 'back', 'llava-hf')
  assert json.loads((tmp_path / 'back' / 'config.json').read_text())['image_token_index'] == expected


def test_image_processor_inside_the_processor(tmp_path):
  """As transformers 5 saves it."""
  clip = write(tmp_path / 'clip', json.loads((CLIP / 'config.json').read_text()), load_file(CLIP / 'model.safetensors'))
  images = {'image_mean': [0.1, 0.2, 0.3], 'image_std': [0.4, 0.5, 0.6]}
  (clip / 'processor_config.json').write_text(json.dumps({'image_processor': images}))
  found, _ = planned(src=CASE / 'checkpoint', vision=clip)
  assert found.info.model.vision.image_mean == (0.1, 0.2, 0.3) and found.info.model.vision.image_std == (0.4, 0.5, 0.6)


@pytest.mark.parametrize(
  'rename',
  [
    lambda k: k,
    lambda k: k.removeprefix('vision_model.'),  # CLIPVisionModel since transformers 5
  ],
)
def test_spellings_of_clip(tmp_path, rename):
  weights = {rename(k): v for k, v in load_file(CLIP / 'model.safetensors').items()}
  # What a whole CLIP holds besides, and a buffer of old versions.
  extra = {'text_model.final_layer_norm.weight': np.ones(4, np.float32), 'logit_scale': np.ones((), np.float32)}
  extra['vision_model.embeddings.position_ids'] = np.arange(65)[None]
  clip = write(tmp_path / 'clip', json.loads((CLIP / 'config.json').read_text()), weights | extra)
  found, _ = planned(src=CASE / 'checkpoint', vision=clip)
  assert any(n.startswith('passed over 2 tensors') for n in found.notes)
  assert "passed over 1 tensors of CLIP's text tower, which is not whole" in found.notes and found.info.model.clip_text is None


def test_tower_inside_the_checkpoint(tmp_path):
  """Used if the CLIP directory has only its config; without any config the sizes are not known."""
  inside = {f'model.vision_tower.vision_tower.{k}': v + 1 for k, v in load_file(CLIP / 'model.safetensors').items()}
  source = write(tmp_path / 'source', CONFIG, WEIGHTS | inside)
  with pytest.raises(ConversionError, match=r'the vision tower ../clip is no CLIP directory here'):
    open_source(Request(src=source))
  write(tmp_path / 'clip', json.loads((CLIP / 'config.json').read_text()), None)
  _, plan = planned(src=source)
  name = 'vision_model.pre_layrnorm.bias'
  np.testing.assert_array_equal(plan['vision/pre_layernorm/bias'].load(), inside[f'model.vision_tower.vision_tower.{name}'])
  found, plan = planned(src=source, vision=CLIP)
  np.testing.assert_array_equal(plan['vision/pre_layernorm/bias'].load(), load_file(CLIP / 'model.safetensors')[name])
  assert any('of the tower inside the checkpoint' in n for n in found.notes)


def test_tower_that_was_trained(tmp_path):
  """LLaVA's flag for it: then the copy inside the checkpoint counts, in and out and in again."""
  inside = {f'model.vision_tower.vision_tower.{k}': v + 1 for k, v in load_file(CLIP / 'model.safetensors').items()}
  source = write(tmp_path / 'source', CONFIG | {'unfreeze_mm_vision_tower': True}, WEIGHTS | inside)
  convert(Request(src=source, vision=CLIP), tmp_path / 'ours')
  export(tmp_path / 'ours', tmp_path / 'back', 'dynamic-llava')
  assert json.loads((tmp_path / 'back' / 'config.json').read_text())['unfreeze_mm_vision_tower'] is False
  for src in (source, tmp_path / 'back'):
    _, plan = planned(src=src, vision=None if src != source else CLIP)
    expected = inside['model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias']
    np.testing.assert_array_equal(plan['vision/pre_layernorm/bias'].load(), expected)


@pytest.mark.parametrize(
  'config, message',
  [
    ({'model_type': 'llava_next'}, r"model_type 'llava_next', LLaVA-NeXT \(any-resolution images\), is not supported"),
    ({'model_type': 'llava_mpt'}, 'LLaVA on MPT, is not supported'),
    ({'model_type': 'llava_qwen'}, 'LLaVA on Qwen, is not supported'),
    ({'model_type': 'qwen2_vl'}, "model_type 'qwen2_vl' is not supported"),
    ({'model_type': 'llava', 'text_config': {'model_type': 'qwen2'}}, "text_config.model_type 'qwen2' is not supported"),
    (
      {'model_type': 'llava', 'text_config': {}, 'vision_config': {'model_type': 'siglip_vision_model'}},
      "tower 'siglip_vision_model'",
    ),
    ({}, "model_type '' is not supported"),
  ],
)
def test_other_architectures(tmp_path, config, message):
  with pytest.raises(ConversionError, match=f'config.json: .*{message}'):
    open_source(Request(src=write(tmp_path / 'src', config, {'x': np.zeros(1, np.float32)})))


def test_published_config_that_leaves_out_defaults(tmp_path):
  """As llava-hf/llava-1.5-7b-hf has it: what equals the defaults of LlamaConfig is not there."""
  config = {
    'image_token_index': 32000,
    'model_type': 'llava',
    'pad_token_id': 32001,
    'projector_hidden_act': 'gelu',
    'text_config': {'max_position_embeddings': 4096, 'model_type': 'llama', 'rms_norm_eps': 1e-05, 'vocab_size': 32064},
    'vision_config': {
      'hidden_size': 1024,
      'image_size': 336,
      'intermediate_size': 4096,
      'model_type': 'clip_vision_model',
      'num_attention_heads': 16,
      'num_hidden_layers': 24,
      'patch_size': 14,
    },
    'vision_feature_layer': -2,
    'vision_feature_select_strategy': 'default',
  }
  src = write(tmp_path / 'hf', config, {'x': np.zeros(1, np.float32)})
  llama = dataclasses.replace(presets.LLAVA_1_5_7B.llama, vocab_size=32064)
  assert open_source(Request(src=src)).info.model == dataclasses.replace(presets.LLAVA_1_5_7B, llama=llama)


@pytest.mark.parametrize(
  'stated, aspect',
  [({'image_aspect_ratio': 'pad'}, 'pad'), ({'image_aspect_ratio': None}, 'square'), ({}, 'square')],
  ids=['pad', 'null', 'missing'],
)
def test_how_pictures_are_made_square_goes_along(stated, aspect, tmp_path):
  """As LLaVA reads its config: the middle is cut out unless it says `pad`."""
  config = {k: v for k, v in CONFIG.items() if k != 'image_aspect_ratio'} | stated
  convert(Request(src=write(tmp_path / 'src', config, WEIGHTS), vision=CLIP), tmp_path / 'ours')
  assert checkpoint.read_info(tmp_path / 'ours').image_aspect == aspect
  for layout, options in (('dynamic-llava', {}), ('llava-hf', {'drop_predictors': True})):
    back = tmp_path / layout
    export(tmp_path / 'ours', back, layout, **options)
    assert open_source(Request(src=back)).info.image_aspect == aspect
