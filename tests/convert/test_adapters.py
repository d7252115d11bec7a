"""Adapters are merged as PEFT reads them (checked against PEFT 0.21), or refused with both files named."""

import json

import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

from dynllava_jax.convert.layouts import spellings, to_llava_hf
from dynllava_jax.convert.plan import assign
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.source import Layout, Request, open_source

CASE = GOLDEN / 'public_b'
AUTHORS = {k: v for k, v in load_file(CASE / 'checkpoint' / 'model.safetensors').items() if 'predictor' not in k}
WHOLE = AUTHORS | load_file(CASE / 'clip' / 'model.safetensors')
CONFIG = json.loads((CASE / 'checkpoint' / 'config.json').read_text())
CLIP = json.loads((CASE / 'clip' / 'config.json').read_text())['vision_config']
TEXT = {k: v for k, v in CONFIG.items() if not k.startswith('mm_') and k != 'sparse_config'} | {'model_type': 'llama'}
RNG = np.random.default_rng(0)
SETTINGS = {'peft_type': 'LORA', 'r': 4, 'lora_alpha': 8, 'bias': 'none', 'target_modules': ['q_proj', 'v_proj']}
QUERY = 'model.layers.2.self_attn.q_proj'
PROJECTOR = 'base_model.model.model.multi_modal_projector'


@pytest.fixture(scope='module')
def hf(tmp_path_factory):
  """The dense part of the case as `LlavaForConditionalGeneration`."""
  directory = tmp_path_factory.mktemp('hf')
  config = {'model_type': 'llava', 'text_config': TEXT, 'vision_config': CLIP, 'image_token_index': 511}
  (directory / 'config.json').write_text(json.dumps(config | {'vision_feature_layer': CONFIG['mm_vision_select_layer']}))
  save_file({to_llava_hf(k): v for k, v in WHOLE.items()}, directory / 'model.safetensors')
  return directory


def pairs(spelling=0, layers=range(4), ranks=None):
  """Matrices for queries and values, in the newest names (0) or the old ones (1)."""
  found = {}
  for i in layers:
    for name in ('q_proj', 'v_proj'):
      key = f'model.layers.{i}.self_attn.{name}'
      module, rank = spellings(Layout.LLAVA_HF, key)[spelling], (ranks or {}).get(key, 4)
      rows = AUTHORS[f'{key}.weight'].shape[0]
      found[f'base_model.model.{module}.lora_A.weight'] = RNG.standard_normal((rank, 80)).astype(np.float32)
      found[f'base_model.model.{module}.lora_B.weight'] = RNG.standard_normal((rows, rank)).astype(np.float32)
  return found


def adapter(directory, matrices, **settings):
  (directory / 'adapter_config.json').write_text(json.dumps(SETTINGS | settings))
  save_file(matrices, directory / 'adapter_model.safetensors')
  return directory


def merged(hf, tmp_path, matrices, **settings):
  found = open_source(Request(src=adapter(tmp_path, matrices, **settings), base=hf))
  assert len(assign(found.info, found.tensors, None)) == len(WHOLE)
  return found, dict(found.tensors)


def change(tensors, matrices, key=QUERY, spelling=0):
  """What was added to a weight, over B A."""
  module = 'base_model.model.' + spellings(Layout.LLAVA_HF, key)[spelling]
  product = matrices[f'{module}.lora_B.weight'] @ matrices[f'{module}.lora_A.weight']
  added = tensors[f'{key}.weight'].load() - AUTHORS[f'{key}.weight']
  scale = (added * product).sum() / (product**2).sum()
  np.testing.assert_allclose(added, scale * product, atol=1e-4)
  return scale


@pytest.mark.parametrize('spelling', [0, 1])
def test_adapter_of_llava_hf(hf, tmp_path, spelling):
  matrices = pairs(spelling)
  found, tensors = merged(hf, tmp_path, matrices)
  assert change(tensors, matrices, spelling=spelling) == pytest.approx(2)
  assert found.info.image_aspect == 'pad' and found.layout.startswith('LoRA adapter, merged into')
  np.testing.assert_array_equal(tensors['model.norm.weight'].load(), AUTHORS['model.norm.weight'])


