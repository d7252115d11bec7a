"""Models put together from parts: language model, tower, projector, LoRA adapter, fresh predictors."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_parts import CASE, CLIP, CONFIG, LLAMA, PROJECTOR, TEXT_CONFIG, WEIGHTS, planned, write

from dynllava_jax import checkpoint
from dynllava_jax.checkpoint import CheckpointError
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.export import export
from dynllava_jax.convert.inspection import describe
from dynllava_jax.convert.readers import ConversionError, directory_tensors
from dynllava_jax.convert.source import Request, open_source


@pytest.fixture
def vicuna(tmp_path):
  return write(tmp_path / 'vicuna', TEXT_CONFIG, LLAMA)


@pytest.fixture
def projector(tmp_path):
  torch = pytest.importorskip('torch', reason='writing a .bin file needs torch')
  path = tmp_path / 'mm_projector.bin'
  torch.save({k: torch.tensor(v) for k, v in PROJECTOR.items()}, path)
  return path


def test_language_model_tower_and_projector(vicuna, projector, tmp_path):
  convert(Request(src=vicuna, vision=CLIP, projector=str(projector)), tmp_path / 'out')
  info, params = checkpoint.read_info(tmp_path / 'out'), checkpoint.load_params(tmp_path / 'out')
  assert info.model.predictor is None and info.model.projector == 'mlp2x_gelu' and len(info.stages) == 1
  np.testing.assert_array_equal(params['projector']['linear_1']['kernel'], PROJECTOR['model.mm_projector.2.weight'].T)
  np.testing.assert_array_equal(params['llama']['head'], LLAMA['lm_head.weight'].T)


def test_new_projector_follows_from_the_seed(vicuna):
  at = 'projector/linear_0/kernel'
  first, again, other = (planned(src=vicuna, vision=CLIP, projector='new', seed=s)[1][at].load() for s in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert first.shape == (32, 80) and np.abs(first - other).max() > 0.01


def test_export_of_a_model_put_together_is_read_back(vicuna, tmp_path):
  """Its config is not Vicuna's: it says LLaVA."""
  convert(Request(src=vicuna, vision=CLIP, projector='new'), tmp_path / 'ours')
  export(tmp_path / 'ours', tmp_path / 'back', 'llava')
  assert json.loads((tmp_path / 'back' / 'config.json').read_text())['model_type'] == 'llava_llama'
  assert planned(src=tmp_path / 'back')[0].info == checkpoint.read_info(tmp_path / 'ours')


def test_text_only_model_is_refused(vicuna):
  with pytest.raises(ConversionError, match='a text-only LLaMA, not a LLaVA .*--vision=CLIP_DIRECTORY and --projector'):
    open_source(Request(src=vicuna))
  with pytest.raises(ConversionError, match='a CLIP tower alone; give it with --vision'):
    open_source(Request(src=CLIP))


def test_projector_file_that_holds_something_else(vicuna, tmp_path):
  torch = pytest.importorskip('torch', reason='writing a .bin file needs torch')
  torch.save({'model.norm.weight': torch.ones(3)}, tmp_path / 'p.bin')
  with pytest.raises(ConversionError, match='p.bin: holds model.norm.weight; expected only the tensors of a projector'):
    open_source(Request(src=vicuna, vision=CLIP, projector=str(tmp_path / 'p.bin')))
  twice = {f'{start}mm_projector.0.weight': torch.ones(3) for start in ('', 'model.')}
  torch.save(twice, tmp_path / 'p.bin')
  with pytest.raises(ConversionError, match='p.bin: model.mm_projector.0.weight is there a second time'):
    open_source(Request(src=vicuna, vision=CLIP, projector=str(tmp_path / 'p.bin')))


