"""Each kind of bad input is one readable error that names file and key, and nothing is written."""

import dataclasses
import json
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

from dynllava_jax import checkpoint
from dynllava_jax.checkpoint import CheckpointError
from dynllava_jax.config import ConfigError
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.plan import assign
from dynllava_jax.convert.readers import ConversionError, file_tensors
from dynllava_jax.convert.records.base import load_case
from dynllava_jax.convert.source import Request, open_source
from dynllava_jax.data.saved_batch import load_batch
from dynllava_jax.methods import frequency


@pytest.fixture
def source(tmp_path):
  """A copy of the safetensors case that a test may damage."""
  shutil.copytree(GOLDEN / 'public_b', tmp_path / 'case')
  return tmp_path / 'case' / 'checkpoint'


def plan(source, **kw):
  """What a conversion decides before it writes anything."""
  found = open_source(Request(src=source, **kw))
  return found, assign(found.info, found.tensors, None)


def damage(source, change):
  weights = load_file(source / 'model.safetensors')
  change(weights)
  save_file(weights, source / 'model.safetensors')


def reconfigure(source, **changes):
  config = json.loads((source / 'config.json').read_text())
  for key, value in changes.items():
    if key in config['sparse_config']:
      config['sparse_config'][key] = value
    else:
      config[key] = value
  (source / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda w: w.pop('model.norm.weight'), '- llama/norm/scale: missing'),
    (lambda w: w.pop('model.layers.3.mlp.up_proj.weight'), r'- llama/layers/up\[3\]: missing'),
    (lambda w: w.update({'model.extra.weight': np.zeros(3, np.float32)}), r'\+ model.extra.weight \(3,\): unknown'),
    (
      lambda w: w.update({'model.norm.weight': np.zeros(81, np.float32)}),
      r'! model.norm.weight: shape \(81,\), the config asks for \(80,\)',
    ),
    (lambda w: w.update({'model.layers.4.mlp.up_proj.weight': np.zeros((112, 80), np.float32)}), 'beyond the 4 layers'),
  ],
)
def test_tensors_that_do_not_fit(source, tmp_path, change, message):
  damage(source, change)
  with pytest.raises(ConversionError, match=message):
    convert(Request(src=source), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_layers_of_different_dtypes_are_refused(source):
  damage(
    source, lambda w: w.update({'model.layers.0.mlp.up_proj.weight': w['model.layers.0.mlp.up_proj.weight'].astype(np.float16)})
  )
  with pytest.raises(ConversionError, match='! model.layers.1.mlp.up_proj.weight: stored as float32, other layers as float16'):
    plan(source)


def test_integers_are_no_weights(source):
  damage(source, lambda w: w.update({'model.norm.weight': np.ones(80, np.int8)}))
  with pytest.raises(ConversionError, match='! model.norm.weight: stored as int8; only floating point'):
    plan(source)


def test_float64_cannot_be_kept(source):
  damage(source, lambda w: w.update({'model.norm.weight': np.ones(80, np.float64)}))
  with pytest.raises(
    ConversionError, match='! model.norm.weight: stored as float64, which is not supported; choose --dtype=float32'
  ):
    plan(source)
  found = open_source(Request(src=source))
  assert assign(found.info, found.tensors, np.dtype(np.float32))


def test_head_that_is_stored_though_it_is_tied(source):
  reconfigure(source, tie_word_embeddings=True)
  with pytest.raises(
    ConversionError, match='lm_head.weight differs from the embedding, but .*config.json says that the two are one'
  ):
    plan(source)
  damage(source, lambda w: w.update({'lm_head.weight': w['model.embed_tokens.weight']}))
  found, _ = plan(source)
  assert any(n.startswith('passed over lm_head.weight') for n in found.notes)


def test_rows_of_the_vocabulary_that_an_export_added(source):
  reconfigure(source, unpadded_vocab_size=500)
  found, parts = plan(source)
  assert found.info.model.llama.vocab_size == 500
  assert next(a for a in parts if a.path == ('llama', 'embedding')).load().shape == (500, 80)
  reconfigure(source, vocab_size=511)
  with pytest.raises(ConversionError, match=r'lm_head.weight has shape \(512, 80\), but vocab_size in .* is 511'):
    plan(source)


def test_rotary_buffers_of_old_checkpoints_are_passed_over(source):
  damage(source, lambda w: w.update({'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(8, np.float32)}))
  found, _ = plan(source)
  assert any(note.startswith('passed over 1 tensors that are computed') for note in found.notes)


def test_truncated_case_file(tmp_path):
  content = (GOLDEN / 'public_b' / 'case.npz').read_bytes()
  (tmp_path / 'case.npz').write_bytes(content[: len(content) // 2])
  with pytest.raises(ConversionError, match='not a readable case file'):
    load_case(tmp_path / 'case.npz')


HEADERS = ("{'descr': '<i8', 'fortran_order': False, 'shape': (5", """'''""", "{'descr': ('a',), 'shape': (5,)}", '[')


@pytest.mark.parametrize('header', HEADERS)
def test_damaged_headers_of_arrays(header, tmp_path):
  """numpy lets through what tokenize and others say of them."""
  array = b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header.encode() + bytes(40)
  with zipfile.ZipFile(tmp_path / 'case.npz', 'w') as file:
    file.writestr('a.npy', array)
  with pytest.raises(ConversionError, match='not a readable case file'):
    load_case(tmp_path / 'case.npz')
  with pytest.raises(ConfigError, match='cannot be read as a batch'):
    load_batch(tmp_path / 'case.npz')
  (tmp_path / 'counts.npy').write_bytes(array)
  with pytest.raises(ConfigError, match='counts.npy.*data preparation writes one'):
    frequency.read(str(tmp_path / 'counts.npy'))


@pytest.fixture
def shards(source):
  """The same checkpoint with its one file named as a shard."""
  (source / 'model.safetensors').rename(source / 'model-00001-of-00001.safetensors')
  return source


def test_duplicate_key_across_shards(shards):
  weights = load_file(shards / 'model-00001-of-00001.safetensors')
  save_file({'model.norm.weight': weights['model.norm.weight']}, shards / 'extra.safetensors')
  index = {'weight_map': dict.fromkeys(weights, 'model-00001-of-00001.safetensors') | {'model.norm.weight': 'extra.safetensors'}}
  (shards / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(
    ConversionError,
    match=r'! model.norm.weight: fills llama/norm/scale a second time \(.*model-00001\S+safetensors, after .*extra.safetensors',
  ):
    plan(shards)


@pytest.mark.parametrize(
  'placed, message',
  [
    ({'model.norm.weight': 'model-00009-of-00009.safetensors'}, 'names model-00009-of-00009.safetensors, which is not in'),
    (
      {'model.norm.weight': 'model-00001-of-00001.safetensors', 'model.other.weight': 'model-00001-of-00001.safetensors'},
      'places model.other.weight in model-00001-of-00001.safetensors, which does not hold it',
    ),
    ({'model.norm.weight': 3}, 'index.json: has no weight_map from keys to file names'),
    ({'model.norm.weight': '../clip/model.safetensors'}, "names '../clip/model.safetensors'; expected names of files beside it"),
  ],
)
def test_index_that_does_not_fit_the_shards(shards, placed, message):
  (shards / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': placed}))
  with pytest.raises(ConversionError, match=message):
    plan(shards)


def test_pointer_that_git_lfs_left(source):
  (source / 'model.safetensors').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13476849064\n')
  with pytest.raises(ConversionError, match='model.safetensors: a Git LFS pointer, not the file itself; fetch it with'):
    plan(source)


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda torch: torch.zeros(4).to(torch.float8_e4m3fn), 'x.bin: a is stored as float8_e4m3fn; quantised'),
    (lambda torch: torch.eye(4).to_sparse(), 'x.bin: a is a sparse tensor; only dense ones are supported'),
  ],
)
def test_bin_of_tensors_that_are_no_plain_numbers(tmp_path, make, message):
  torch = pytest.importorskip('torch', reason='writing a .bin file needs torch')
  torch.save({'a': make(torch)}, tmp_path / 'x.bin')
  with pytest.raises(ConversionError, match=message):
    file_tensors(tmp_path / 'x.bin')


def test_bin_from_before_torch_1_6(tmp_path):
  torch = pytest.importorskip('torch', reason='writing a .bin file needs torch')
  torch.save({'a': torch.arange(3.0)}, tmp_path / 'x.bin', _use_new_zipfile_serialization=False)
  (tensor,) = file_tensors(tmp_path / 'x.bin')
  assert tensor.load().tolist() == [0, 1, 2]


def test_empty_file(source):
  (source / 'model.safetensors').write_bytes(b'')
  with pytest.raises(ConversionError, match='model.safetensors: empty; fetch or copy it again'):
    plan(source)


def test_truncated_bin(tmp_path):
  torch = pytest.importorskip('torch', reason='writing a .bin file needs torch')
  torch.save({'a': torch.zeros(1000)}, tmp_path / 'x.bin')
  (tmp_path / 'x.bin').write_bytes((tmp_path / 'x.bin').read_bytes()[:2000])
  with pytest.raises(ConversionError, match='x.bin: unreadable, truncated or not a plain tensor file'):
    file_tensors(tmp_path / 'x.bin')


@pytest.mark.parametrize('protocol', [2, 4])
def test_a_pickle_of_other_things_where_torch_is_read(protocol, tmp_path, recwarn):
  pytest.importorskip('torch', reason='reading a .bin file needs torch')
  (tmp_path / 'mm_projector.bin').write_bytes(pickle.dumps({'a': [1], 'b': Request}, protocol))
  with pytest.raises(ConversionError, match='mm_projector.bin: unreadable, truncated or not a plain') as caught:
    file_tensors(tmp_path / 'mm_projector.bin')
  assert 'weights_only' not in str(caught.value) and not recwarn.list


@pytest.mark.parametrize(
  'content, hint',
  [
    (b'hello\nworld\n', 'is it the right file?'),
    (b'{"a": [1, 2]}', 'is it the right file?'),
    (b'\x89PNG\r\n\x1a\n' + bytes(40), 'is it the right file?'),
    (b'x' * 3, 'is it the right file?'),
    ((100).to_bytes(8, 'little') + b'{"a":{"dtype":"F32"}}', 'it may be safetensors, then name it so'),
  ],
)
def test_a_file_of_another_kind_where_torch_is_read(content, hint, tmp_path):
  (tmp_path / 'mm_projector.bin').write_bytes(content)
  with pytest.raises(ConversionError, match=r'mm_projector.bin: not written by torch.save, expected tensors') as caught:
    file_tensors(tmp_path / 'mm_projector.bin')
  assert str(caught.value).endswith(hint)


def test_truncated_shard(source):
  content = (source / 'model.safetensors').read_bytes()
  (source / 'model.safetensors').write_bytes(content[: len(content) // 2])
  with pytest.raises(ConversionError, match='model.safetensors: unreadable'):
    plan(source)


def test_no_weights_and_no_config(source):
  (source / 'model.safetensors').unlink()
  with pytest.raises(ConversionError, match='no weights found'):
    plan(source)
  (source / 'config.json').unlink()
  with pytest.raises(ConversionError, match='config.json: missing'):
    plan(source)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(mm_vision_tower=None), 'names no vision tower'),
    (dict(mm_vision_tower='../elsewhere'), 'the vision tower ../elsewhere is no CLIP directory here'),
    (dict(rope_scaling={'type': 'dynamic', 'factor': 2.0}), "not supported: rope_scaling of type 'dynamic'"),
    (dict(mm_projector_type='resampler'), "projector 'resampler' is unknown"),
    (dict(sparse_layer=4), 'starts at layer 4, but the decoder has 4 layers'),
    (dict(image_aspect_ratio='anyres'), 'not supported: any-resolution images'),
    (dict(image_aspect_ratio='wide'), "image_aspect_ratio is 'wide', expected pad or square"),
    (dict(hidden_size='80'), "config.json: model.llama.hidden_size: expected int, got '80'"),
    (dict(rms_norm_eps=0), 'rms_norm_eps is 0.0, expected a positive number'),
    (dict(rope_scaling={'type': 'linear'}), "rope_scaling of type 'linear' lacks factor"),
    (
      dict(rope_scaling={'rope_type': 'llama3', 'factor': 8.0}),
      "'llama3' lacks low_freq_factor, high_freq_factor, orig",
    ),
    (dict(rope_scaling=[2.0]), r'config.json: rope_scaling is \[2.0\], expected an object with named entries'),
    (dict(sparse_config='on'), "config.json: sparse_config is 'on', expected an object with named entries"),
    (dict(mm_vision_tower=['clip']), r"config.json: mm_vision_tower is \['clip'\], expected the name of a directory"),
    (dict(d_model=0), 'sparse_config: predictor: d_model is 0, expected a positive number'),
    (dict(vision_keep_rate='a fifth'), "sparse_config.image_keep_rate: expected float, got 'a fifth'"),
    (dict(unpadded_vocab_size=600), r'unpadded_vocab_size is 600, expected a whole number from 1 to vocab_size \(512\)'),
    (dict(mm_vision_select_layer='-2'), "checkpoint/config.json: mm_vision_select_layer is '-2', expected one whole number"),
    (dict(mm_vision_select_layer=None), 'checkpoint/config.json: mm_vision_select_layer is None, expected one whole number'),
    (dict(mm_vision_select_layer=-30), 'checkpoint/config.json: mm_vision_select_layer: vision: select_layer -30 points outside'),
  ],
)
def test_configs_that_cannot_be_honoured(source, tmp_path, changes, message):
  reconfigure(source, **changes)
  with pytest.raises((ConversionError, CheckpointError), match=message):
    convert(Request(src=source), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_pickle_that_holds_more_than_tensors_is_refused(tmp_path):
  torch = pytest.importorskip('torch', reason='writing a .bin file needs torch')
  torch.save({'a': torch.zeros(2), 'b': object}, tmp_path / 'x.bin')
  with pytest.raises(ConversionError, match='x.bin: unreadable, truncated or not a plain tensor file'):
    file_tensors(tmp_path / 'x.bin')
  torch.save({'a': torch.ones(2, dtype=torch.bfloat16)}, tmp_path / 'y.bin')
  (tensor,) = file_tensors(tmp_path / 'y.bin')
  value = tensor.read()
  assert tensor.key == 'a' and str(tensor.dtype) == str(value.dtype) == 'bfloat16' and value.astype(np.float32).tolist() == [1, 1]


def test_checkpoint_whose_arrays_do_not_match_its_description(source, tmp_path):
  convert(Request(src=source), tmp_path / 'out')
  file = tmp_path / 'out' / checkpoint.MODEL_FILE
  content = json.loads(file.read_text())
  content['model']['llama']['mlp_dim'] = 128
  del content['sha256']
  file.write_text(json.dumps(content))
  with pytest.raises(CheckpointError, match=r'! llama/layers/down: stored \(4, 112, 80\), expected \(4, 128, 80\)'):
    checkpoint.load_params(tmp_path / 'out')


def test_safetensors_header_of_lists(tmp_path):
  """The library takes it; what it means is not in the format."""
  header = json.dumps({'w': ['U8', [8], [0, 8]]}).encode()
  file = tmp_path / 'model.safetensors'
  file.write_bytes(struct.pack('<Q', len(header)) + header + bytes(8))
  with pytest.raises(ConversionError, match='model.safetensors: the header describes w by a list, expected named entries'):
    file_tensors(file)


@pytest.mark.parametrize('flag', ['src', 'base', 'vision', 'dst'])
def test_links_that_lead_in_a_circle(source, tmp_path, flag):
  (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
  request, dst = Request(src=source), tmp_path / 'out'
  with pytest.raises((ConversionError, OSError)):
    if flag == 'dst':
      convert(request, tmp_path / 'loop')
    else:
      convert(dataclasses.replace(request, **{flag: tmp_path / 'loop'}), dst)
