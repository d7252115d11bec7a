"""Against transformers itself, on tiny random models: every key layout in, the same numbers, and back without a stray key."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

from dynllava_jax import checkpoint
from dynllava_jax.config import DENSE, DataConfig
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.export import export
from dynllava_jax.convert.readers import directory_tensors
from dynllava_jax.convert.records.base import prompt_from_ids
from dynllava_jax.convert.source import Request, open_source
from dynllava_jax.data.sources import new_tokenizer
from dynllava_jax.data.tokenizer import load_tokenizer
from dynllava_jax.models.batch import TrainInputs
from dynllava_jax.models.dynllava import DynLlava
from dynllava_jax.models.params import cut_params

torch = pytest.importorskip('torch', reason='the oracle, transformers, needs torch')
transformers = pytest.importorskip('transformers')

IMAGE, PATCHES = 95, 16
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
VARIANTS = {
  'plain': {},
  'grouped': {'num_key_value_heads': 2},
  'tied': {'tie_word_embeddings': True},
  'linear': {'rope_parameters': {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 500.0}},
  'llama3': {'rope_parameters': LLAMA3 | {'rope_theta': 500.0}},
}


def make_model(**text):
  torch.manual_seed(0)
  config = transformers.LlavaConfig(
    vision_config=transformers.CLIPVisionConfig(
      hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    ),
    text_config=transformers.LlamaConfig(
      **dict(
        vocab_size=IMAGE + 1,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.3,
      )
      | text
    ),
    image_token_index=IMAGE,
    image_seq_length=PATCHES,
    tie_word_embeddings=text.get('tie_word_embeddings', False),
  )
  return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Each variant as transformers has it, and converted from what it saves."""
  made = {}
  for name, text in VARIANTS.items():
    folder = tmp_path_factory.mktemp(name)
    model = make_model(**text)
    model.save_pretrained(folder / 'hf')
    convert(Request(src=folder / 'hf'), folder / 'ours')
    made[name] = (model, folder)
  return made


def parameters(path):
  return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(checkpoint.load_params(path))}


def assert_same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    assert a[key].dtype == b[key].dtype
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize('variant', VARIANTS)
def test_same_features_logits_and_greedy_tokens(models, variant):
  model, folder = models[variant]
  pixels = np.random.default_rng(1).standard_normal((1, 3, 56, 56)).astype(np.float32)
  ids = np.array([[1, 7, *[IMAGE] * PATCHES, 20, 33, 4]])
  with torch.no_grad():
    vision = model.model.vision_tower(torch.tensor(pixels), output_hidden_states=True)
    features = vision.hidden_states[-2][:, 1:].numpy()
    inputs = dict(
      input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels), attention_mask=torch.ones(ids.shape, dtype=torch.long)
    )
    tokens = model.generate(
      **inputs, max_new_tokens=12, do_sample=False, suppress_tokens=[IMAGE], eos_token_id=None, pad_token_id=0
    ).numpy()
    logits = model(
      **(inputs | dict(input_ids=torch.tensor(tokens), attention_mask=torch.ones(tokens.shape, dtype=torch.long)))
    ).logits
  info = checkpoint.read_info(folder / 'ours')
  ours = DynLlava(info.model, DENSE)
  params = {'params': cut_params(checkpoint.load_params(folder / 'ours'), DENSE)}
  nhwc = jnp.asarray(pixels.transpose(0, 2, 3, 1))
  found = ours.apply(params, nhwc, method='vision_features')
  np.testing.assert_allclose(found, features, atol=1e-4, rtol=0)
  short = np.concatenate([tokens[:, :2], [[-200]], tokens[:, 2 + PATCHES :]], 1)
  start = jnp.array([ids.shape[1]])

  def forward(params):
    image = ours.apply(params, nhwc, method='encode_images')
    return ours.apply(params, prompt_from_ids(short, PATCHES), image, TrainInputs(start), method='train_forward').logits

  found = np.asarray(jax.jit(forward)(params))
  np.testing.assert_allclose(found, logits.numpy(), atol=1e-4, rtol=0)
  # Fed with its own choices, the model chooses them again: greedy generation is the same.
  answer = tokens[0, ids.shape[1] :]
  assert len(set(answer)) > 3
  np.testing.assert_array_equal(found[0, ids.shape[1] - 1 : -1, :IMAGE].argmax(-1), answer)