def test_predictors_added_to_a_dense_model(tmp_path):
  weights = {k: v for k, v in WEIGHTS.items() if 'predictor' not in k}
  config = CONFIG | {'sparse_config': None, 'model_type': 'llava_llama'}
  dense = write(tmp_path / 'dense', config, weights)
  found, plan = planned(src=dense, vision=CLIP, add_predictors=True)
  assert [s.selector for s in found.info.stages] == ['all', 'dynamic'] and found.info.model.predictor.d_model == 512
  assert plan['image_predictor/down/kernel'].load().shape == (80, 512)
  norm = plan['image_predictor/norm/scale'].load()
  assert (norm == 1).all() and plan['image_predictor/down/kernel'].load().std() > 0.01
  convert(Request(src=dense, vision=CLIP, add_predictors=True), tmp_path / 'ours')
  export(tmp_path / 'ours', tmp_path / 'back', 'dynamic-llava')
  assert json.loads((tmp_path / 'back' / 'config.json').read_text())['sparse_config']['d_model'] == 512
  with pytest.raises(ConversionError, match='--export=dynamic-llava: needs the predictors; leave out --drop_predictors'):
    export(tmp_path / 'ours', tmp_path / 'again', 'dynamic-llava', drop_predictors=True)
  with pytest.raises(ConversionError, match='the checkpoint holds its whole tower, nothing would be taken from there'):
    export(tmp_path / 'ours', tmp_path / 'again', 'dynamic-llava', vision=CLIP)
  with pytest.raises(ConversionError, match='has predictors already'):
    open_source(Request(src=CASE / 'checkpoint', add_predictors=True))


def test_instruction_predictor_is_kept_for_the_way_back(tmp_path):
  text = {k: v for k, v in WEIGHTS.items() if 'output_text_score_predictor' in k}
  extra = {k.replace('output_text_score_predictor', 'instruct_score_predictor'): v + 1 for k, v in text.items()}
  config = CONFIG | {'sparse_config': CONFIG['sparse_config'] | {'use_instruct_predictor': True}}
  source = write(tmp_path / 'source', config, WEIGHTS | extra)
  found, _ = convert(Request(src=source, vision=CLIP), tmp_path / 'ours')
  assert any('instruction predictor' in note for note in found.notes)
  params = checkpoint.load_params(tmp_path / 'ours')
  np.testing.assert_array_equal(params['instruct_predictor']['norm']['scale'], params['text_predictor']['norm']['scale'] + 1)
  export(tmp_path / 'ours', tmp_path / 'back', 'dynamic-llava')
  back = {t.key: t.read() for t in directory_tensors(tmp_path / 'back')}
  assert back.keys() == (WEIGHTS | extra).keys()
  assert 'instruction predictor' in describe(source) and 'unknown' not in describe(source)
  for key, value in extra.items():
    np.testing.assert_array_equal(back[key], value)
  assert json.loads((tmp_path / 'back' / 'config.json').read_text())['sparse_config'] == config['sparse_config']


@pytest.fixture
def lora(tmp_path):
  """A rank-2 adapter over the queries, and a projector trained whole."""
  torch = pytest.importorskip('torch', reason='writing a .bin file needs torch')
  rng = np.random.default_rng(0)
  pairs = {}
  for i in range(4):
    start = f'base_model.model.model.layers.{i}.self_attn.q_proj'
    pairs[f'{start}.lora_A.weight'] = rng.standard_normal((2, 80)).astype(np.float32)
    pairs[f'{start}.lora_B.weight'] = rng.standard_normal((80, 2)).astype(np.float32)
  config = {k: v for k, v in CONFIG.items() if k != 'sparse_config'} | {'model_type': 'llava_llama', 'mm_vision_tower': str(CLIP)}
  directory = write(tmp_path / 'lora', config, pairs, 'adapter_model.safetensors')
  (directory / 'adapter_config.json').write_text(json.dumps({'peft_type': 'LORA', 'r': 2, 'lora_alpha': 6, 'bias': 'none'}))
  trained = {f'base_model.model.{k}': torch.tensor(v + 1) for k, v in PROJECTOR.items()}
  torch.save(trained, directory / 'non_lora_trainables.bin')
  return directory, pairs


