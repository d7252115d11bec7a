"""LLaVA's configs, and training on prepared data through the command line."""

import importlib.util
import json
import os
import subprocess
import sys

import llava_files
import pytest
from conftest import GOLDEN, ROOT

from dynllava_jax.config import DataConfig, TrainConfig, from_config_dict
from dynllava_jax.data import check, preparation

TOKENIZER = GOLDEN / 'text' / 'tok_nonlegacy'
TINY = {
  'model.vision': dict(image_size=28, hidden_size=16, mlp_dim=32, num_layers=2, num_heads=2),
  'model.llama': dict(vocab_size=1800, hidden_size=32, mlp_dim=48, num_layers=3, num_heads=2, num_kv_heads=2),
  'model.predictor': dict(d_model=16, num_heads=2, num_layers=1, mlp_dim=16),
  'data': dict(tokenizer=str(TOKENIZER), workers=0, text_length=90, buckets='()'),
}


@pytest.mark.parametrize('name, steps', [('pretrain', 2180), ('finetune', 5197), ('dynamic', 9759)])
def test_configs_are_one_epoch_of_llavas_recipe(name, steps):
  spec = importlib.util.spec_from_file_location('llava', ROOT / 'configs' / 'llava.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  cfg = from_config_dict(TrainConfig, module.get_config(name))
  assert cfg.steps == steps and cfg.data.text_length + cfg.model.vision.num_patches == 2048
  assert ('vision' in cfg.frozen) and cfg.data.images_only == (name == 'dynamic')


def test_a_prepared_data_set_trains_from_the_command_line(tmp_path):
  """Dynamic-LLaVA's config on a tiny model; text-only rows stay in, so that both kinds share batches."""
  llava_files.write_pictures(tmp_path)
  path = llava_files.write_json(tmp_path / 'mix.json', [llava_files.sample(i, image=i % 5 != 0) for i in range(30)])
  data = DataConfig(conversation='vicuna_v1', text_length=90)
  scan = check.Scan(json={'mix': path}, images=tmp_path, data=data, tokenizer=None, num_patches=4, processes=1)
  assert preparation.prepare(scan, [1.0], tmp_path / 'out', only_check=False, image_bytes=True, shard_samples=25)
  overrides = [f'--config.{group}.{key}={value}' for group, values in TINY.items() for key, value in values.items()]
  overrides += [
    f'--config.data.path={tmp_path / "out"}',
    '--config.data.images_only=False',
    '--config.dtype=float32',
    '--config.remat=none',
  ]
  overrides += ['--config.batch_size=8', '--config.steps=2', '--config.log_every=1', '--config.stages[1].image_keep_rate=0.5']
  overrides += ['--config.sparsity.image_keep_rate=0.5', '--config.sparsity.min_answer_len=3']
  command = [sys.executable, 'train.py', '--config=configs/llava.py:dynamic', f'--workdir={tmp_path / "run"}', *overrides]
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=environment)
  assert done.returncode == 0, done.stderr
  assert '24 of 30 samples per epoch' in done.stdout and 'text bucket 90: 3 batches' in done.stdout
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 2]
  assert all(line['supervised_tokens'] > 8 and 5 < line['ce'] < 10 for line in lines)
  kept = {p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()}
  assert {'tokenizer.model', 'tokenizer_config.json'} <= kept

  other = llava_files.write_json(tmp_path / 'mix.json', [llava_files.sample(i + 1, image=i % 5 != 0) for i in range(30)])
  (tmp_path / 'out').rename(tmp_path / 'before')
  scan = check.Scan(json={'mix': other}, images=tmp_path, data=data, tokenizer=None, num_patches=4, processes=1)
  assert preparation.prepare(scan, [1.0], tmp_path / 'out', only_check=False, image_bytes=True, shard_samples=25)
  again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=environment)
  assert again.returncode == 1 and again.stderr.count('\n') == 1, again.stderr
  assert 'the samples in config.data.path' in again.stderr and 'are not those that the run was started with' in again.stderr