@pytest.mark.parametrize(
  'settings, expected',
  [
    ({'use_rslora': True}, 4),
    ({'alpha_pattern': {'layers.2.self_attn.q_proj': 2}}, 0.5),
    ({'alpha_pattern': {r'.*\.2\.self_attn\.q_proj': 6, 'q_proj': 2}}, 1.5),  # the first that fits
    ({'alpha_pattern': {'^model.language_model.layers.2.self_attn.q_proj': 6}}, 1.5),
    ({'alpha_pattern': {'proj': 2, 'self_attn': 2}}, 2),  # neither is the end of the name from a dot on
    ({'fan_in_fan_out': True, 'lora_dropout': 0.1, 'task_type': 'CAUSAL_LM'}, 2),
    ({'target_modules': r'.*language_model.*\.(q_proj|v_proj)'}, 2),
    ({'exclude_modules': r'.*vision_tower.*', 'layers_to_transform': [0, 1, 2, 3], 'layers_pattern': 'layers'}, 2),
    ({'bias': 'all', 'use_rslora': None, 'rank_pattern': None}, 2),
  ],
)
def test_settings_that_change_the_arithmetic(hf, tmp_path, settings, expected):
  matrices = pairs()
  assert change(merged(hf, tmp_path, matrices, **settings)[1], matrices) == pytest.approx(expected)


def with_lengths(matrices, suffix=''):
  """The pairs with the rows' lengths of DoRA beside them, as PEFT writes them (`suffix` as versions before 0.9 did)."""
  lengths = {}
  for key, value in matrices.items():
    if 'lora_B' in key:
      lengths[key.replace('lora_B.weight', f'lora_magnitude_vector{suffix}')] = RNG.uniform(1, 2, value.shape[0]).astype(np.float32)
  return matrices | lengths


@pytest.mark.parametrize('suffix', ['', '.weight'])
def test_dora_brings_rows_to_the_length_that_it_says(hf, tmp_path, suffix):
  matrices = with_lengths(pairs(), suffix)
  tensors = merged(hf, tmp_path, matrices, use_dora=True)[1]
  module = f'base_model.model.{spellings(Layout.LLAVA_HF, QUERY)[0]}'
  b, a, lengths = (matrices[f'{module}.lora_{name}'] for name in ('B.weight', 'A.weight', f'magnitude_vector{suffix}'))
  summed = AUTHORS[f'{QUERY}.weight'] + 2 * b @ a
  expected = summed * (lengths / np.linalg.norm(summed, axis=1))[:, None]
  np.testing.assert_allclose(tensors[f'{QUERY}.weight'].load(), expected, rtol=1e-5)


def test_lengths_of_dora_that_contradict(hf, tmp_path):
  matrices = with_lengths(pairs())
  with pytest.raises(ConversionError, match=r'config.json: use_dora is False, but .*safetensors has a lora_magnitude_vector'):
    merged(hf, tmp_path, matrices)
  name = next(k for k in matrices if 'magnitude' in k)
  with pytest.raises(ConversionError, match=r'lora_magnitude_vector \(3,\) does not fit the rows of'):
    merged(hf, tmp_path, matrices | {name: np.ones(3, np.float32)}, use_dora=True)
  with pytest.raises(ConversionError, match='magnitude_vector holds numbers that are not finite'):
    merged(hf, tmp_path, matrices | {name: matrices[name] * np.nan}, use_dora=True)[1][f'{QUERY.replace("2", "0")}.weight'].load()


EMBEDDING = 'base_model.model.model.language_model.embed_tokens'


def embedded(rank=4):
  rows, width = AUTHORS['model.embed_tokens.weight'].shape
  names = f'{EMBEDDING}.lora_embedding_A', f'{EMBEDDING}.lora_embedding_B'
  return {n: RNG.standard_normal(shape).astype(np.float32) for n, shape in zip(names, [(rank, rows), (width, rank)])}


def test_pair_of_the_embedding(hf, tmp_path):
  targets, matrices = {'target_modules': ['q_proj', 'v_proj', 'embed_tokens']}, embedded()
  base = RNG.standard_normal(AUTHORS['model.embed_tokens.weight'].shape).astype(np.float32)
  expected = 2 * (matrices[f'{EMBEDDING}.lora_embedding_B'] @ matrices[f'{EMBEDDING}.lora_embedding_A']).T
  for own in ({}, {f'{EMBEDDING}.base_layer.weight': base}):  # PEFT keeps the embedding it began from beside its pair
    found = merged(hf, tmp_path, pairs() | matrices | own, **targets)[1]['model.embed_tokens.weight'].load()
    began = base if own else AUTHORS['model.embed_tokens.weight']
    np.testing.assert_allclose(found, began + expected, rtol=1e-4, atol=1e-4)
  for wrong, message in (
    ({}, 'leave out .*embed_tokens, but .*safetensors adapts it'),
    (targets | {'r': 2, 'alpha_pattern': {'q_proj': 8}}, 'says rank 2 for'),
  ):
    with pytest.raises(ConversionError, match=message):
      merged(hf, tmp_path, pairs() | matrices, **wrong)
  with pytest.raises(ConversionError, match='embed_tokens.weight has lora_B but not its other half'):
    merged(hf, tmp_path, pairs() | {k: v for k, v in matrices.items() if k.endswith('A')}, **targets)