def test_lora_is_merged_into_its_base(lora, vicuna):
  directory, pairs = lora
  found, plan = planned(src=directory, base=vicuna)
  assert found.layout.startswith('LoRA adapter') and len(plan) == len(LLAMA) + len(PROJECTOR) + len(
    load_file(CLIP / 'model.safetensors')
  )
  start = 'base_model.model.model.layers.2.self_attn.q_proj'
  expected = LLAMA['model.layers.2.self_attn.q_proj.weight'] + 3 * pairs[f'{start}.lora_B.weight'] @ pairs[f'{start}.lora_A.weight']
  found = plan['llama/layers/q[2]'].load().transpose(0, 2, 1).reshape(80, 80)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(plan['projector/linear_0/bias'].load(), PROJECTOR['model.mm_projector.0.bias'] + 1)
  np.testing.assert_array_equal(plan['llama/norm/scale'].load(), LLAMA['model.norm.weight'])


def test_lora_mistakes(lora, vicuna, tmp_path):
  directory, pairs = lora
  with pytest.raises(ConversionError, match='give the directory of the model it belongs to with --base'):
    open_source(Request(src=directory))
  half = dict(pairs)
  del half['base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight']
  save_file(half, directory / 'adapter_model.safetensors')
  with pytest.raises(ConversionError, match='model.layers.1.self_attn.q_proj.weight has lora_A but not its other half'):
    open_source(Request(src=directory, base=vicuna))
  save_file({k.replace('q_proj', 'qkv'): v for k, v in pairs.items()}, directory / 'adapter_model.safetensors')
  with pytest.raises(ConversionError, match='adapts model.layers.0.self_attn.qkv.weight, which the base does not have'):
    open_source(Request(src=directory, base=vicuna))
  (directory / 'adapter_config.json').write_text(json.dumps({'r': 2, 'lora_alpha': 6, 'lora_bias': True}))
  with pytest.raises(ConversionError, match='only LoRA and DoRA adapters can be merged, this one sets lora_bias'):
    open_source(Request(src=directory, base=vicuna))
  (directory / 'adapter_config.json').write_text(json.dumps({'r': 0, 'lora_alpha': 6}))
  with pytest.raises(ConversionError, match='adapter_config.json: r is 0 and lora_alpha 6, expected a positive whole number'):
    open_source(Request(src=directory, base=vicuna))


@pytest.mark.parametrize(
  'setting, message',
  [
    ({'init_lora_weights': 'pissa_niter_16'}, "init_lora_weights is 'pissa_niter_16', so the adapter belongs to a base that"),
    ({'init_lora_weights': 'olora'}, "init_lora_weights is 'olora'"),
    ({'layer_replication': [[0, 4], [2, 4]]}, 'this one sets layer_replication'),
  ],
)
def test_adapters_of_another_base(lora, vicuna, setting, message):
  config = {'r': 2, 'lora_alpha': 6, 'init_lora_weights': True}
  (lora[0] / 'adapter_config.json').write_text(json.dumps(config))
  open_source(Request(src=lora[0], base=vicuna))
  (lora[0] / 'adapter_config.json').write_text(json.dumps(config | setting))
  with pytest.raises(ConversionError, match=f'adapter_config.json: .*{message}'):
    open_source(Request(src=lora[0], base=vicuna))