SPELLINGS = {
  'transformers 4.36 to 4.51': lambda k: k,
  'transformers 4.52 in memory': lambda k: re.sub(
    '^(?!lm_head)', 'model.', k.replace('language_model.lm_head', 'lm_head').replace('language_model.model', 'language_model')
  ),
  'transformers 5 saved': lambda k: k.replace('vision_tower.vision_model.', 'vision_tower.'),
  'transformers 5 in memory': lambda k: re.sub(
    '^(?!lm_head)',
    'model.',
    k.replace('language_model.lm_head', 'lm_head').replace('language_model.model', 'language_model').replace('vision_model.', ''),
  ),
}


@pytest.mark.parametrize('spelling', SPELLINGS)
def test_every_spelling_of_the_keys(models, tmp_path, spelling):
  _, folder = models['grouped']
  export(folder / 'ours', tmp_path / 'hf', 'llava-hf')
  file = tmp_path / 'hf' / 'model.safetensors'
  weights = load_file(file)
  assert 'vision_tower.vision_model.pre_layrnorm.weight' in weights and 'language_model.lm_head.weight' in weights
  save_file({SPELLINGS[spelling](k): v for k, v in weights.items()}, file, metadata={'format': 'pt'})
  convert(Request(src=tmp_path / 'hf'), tmp_path / 'again')
  assert_same(parameters(tmp_path / 'again'), parameters(folder / 'ours'))
  _, report = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / 'hf', output_loading_info=True)
  assert not report['missing_keys'] and not report['unexpected_keys'] and not report['mismatched_keys']


@pytest.mark.parametrize('variant', VARIANTS)
def test_export_gives_transformers_the_same_model(models, tmp_path, variant):
  model, folder = models[variant]
  export(folder / 'ours', tmp_path / 'back', 'llava-hf')
  again, report = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / 'back', output_loading_info=True)
  assert not report['missing_keys'] and not report['unexpected_keys'] and not report['mismatched_keys']
  expected = model.state_dict()
  assert expected.keys() == again.state_dict().keys()
  for key, value in again.state_dict().items():
    assert torch.equal(value, expected[key]), key
  inv_freq = lambda m: m.model.language_model.rotary_emb.inv_freq
  assert torch.equal(inv_freq(model), inv_freq(again))


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_round_trip_keeps_every_bit_of_the_stored_dtype(tmp_path, dtype):
  make_model().to(getattr(torch, dtype)).save_pretrained(tmp_path / 'hf')
  convert(Request(src=tmp_path / 'hf'), tmp_path / 'ours')
  export(tmp_path / 'ours', tmp_path / 'back', 'llava-hf')
  convert(Request(src=tmp_path / 'back'), tmp_path / 'again')
  assert {x.dtype.name for x in parameters(tmp_path / 'again').values()} == {dtype}
  assert_same(parameters(tmp_path / 'again'), parameters(tmp_path / 'ours'))


def test_authors_layout_through_hugging_face_and_back(tmp_path):
  """A vocabulary without image token is padded on the way out and cut again on the way in."""
  convert(Request(src=GOLDEN / 'public_b' / 'checkpoint'), tmp_path / 'ours')
  export(tmp_path / 'ours', tmp_path / 'hf', 'llava-hf', drop_predictors=True)
  model, report = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / 'hf', output_loading_info=True)
  assert not report['missing_keys'] and not report['unexpected_keys'] and not report['mismatched_keys']
  assert model.config.text_config.vocab_size == 576 and model.config.image_token_id == 512
  logits = model(
    input_ids=torch.tensor([[1, *[512] * 64, 5]]),
    pixel_values=torch.zeros(1, 3, 112, 112),
    attention_mask=torch.ones(1, 66, dtype=torch.long),
  ).logits
  assert int(logits[0, -1].argmax()) < 512
  convert(Request(src=tmp_path / 'hf'), tmp_path / 'again')
  ours = {k: v for k, v in parameters(tmp_path / 'ours').items() if 'predictor' not in k}
  assert_same(parameters(tmp_path / 'again'), ours)