def test_rank_of_one_module(hf, tmp_path):
  matrices = pairs(ranks={QUERY: 2})
  tensors = merged(hf, tmp_path, matrices, rank_pattern={'2.self_attn.q_proj': 2})[1]
  assert change(tensors, matrices) == pytest.approx(4)
  assert change(tensors, matrices, 'model.layers.2.self_attn.v_proj') == pytest.approx(2)


def test_layers_to_transform(hf, tmp_path):
  matrices = pairs(layers=[2])
  tensors = merged(hf, tmp_path, matrices, layers_to_transform=2)[1]
  assert change(tensors, matrices) == pytest.approx(2)
  np.testing.assert_array_equal(
    tensors['model.layers.1.self_attn.q_proj.weight'].load(), AUTHORS[QUERY.replace('2', '1') + '.weight']
  )


@pytest.mark.parametrize(
  'settings, layers, message',
  [
    ({'r': 8}, 4, r'adapter_config.json: says rank 8 for \S+q_proj, but \S+lora_A.weight in .*adapter_model.safetensors has shape'),
    ({'rank_pattern': {'v_proj': 2}}, 4, 'says rank 2 for'),
    ({'lora_alpha': float('nan')}, 4, 'lora_alpha nan, expected a positive whole number and a number'),
    ({'lora_alpha': 10**400}, 4, 'lora_alpha 1000.*, expected a positive whole number and a number of at most 1e\\+06'),
    ({'lora_alpha': 1e300}, 4, 'lora_alpha 1e\\+300, expected'),
    ({'r': True}, 4, 'r is True and'),
    ({'alpha_pattern': {'v_proj': -(10**400)}}, 4, 'lora_alpha -1000'),
    ({'alpha_pattern': {'q_proj': 'much'}}, 4, "lora_alpha 'much', expected"),
    ({'rank_pattern': {'q_proj': 4.5}}, 4, 'r is 4.5'),
    ({'rank_pattern': ['q_proj']}, 4, 'expected numbers by module name'),
    ({'alpha_pattern': {'(': 3}}, 4, r"'\(' is not a regular expression"),
    ({'alpha_pattern': {'model.layers.2.self_attn.q_proj': 3}, 'bias': 'some'}, 4, "bias is 'some', expected one of none, all"),
    ({'layers_to_transform': [0]}, 4, r'leave out \S+layers.1.self_attn.q_proj, but .*adapter_model.safetensors adapts it'),
    ({'layers_to_transform': [0], 'target_modules': '.*q_proj'}, 4, 'PEFT takes only one'),
    ({'target_modules': ['q_proj']}, 4, r'leave out \S+v_proj, but'),
    ({'exclude_modules': ['v_proj']}, 4, r'leave out \S+v_proj, but'),
    ({'target_modules': {'q_proj': 1}}, 4, "target_modules is {'q_proj': 1}, expected names of modules"),
    ({}, 3, r'name model.layers.3.self_attn.q_proj, for which .*adapter_model.safetensors has no pair \(2 such weights\)'),
    ({'target_modules': 'all-linear'}, 4, r'name model.layers.\d.mlp.\w+, for which'),
    (
      {'modules_to_save': ['multi_modal_projector']},
      4,
      r'modules_to_save is .*safetensors holds no tensor of multi_modal_projector',
    ),
    (
      {'use_dora': True},
      4,
      r'use_dora is True, but .*safetensors has no lora_magnitude_vector for model.layers.0',
    ),
    ({'use_dora': 'yes'}, 4, "use_dora is 'yes', expected one of"),
    ({'target_modules': ['q_proj', 'v_proj', 'embed_tokens']}, 4, 'name model.embed_tokens, for which .* has no pair'),
    ({'lora_bias': True}, 4, 'this one sets lora_bias'),
    ({'trainable_token_indices': [3]}, 4, 'this one sets trainable_token_indices'),
    ({'peft_type': 'IA3'}, 4, 'this one sets peft_type'),
    ({'init_lora_weights': 'corda'}, 4, "init_lora_weights is 'corda', so the adapter belongs to a base"),
  ],
)
def test_settings_that_contradict_the_matrices(hf, tmp_path, settings, layers, message):
  with pytest.raises(ConversionError, match=message):
    merged(hf, tmp_path, pairs(layers=range(layers)), **settings)