def test_tensors_that_are_there_twice(lora, vicuna):
  save_file({'model.norm.weight': LLAMA['model.norm.weight']}, vicuna / 'extra.safetensors')
  (vicuna / 'model.safetensors').rename(vicuna / 'model-1.safetensors')
  index = {'weight_map': dict.fromkeys(LLAMA, 'model-1.safetensors') | {'model.norm.weight': 'extra.safetensors'}}
  (vicuna / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(
    ConversionError, match=r'model-1.safetensors: model.norm.weight is there a second time \(after .*extra.safetensors'
  ):
    open_source(Request(src=lora[0], base=vicuna))
  (vicuna / 'model.safetensors.index.json').unlink()
  (vicuna / 'model-1.safetensors').rename(vicuna / 'model.safetensors')
  pair = f'{next(iter(lora[1])).removesuffix(".weight")}'
  save_file(lora[1] | {f'{pair}.default.weight': lora[1][f'{pair}.weight']}, lora[0] / 'adapter_model.safetensors')
  with pytest.raises(ConversionError, match=r'adapter_model.safetensors: \S+ is there a second time'):
    open_source(Request(src=lora[0], base=vicuna))


def test_tower_trained_beside_an_adapter(lora, vicuna):
  import torch  # the fixture has found it

  file = lora[0] / 'non_lora_trainables.bin'
  tower = {f'model.vision_tower.vision_tower.{k}': torch.tensor(v + 1) for k, v in load_file(CLIP / 'model.safetensors').items()}
  torch.save(torch.load(file) | {f'base_model.model.{k}': v for k, v in tower.items()}, file)
  start = load_file(CLIP / 'model.safetensors')['vision_model.pre_layrnorm.bias']
  config = json.loads((lora[0] / 'config.json').read_text())
  for trained in (False, True):
    write(lora[0], config | {'unfreeze_mm_vision_tower': trained}, None)
    _, plan = planned(src=lora[0], base=vicuna)
    np.testing.assert_array_equal(plan['vision/pre_layernorm/bias'].load(), start + trained)


def test_base_of_a_whole_model_is_refused(vicuna):
  with pytest.raises(ConversionError, match='a whole model, which needs no --base; leave it out'):
    open_source(Request(src=CASE / 'checkpoint', base=vicuna))


def test_projector_alone_in_a_pretraining_directory(vicuna, projector, tmp_path):
  config = CONFIG | {'sparse_config': None, 'model_type': 'llava_llama', 'mm_vision_tower': str(CLIP)}
  directory = write(tmp_path / 'pretrain', config, None)
  shutil.move(projector, directory / 'mm_projector.bin')
  _, plan = planned(src=directory, base=vicuna)
  assert plan['projector/linear_0/bias'].tensor.origin.endswith('mm_projector.bin')


def test_inspect_tells_parts_without_loading(lora, tmp_path):
  text = describe(CASE / 'checkpoint')
  assert 'layout: Dynamic-LLaVA (the authors)' in text and 'decoder layers              210,560 parameters, float32' in text
  assert 'layout: CLIP' in describe(CLIP)
  assert 'LoRA pairs                    1,280 parameters, float32' in describe(lora[0])
  convert(Request(src=CASE / 'checkpoint'), tmp_path / 'ours', dtype='bfloat16')
  text = describe(tmp_path / 'ours')
  assert 'layout: dynllava_jax, step 0' in text and 'llama                       292,560 parameters, bfloat16' in text
  longest = max((p for p in (tmp_path / 'ours' / '0' / 'params').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  longest.write_bytes(longest.read_bytes()[:-1])
  with pytest.raises(CheckpointError, match=f'{longest.name}: .* bytes, expected'):
    describe(tmp_path / 'ours')


def test_inspect_says_what_is_there(tmp_path):
  """A PyTorch directory inside one of our checkpoints, weights without config, a projector alone."""
  (tmp_path / 'model.json').touch()
  shutil.copytree(CASE / 'checkpoint', tmp_path / 'theirs')
  assert 'layout: Dynamic-LLaVA' in describe(tmp_path / 'theirs')
  (tmp_path / 'theirs' / 'config.json').unlink()
  text = describe(tmp_path / 'theirs')
  assert text.startswith('layout: unknown, config.json is missing') and 'decoder layers              210,560 parameters' in text


def test_inspect_a_projector_alone(projector):
  assert 'projector                     9,120 parameters, float32' in describe(projector.parent)
