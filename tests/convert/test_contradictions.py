"""Two files that say different things, numbers that cannot be, files that are none: each is one line that names them."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dynllava_jax.convert.beside import check_tokenizer
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.inputs import read_json
from dynllava_jax.convert.layouts import to_llava_hf
from dynllava_jax.convert.numbers import look
from dynllava_jax.convert.plan import assign
from dynllava_jax.convert.readers import DIGESTS, ConversionError, directory_tensors, file_tensors
from dynllava_jax.convert.records.base import load_case
from dynllava_jax.convert.shards import ShardWriter
from dynllava_jax.convert.source import Request, open_source

CASE = GOLDEN / 'public_b'
WEIGHTS = {k: v for k, v in load_file(CASE / 'checkpoint' / 'model.safetensors').items() if 'predictor' not in k}
WEIGHTS |= load_file(CASE / 'clip' / 'model.safetensors')
AUTHORS = json.loads((CASE / 'checkpoint' / 'config.json').read_text())
TEXT = {k: v for k, v in AUTHORS.items() if not k.startswith('mm_') and k != 'sparse_config'} | {'model_type': 'llama'}
VISION = json.loads((CASE / 'clip' / 'config.json').read_text())['vision_config']
CONFIG = {'model_type': 'llava', 'text_config': TEXT, 'vision_config': VISION, 'vision_feature_layer': -2}


class Nothing(dict):
  """Stands for the message of a hash object."""

  def update(self, data, /):
    pass


def source(tmp_path, config=None, weights=None, **files):
  """The case as `LlavaForConditionalGeneration`, changed; `files` are JSON beside it."""
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG | (config or {})))
  save_file({to_llava_hf(k): v for k, v in (WEIGHTS | (weights or {})).items() if v is not None}, tmp_path / 'model.safetensors')
  for name, content in files.items():
    (tmp_path / f'{name}.json').write_text(json.dumps(content))
  return tmp_path


def planned(*args, **kw):
  found = open_source(Request(src=source(*args, **kw)))
  return found, assign(found.info, found.tensors, None)


@pytest.mark.parametrize(
  'files, message',
  [
    (
      {'preprocessor_config': {'crop_size': 224}},
      r'crop_size is 224, but image_size is 112 in .*config.json',
    ),
    ({'preprocessor_config': {'size': {'shortest_edge': 336}}}, "size is {'shortest_edge': 336}, but image_size is 112"),
    (
      {'processor_config': {'image_processor': {'crop_size': {'height': 112, 'width': 224}}}},
      'processor_config.json: crop_size is',
    ),
    ({'preprocessor_config': {'do_normalize': False}}, 'do_normalize is False'),
    ({'preprocessor_config': {'resample': 2}}, 'resample is 2'),
    ({'preprocessor_config': {'rescale_factor': 1.0}}, 'rescale_factor is 1.0'),
    ({'preprocessor_config': {'image_std': [0, 1, 1]}}, 'deviations positive ones'),
    (
      {'preprocessor_config': {'image_processor_type': 'SiglipImageProcessor'}},
      'Siglip.*config.json describes a CLIP tower',
    ),
    ({'processor_config': {'patch_size': 16}}, r'processor_config.json: patch_size is 16, but 14 in .*config.json'),
    (
      {'preprocessor_config': {'image_mean': [0.5] * 3}, 'processor_config': {'image_processor': {'image_mean': [0.4] * 3}}},
      r'preprocessor_config.json: image_mean is \[0.5.*but \[0.4.*processor_config.json',
    ),
    (
      {'added_tokens': {'<pad>': 512}},
      'added_tokens.json: holds token id 512, but .*config.json has only 512 rows',
    ),
    ({'tokenizer_config': {'added_tokens_decoder': {'600': {'content': '<x>'}}}}, 'tokenizer_config.json: holds token id 600'),
    ({'tokenizer': {'model': {'vocab': {'a': 3}}, 'added_tokens': [{'id': 999}]}}, 'tokenizer.json: holds token id 999'),
    ({'tokenizer': {'model': 3}}, 'tokenizer.json: unreadable'),
    ({'added_tokens': {'<pad>': 'last'}}, 'added_tokens.json: unreadable'),
  ],
)
def test_files_beside_the_weights_that_contradict_the_config(tmp_path, files, message):
  with pytest.raises(ConversionError, match=message):
    planned(tmp_path, **files)


def test_files_beside_the_weights_that_agree(tmp_path):
  images = {'crop_size': {'height': 112, 'width': 112}, 'size': {'shortest_edge': 112}, 'resample': 3, 'rescale_factor': 1 / 255}
  both = {'image_processor': images, 'patch_size': 14}
  planned(tmp_path, preprocessor_config=images, processor_config=both, added_tokens={'<pad>': 511}, tokenizer={'model': {}})


def test_tokenizer_model_larger_than_the_embedding(tmp_path):
  from dynllava_jax.config import DataConfig
  from dynllava_jax.data.sources import new_tokenizer

  files = new_tokenizer(DataConfig(text_length=104), 512)
  check_tokenizer(files, tmp_path, tmp_path / 'config.json', 512)
  with pytest.raises(ConversionError, match=r'tokenizer.model: holds token id \d+, but the embedding .* only 100 rows'):
    check_tokenizer(files, tmp_path, tmp_path / 'config.json', 100)


@pytest.mark.parametrize(
  'config, weights, message',
  [
    ({}, {'lm_head.weight': None}, r'model.safetensors: holds no lm_head.weight, but .*config.json does not say that the head is'),
    ({'tie_word_embeddings': True}, {}, 'lm_head.weight differs from the embedding, but .*config.json says that the two are one'),
    (
      {'text_config': TEXT | {'rope_theta': 5.0, 'rope_parameters': {'rope_theta': 6.0}}},
      {},
      'rope_theta is 5.0, but rope_par',
    ),
    (
      {'text_config': TEXT | {'rope_scaling': {'type': 'linear', 'rope_type': 'llama3', 'factor': 2.0}}},
      {},
      "type is 'linear'",
    ),
    ({'text_config': TEXT | {'partial_rotary_factor': 0.5}}, {}, 'not supported: partial_rotary_factor 0.5'),
    ({'quantization_config': {'quant_method': 'bitsandbytes'}}, {}, 'not supported: a quantization_config'),
    ({'vision_feature_layer': [-2, -5]}, {}, r'vision_feature_layer is \[-2, -5\], expected one whole number'),
    ({'vision_feature_layer': []}, {}, r'vision_feature_layer is \[\], expected one whole number'),
    ({'vision_config': None}, {}, r'shape \(80, 32\), the config asks for \(80, 1024\)'),  # transformers' own default
    ({}, {'model.norm.weight': np.zeros(0, np.float32)}, r'model.norm.weight is empty \(shape \(0,\)\), as DeepSpeed ZeRO-3'),
    (
      {'text_config': TEXT | {'vocab_size': 10**12}},
      {},
      r'more than 512 rows .* asks for 1,000,000,000,000 \(vocab',
    ),
    (
      {'text_config': TEXT | {'num_hidden_layers': 100_000}},
      {},
      'tensors in all, but the config asks for 100,000 layers of',
    ),
    ({'vision_config': VISION | {'image_size': 14 * 10**9}}, {}, r'asks for 1,000,000,000,000,000,000 \(patches\)'),
    ({'vision_config': VISION | {'num_hidden_layers': 10**9}}, {}, r'asks for 1,000,000,000 layers of the tower'),
  ],
)
def test_configs_that_contradict_the_tensors(tmp_path, config, weights, message):
  with pytest.raises(ConversionError, match=message):
    planned(tmp_path, config, weights)


def test_spellings_that_transformers_takes(tmp_path):
  assert planned(tmp_path, {'vision_feature_layer': [-2]})[0].info.model.vision.select_layer == -2
  tied = {'tie_word_embeddings': True}
  found, _ = planned(tmp_path, tied, {'model.embed_tokens.weight': None})  # the two are tied either way round
  np.testing.assert_array_equal(dict(found.tensors)['model.embed_tokens.weight'].load(), WEIGHTS['lm_head.weight'])


def test_projector_of_absurd_depth(tmp_path):
  config = AUTHORS | {'sparse_config': None, 'model_type': 'llava_llama', 'mm_projector_type': 'mlp1000000000x_gelu'}
  source(tmp_path, config)
  save_file(WEIGHTS, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(config))
  for projector in (None, 'new'):
    with pytest.raises(ConversionError, match='asks for 1,000,000,000 layers of the projector'):
      found = open_source(Request(src=tmp_path, vision=CASE / 'clip', projector=projector))
      assign(found.info, found.tensors, None)


@pytest.mark.parametrize('older', ['model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json'])
def test_several_generations_of_weights(tmp_path, older):
  """The whole safetensors file is read, as by transformers."""
  source(tmp_path)
  (tmp_path / older).write_text('{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}')
  notes = []
  assert len(directory_tensors(tmp_path, notes)) == len(WEIGHTS)
  assert len(notes) == 1 and f'passed over {older} beside it' in notes[0]


@pytest.mark.parametrize('dtype', [np.float16, np.float32, ml_dtypes.bfloat16])
def test_numbers_that_no_model_holds(dtype):
  bad = [np.nan, np.inf, -np.inf] + ([1e30, -1e30] if dtype != np.float16 else [])
  for value in bad:
    numbers = np.linspace(-1, 1, 12, dtype=np.float32).astype(dtype).reshape(3, 4)
    assert not look(numbers, Nothing()).implausible and not look(numbers, Nothing()).zero
    numbers[2, 3] = value
    assert look(numbers, Nothing()).implausible
  assert look(-np.zeros((2, 2), dtype), Nothing()).zero
  assert not look(np.full(3, -6e4, np.float32).astype(dtype), Nothing()).implausible


@pytest.mark.parametrize('value, message', [(np.nan, '2 are NaN'), (-np.inf, '2 are infinite'), (1e20, '2 are beyond 65,536')])
def test_weights_that_are_not_finite_or_not_plausible(tmp_path, value, message):
  (tmp_path / 'in').mkdir()
  key = 'model.layers.1.mlp.up_proj.weight'
  spoiled = WEIGHTS[key].copy()
  spoiled[3, 4:6] = value
  source(tmp_path / 'in', weights={key: spoiled})
  message = rf'model.safetensors: language_model.{key} is damaged or of a run that diverged: of 8,960 numbers {message}'
  with pytest.raises(ConversionError, match=message):
    convert(Request(src=tmp_path / 'in'), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_weights_that_are_all_zero_are_named(tmp_path):
  (tmp_path / 'in').mkdir()
  key = 'model.layers.1.mlp.up_proj.weight'
  source(tmp_path / 'in', weights={key: np.zeros_like(WEIGHTS[key])})
  found, _ = convert(Request(src=tmp_path / 'in'), tmp_path / 'out', readback=False)
  assert f'every number is zero in 1 tensors, such as language_model.{key}; is the source whole?' in found.notes


@pytest.fixture
def exported(tmp_path):
  """Two shards with digests."""
  values = {f'w{i}': np.arange(6, dtype=np.float32).reshape(2, 3) + i for i in range(4)}
  writer = ShardWriter(tmp_path, [(k, v.shape, v.dtype) for k, v in values.items()], max_bytes=48)
  for key, value in values.items():
    writer.write(key, value)
    assert writer.holds(key)
  writer.finish()
  return tmp_path, values


def test_exports_carry_digests_that_reading_compares(exported):
  directory, values = exported
  shards = sorted(directory.glob('*.safetensors'))
  with safe_open(shards[0], 'numpy') as f:  # the library takes them
    assert f.metadata().keys() == {'format', DIGESTS} and json.loads(f.metadata()[DIGESTS]).keys() == {'w0', 'w1'}
    np.testing.assert_array_equal(f.get_tensor('w1'), values['w1'])
  tensors = {t.key: t for t in directory_tensors(directory)}
  np.testing.assert_array_equal(tensors['w2'].load(), values['w2'])
  content = bytearray(shards[1].read_bytes())
  content[-1] ^= 1
  shards[1].write_bytes(content)
  np.testing.assert_array_equal(tensors['w2'].load(), values['w2'])
  with pytest.raises(ConversionError, match='00002-of-00002.safetensors: w3 is damaged, its digest is not the one it was exported'):
    tensors['w3'].load()


def test_digests_of_other_tensors(exported):
  shard = min(exported[0].glob('*.safetensors'))
  content = shard.read_bytes()
  shard.write_bytes(content.replace(rb'\"w0\"', rb'\"v0\"'))
  with pytest.raises(ConversionError, match='damaged, the digests in its header are not those of its tensors'):
    file_tensors(shard)


def test_damaged_model_is_not_exported(tmp_path):
  writer = ShardWriter(tmp_path, [('w', (2,), np.dtype(np.float32))])
  with pytest.raises(ConversionError, match='w: damaged, or the training run diverged: of 2 numbers 1 is NaN'):
    writer.write('w', np.array([1, np.nan], np.float32))


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'tokenizer.model', 'preprocessor_config.json'])
def test_pipes_and_devices_are_not_read(tmp_path, name):
  source(tmp_path)
  (tmp_path / name).unlink(missing_ok=True)
  os.mkfifo(tmp_path / name)
  with pytest.raises(ConversionError, match=f'{name}: is a pipe, expected a plain file'):
    planned_as_it_is(tmp_path)
  (tmp_path / name).unlink()
  (tmp_path / name).symlink_to('/dev/zero')
  with pytest.raises(ConversionError, match=f'{name}: is a device, expected a plain file'):
    planned_as_it_is(tmp_path)


def planned_as_it_is(directory):
  return open_source(Request(src=directory))


def test_case_that_is_a_pipe(tmp_path):
  os.mkfifo(tmp_path / 'case.npz')
  with pytest.raises(ConversionError, match='case.npz: is a pipe'):
    load_case(tmp_path / 'case.npz')


@pytest.mark.parametrize(
  'content, message',
  [
    ('[' * 10**6, 'not usable JSON .nested too deeply'),
    ('{"a":' * 10**5 + '1' + '}' * 10**5, 'not usable JSON .nested too deeply'),
    ('{"a": ' + '9' * 5000 + '}', 'not valid JSON .*4300 digits'),
    (b'\xff\xfe{\x00', 'not valid JSON'),
    ('[1]', 'holds a list, expected an object'),
  ],
)
def test_json_that_cannot_be_used(tmp_path, content, message):
  (tmp_path / 'config.json').write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ConversionError, match=f'config.json: {message}'):
    read_json(tmp_path / 'config.json')


def test_json_of_absurd_length_and_with_a_byte_order_mark(tmp_path):
  file = tmp_path / 'config.json'
  file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
  assert read_json(file) == {'a': 1}
  os.truncate(file, 2**40)  # a hole
  with pytest.raises(ConversionError, match='1,099,511,627,776 bytes long, expected at most 268,435,456'):
    read_json(file)


def test_header_that_is_nested_too_deeply(tmp_path):
  header = b'{"a":' * 10**5 + b'1' + b'}' * 10**5
  (tmp_path / 'model.safetensors').write_bytes(struct.pack('<Q', len(header)) + header)
  with pytest.raises(ConversionError, match='model.safetensors: unreadable, truncated or not safetensors'):
    file_tensors(tmp_path / 'model.safetensors')