@pytest.mark.parametrize('field', ['target_modules', 'exclude_modules', 'alpha_pattern', 'rank_pattern', 'layers_pattern'])
def test_patterns_that_backtrack_for_ages_are_refused(hf, tmp_path, field, monkeypatch):
  monkeypatch.setattr('dynllava_jax.convert.adapter.MATCHING_SECONDS', 0.3)
  slow = r'([a-z_.0-9]+)+!'
  settings = {'target_modules': slow, 'exclude_modules': slow}.get(field, {slow: 4} if field != 'layers_pattern' else [slow])
  extra = {'layers_to_transform': [0]} if field == 'layers_pattern' else {}
  with pytest.raises(ConversionError, match=r'adapter_config.json: one of its patterns .* takes too long to match; list'):
    merged(hf, tmp_path, pairs(), **{field: settings}, **extra)


@pytest.mark.parametrize('half', ['A', 'B'])
@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_matrices_that_hold_no_numbers_are_named_themselves(hf, tmp_path, half, value):
  matrices = pairs()
  key = next(k for k in matrices if f'lora_{half}' in k)
  matrices[key][0, 1] = value
  tensors = merged(hf, tmp_path, matrices)[1]
  with pytest.raises(ConversionError, match=rf'adapter_model.safetensors: \S+lora_{half}.weight holds numbers that are not finite'):
    for tensor in tensors.values():
      tensor.load()


def test_settings_in_another_encoding(hf, tmp_path):
  adapter(tmp_path, pairs())
  (tmp_path / 'adapter_config.json').write_text(json.dumps(SETTINGS), encoding='utf-16')
  with pytest.raises(ConversionError, match=r'adapter_config.json: not valid JSON \(not UTF-8 text, .*\); save it as UTF-8'):
    open_source(Request(src=tmp_path, base=hf))


@pytest.mark.parametrize(
  'change, message',
  [
    ({'text_config': None}, 'config.json: text_config is null, expected an object'),
    ({'text_config': TEXT | {'num_key_value_heads': 0}}, 'config.json: .*num_kv_heads is 0, expected a positive number'),
    ({'text_config': TEXT | {'num_key_value_heads': False}}, 'config.json: .*num_kv_heads: expected int, got False'),
    ({'text_config': TEXT | {'rope_scaling': []}}, r'config.json: rope_scaling is \[\], expected an object'),
    ({'text_config': TEXT | {'rms_norm_eps': 10**400}}, 'config.json: .*rms_norm_eps: expected a finite number, got one of 401'),
  ],
)
def test_numbers_and_groups_of_the_config_that_are_none(hf, tmp_path, change, message):
  for file in hf.iterdir():
    (tmp_path / file.name).symlink_to(file)
  (tmp_path / 'config.json').unlink()
  (tmp_path / 'config.json').write_text(json.dumps(json.loads((hf / 'config.json').read_text()) | change))
  with pytest.raises(ConversionError, match=message):
    open_source(Request(src=tmp_path))


@pytest.mark.parametrize('value', [[], [0.5, 0.5], 'clip', [0.1, 0.2, None], [True, 0.1, 0.2]])
def test_an_image_mean_that_is_none_is_told_of_the_file_it_stands_in(hf, tmp_path, value):
  for file in hf.iterdir():
    (tmp_path / file.name).symlink_to(file)
  (tmp_path / 'preprocessor_config.json').write_text(json.dumps({'image_mean': value}))
  with pytest.raises(ConversionError, match='preprocessor_config.json: image_mean is .*expected three numbers'):
    open_source(Request(src=tmp_path))


def test_pattern_that_fits_only_the_old_name(hf, tmp_path):
  with pytest.raises(ConversionError, match=r'alpha_pattern fits language_model\S+layers.2.self_attn.q_proj, but not model.lang'):
    merged(hf, tmp_path, pairs(1), alpha_pattern={'language_model.model.layers.2.self_attn.q_proj': 3})


def test_projector_trained_whole(hf, tmp_path):
  trained = {
    f'{PROJECTOR}.linear_{i}.{n}': AUTHORS[f'model.mm_projector.{2 * i - 2}.{n}'] + 1 for i in (1, 2) for n in ('weight', 'bias')
  }
  found, tensors = merged(hf, tmp_path, pairs() | trained, modules_to_save=['multi_modal_projector'])
  for key in ('model.mm_projector.0.weight', 'model.mm_projector.2.bias'):
    np.testing.assert_array_equal(tensors[key].load(), AUTHORS[key] + 1)
  assert any(n.startswith('took 4 tensors whole from') for n in found.notes)
  del trained[f'{PROJECTOR}.linear_2.bias']
  with pytest.raises(ConversionError, match='holds no tensor of model.mm_projector.2.bias'):
    merged(hf, tmp_path, pairs() | trained, modules_to_save=['multi_modal_projector'])


