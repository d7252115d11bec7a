"""From PyTorch through training and back: what training does not use is not lost on the way."""

import dataclasses
import json
import types
import weakref

import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file

from dynllava_jax import checkpoint
from dynllava_jax.config import DataConfig, OptimizerConfig, TrainConfig
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.export import export
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.source import Request
from dynllava_jax.convert.step_reader import StepReader
from dynllava_jax.data.sources import new_tokenizer
from dynllava_jax.training import loop, starting
from dynllava_jax.training.saving import Saver

CASE = GOLDEN / 'public_b'
DATA = DataConfig(text_length=104)


@pytest.fixture(scope='module')
def fine_tuned(tmp_path_factory):
  """Two steps of dense training from the dense part of the recorded model."""
  folder = tmp_path_factory.mktemp('fine_tuned')
  convert(Request(src=CASE / 'checkpoint'), folder / 'dynamic')
  export(folder / 'dynamic', folder / 'dense', 'llava', drop_predictors=True)
  for name, content in new_tokenizer(DATA, 512).items():
    (folder / 'dense' / name).write_bytes(content)
  convert(Request(src=folder / 'dense'), folder / 'start')
  cfg = TrainConfig(
    model=checkpoint.read_info(folder / 'start').model,
    data=DATA,
    optimizer=OptimizerConfig(learning_rate=1e-3),
    init_from=str(folder / 'start'),
    frozen=('vision',),
    batch_size=8,
    steps=2,
  )
  loop.train(cfg, folder / 'run')
  return folder, cfg


def test_fine_tuned_model_goes_back_whole(fine_tuned):
  folder, _ = fine_tuned
  export(folder / 'run' / loop.CHECKPOINTS, folder / 'back', 'llava')
  tower, original = (load_file(d / 'model.safetensors') for d in (folder / 'back' / 'clip', CASE / 'clip'))
  assert tower.keys() == original.keys()
  for key, value in tower.items():
    np.testing.assert_array_equal(value, original[key], err_msg=key)
  before, after = (load_file(d / 'model.safetensors') for d in (folder / 'dense', folder / 'back'))
  assert before.keys() == after.keys()
  changed = np.abs(before['model.layers.0.mlp.up_proj.weight'] - after['model.layers.0.mlp.up_proj.weight']).max()
  assert 0 < changed < 0.01
  config = json.loads((folder / 'back' / 'config.json').read_text())
  assert config['max_position_embeddings'] == 512 and (folder / 'back' / 'tokenizer.model').exists()


def test_export_holds_one_parameter_at_a_time(fine_tuned):
  """Of a step whose parameters were stored in one piece each, as earlier versions of training did."""
  folder, _ = fine_tuned
  reader = StepReader(folder / 'run' / loop.CHECKPOINTS / '2')
  first, second = (('llama', 'layers', name) for name in 'qk')
  stored = {path: np.asarray(reader.array(path).read().result()) for path in (first, second)}
  in_one_piece = types.SimpleNamespace(read_chunk=types.SimpleNamespace(shape=stored[first].shape))
  held = lambda: None

  def array(path):
    def read():
      assert held() is None
      return types.SimpleNamespace(result=stored[path].copy)

    return types.SimpleNamespace(chunk_layout=in_one_piece, read=read)

  reader.array = array
  slot = reader.slot(first, (1,))
  np.testing.assert_array_equal(slot, stored[first][1])
  assert slot.base is None  # a view would hold all of it
  held = weakref.ref(reader.held[1])
  np.testing.assert_array_equal(reader.slot(second, (1,)), stored[second][1])


def test_resumed_run_keeps_the_unused_layers(fine_tuned):
  folder, cfg = fine_tuned
  saved = checkpoint.load_params(folder / 'run' / loop.CHECKPOINTS)
  state, rest = starting.initial_state(
    dataclasses.replace(cfg, steps=3),
    loop.make_optimizer(cfg.optimizer, 3),
    loop.sharding.make_mesh(cfg.mesh),
    folder / 'run' / loop.CHECKPOINTS,
  )
  assert int(state.step) == 2
  np.testing.assert_array_equal(rest['vision_tail']['post_layernorm']['scale'], saved['vision_tail']['post_layernorm']['scale'])


def test_model_without_the_unused_layers_needs_a_tower(fine_tuned, tmp_path):
  """A model trained from nothing never had them."""
  folder, _ = fine_tuned
  info, params = checkpoint.read_info(folder / 'start'), checkpoint.load_params(folder / 'start')
  bare = {k: v for k, v in params.items() if k != 'vision_tail'}
  with Saver(tmp_path / 'bare') as saver:
    saver.save(1, {'params': bare})
  checkpoint.write_info(tmp_path / 'bare', dataclasses.replace(info, unused_vision_layers=False))
  with pytest.raises(ConversionError, match='does not hold the CLIP layers above 1.*with --vision'):
    export(tmp_path / 'bare', tmp_path / 'back', 'llava-hf')
  export(tmp_path / 'bare', tmp_path / 'back', 'llava', vision=CASE / 'clip')
  tower, original = (load_file(d / 'model.safetensors') for d in (tmp_path / 'back' / 'clip', CASE / 'clip'))
  assert all((tower[k] == original[k]).all() for k in original)