def test_exported_processor_and_its_image_token(tmp_path):
  """The tokenizer has fewer pieces than the embedding rows: `<image>` comes after the pieces, and no rows are added."""
  convert(Request(src=GOLDEN / 'public_b' / 'checkpoint'), tmp_path / 'ours')
  files = new_tokenizer(DataConfig(text_length=104), 512)
  for name, content in files.items():
    (tmp_path / 'ours' / name).write_bytes(content)
  export(tmp_path / 'ours', tmp_path / 'hf', 'llava-hf', drop_predictors=True)
  config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  assert config['text_config']['vocab_size'] == 512 and 'unpadded_vocab_size' not in config
  processor = transformers.AutoProcessor.from_pretrained(tmp_path / 'hf')
  inputs = processor(images=np.zeros((50, 60, 3), np.uint8), text='<image>', return_tensors='np')
  ids = inputs['input_ids'][0].tolist()
  assert ids.count(config['image_token_index']) == 64 and config['image_token_index'] == len(load_tokenizer(files)) < 510
  assert inputs['pixel_values'].shape == (1, 3, 112, 112)
  assert processor.tokenizer.pad_token_id == config['pad_token_id'] == config['image_token_index'] + 1


@pytest.mark.parametrize('case', ['public_a', 'public_b'])
def test_authors_layout_comes_back_key_for_key_and_bit_for_bit(tmp_path, case):
  source = GOLDEN / case / 'checkpoint'
  convert(Request(src=source), tmp_path / 'ours')
  export(tmp_path / 'ours', tmp_path / 'back', 'dynamic-llava')
  for theirs, ours in ((source, tmp_path / 'back'), (GOLDEN / case / 'clip', tmp_path / 'back' / 'clip')):
    expected = {t.key: t.read() for t in directory_tensors(theirs) if 'vision_tower.vision_tower' not in t.key}
    found = {t.key: t.read() for t in directory_tensors(ours)}
    assert found.keys() == {k for k in expected if not k.endswith('position_ids')}
    for key, value in found.items():
      assert value.dtype == expected[key].dtype
      np.testing.assert_array_equal(value, expected[key], err_msg=key)
  before, after = (json.loads((d / 'config.json').read_text()) for d in (source, tmp_path / 'back'))
  assert {k: v for k, v in after.items() if k != 'mm_vision_tower'} == {k: v for k, v in before.items() if k != 'mm_vision_tower'}
  clip = transformers.CLIPVisionModel.from_pretrained(tmp_path / 'back' / 'clip', output_loading_info=True)[1]
  assert not clip['missing_keys'] and not clip['unexpected_keys']
  convert(Request(src=tmp_path / 'back'), tmp_path / 'again')
  assert_same(parameters(tmp_path / 'again'), parameters(tmp_path / 'ours'))


def test_an_export_that_was_moved_takes_its_own_tower(tmp_path):
  convert(Request(src=GOLDEN / 'public_b' / 'checkpoint'), tmp_path / 'ours')
  export(tmp_path / 'ours', tmp_path / 'back', 'dynamic-llava')
  shutil.copytree(tmp_path / 'back', tmp_path / 'moved')
  towers = {t.origin for k, t in open_source(Request(src=tmp_path / 'moved')).tensors if k.startswith('vision_model.')}
  assert towers == {str(tmp_path / 'moved' / 'clip' / 'model.safetensors')}