def test_projector_trained_whole_on_the_authors_layout(tmp_path):
  """The base is a LLaVA whose tower is elsewhere."""
  base, lora = tmp_path / 'base', tmp_path / 'lora'
  for folder in (base, lora):
    folder.mkdir()
    config = CONFIG | {'sparse_config': None, 'model_type': 'llava_llama', 'mm_vision_tower': str(CASE / 'clip')}
    (folder / 'config.json').write_text(json.dumps(config))
  save_file(AUTHORS, base / 'model.safetensors')
  matrices = {k.replace('model.language_model', 'model'): v for k, v in pairs().items()}
  trained = {f'base_model.model.{k}': v + 1 for k, v in AUTHORS.items() if 'mm_projector' in k}
  tensors = dict(open_source(Request(src=adapter(lora, matrices | trained, modules_to_save=['mm_projector']), base=base)).tensors)
  np.testing.assert_array_equal(tensors['model.mm_projector.0.bias'].load(), AUTHORS['model.mm_projector.0.bias'] + 1)
  (lora / 'config.json').write_text(json.dumps(config | {'rms_norm_eps': 0.5}))
  with pytest.raises(ConversionError, match=r'lora/config.json: rms_norm_eps is 0.5, but 1e-0\d in .*base/config.json'):
    open_source(Request(src=lora, base=base))


def test_biases_trained_beside_the_pairs(hf, tmp_path):
  """PEFT calls what lies below an adapted module `base_layer`, and passes over what is not called so."""
  module = 'base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj'
  bias = WHOLE['vision_model.encoder.layers.0.self_attn.q_proj.bias'] + 1
  tensors = merged(hf, tmp_path, pairs() | {f'{module}.base_layer.bias': bias}, bias='all')[1]
  np.testing.assert_array_equal(tensors['vision_model.encoder.layers.0.self_attn.q_proj.bias'].load(), bias)
  with pytest.raises(ConversionError, match='targets its module, so PEFT would pass it over'):
    merged(hf, tmp_path, pairs() | {f'{module}.bias': bias}, bias='all')


@pytest.mark.parametrize('shape', [(0,), (0, 80), (4, 0)])
def test_matrices_that_zero_3_did_not_gather(hf, tmp_path, shape):
  matrices = pairs()
  matrices[next(iter(matrices))] = np.zeros(shape, np.float32)
  with pytest.raises(ConversionError, match=r'adapter_model.safetensors: \S+lora_A.weight is empty \(shape .*ZeRO-3'):
    merged(hf, tmp_path, matrices)


@pytest.mark.parametrize('value', [np.ones((), np.float32), np.ones((4, 80, 1), np.float32), np.ones((3, 80), np.float32)])
def test_matrices_of_odd_shape(hf, tmp_path, value):
  matrices = pairs()
  matrices[next(iter(matrices))] = value
  with pytest.raises(ConversionError, match='does not fit|says rank 4'):
    merged(hf, tmp_path, matrices)


def test_names_of_another_layout(hf, tmp_path):
  matrices = {k.replace('model.language_model', 'model'): v for k, v in pairs().items()}
  with pytest.raises(ConversionError, match='named as in another layout; the base calls it model.language_model.layers.0'):
    merged(hf, tmp_path, matrices)


def test_tied_embedding_that_an_adapter_changes(hf, tmp_path):
  base = tmp_path / 'tied'
  base.mkdir()
  (base / 'config.json').write_text(
    (hf / 'config.json').read_text().replace('"model_type": "llava"', '"tie_word_embeddings": true, "model_type": "llava"')
  )
  save_file({to_llava_hf(k): v for k, v in WHOLE.items() if k != 'lm_head.weight'}, base / 'model.safetensors')
  head = {'base_model.model.lm_head.weight': AUTHORS['lm_head.weight']}
  with pytest.raises(ConversionError, match='changes lm_head.weight, but .* embedding and head are one'):
    open_source(Request(src=adapter(tmp_path, pairs() | head, modules_to_save=['lm_head']), base=base))


def test_fields_that_peft_does_not_have(hf, tmp_path):
  found, _ = merged(hf, tmp_path, pairs(), from_elsewhere=True)
  assert any('from_elsewhere passed over, as PEFT does' in n for n in found.notes)
