"""The command lines over gs:// and s3://: train, kill, resume, evaluate, prepare, convert; never a folder called gs:."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import GOLDEN, ROOT
from PIL import Image

from dynllava_jax import checkpoint, lease, paths, remote
from dynllava_jax.training.metrics import read_metrics

TINY = """
from ml_collections import config_dict

VISION = dict(image_size=98, hidden_size=32, mlp_dim=32, num_layers=2, num_heads=2)
LLAMA = dict(vocab_size=430, hidden_size=32, mlp_dim=48, num_layers=3, num_heads=2, num_kv_heads=2)

def get_config(name):
  if name == 'eval':
    return config_dict.ConfigDict(
      dict(benchmark='digits', runs={'dense': dict(stages=[dict(start=0)])}, batch_size=4, questions=12, max_new_tokens=8))
  prepared = name == 'prepared'
  data = dict(source='prepared' if prepared else 'digits', path='', tokenizer='', text_length=104, workers=1)
  return config_dict.ConfigDict(
    dict(model=dict(vision=VISION, llama=LLAMA), data=data, batch_size=4, steps=12, log_every=1, save_every=4, init_from=''))
"""


def command(*arguments):
  flags = {'XLA_FLAGS': '--xla_force_host_platform_device_count=1', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'JAX_PLATFORMS': 'cpu'}
  return [sys.executable, *map(str, arguments)], dict(cwd=ROOT, env=os.environ | flags, stdout=-1, stderr=-1, text=True)


def run(*arguments, code=0):
  words, options = command(*arguments)
  done = subprocess.run(words, timeout=300, **options)
  assert done.returncode == code and 'Traceback' not in done.stderr, done.stdout + done.stderr
  return done.stdout + done.stderr


def names(folder):
  return set(remote.listing(paths.given(folder, 'x')))


def fetched(folder):
  return remote.fetched(paths.given(folder, 'x'), set)


@pytest.fixture(autouse=True)
def no_folder_is_called_like_a_scheme():
  yield
  assert not [p for p in ROOT.iterdir() if p.name.endswith(':')]


@pytest.mark.faults  # kills and signals at times that a busy machine shifts
def test_train_killed_resumed_evaluated(cloud_folder, tmp_path):
  (tmp_path / 'tiny.py').write_text(TINY)
  config, workdir = tmp_path / 'tiny.py', f'{cloud_folder}/runs/a 50%{{é}}'
  train = ('train.py', f'--config={config}:base', f'--workdir={workdir}')
  words, options = command(*train, '--config.steps=100000')
  with subprocess.Popen(words, **options) as process:
    for _ in range(3000):
      if {n for n in names(workdir) if n.endswith('integrity.json')} or process.poll() is not None:
        break
      time.sleep(0.1)
    assert process.poll() is None, process.communicate()
    busy = run(*train, code=1)
    assert 'another program is writing there' in busy and busy.count('\n') == 1
    process.kill()
  assert lease.LEASE in names(workdir)
  whole = [int(n.split('/')[1]) for n in names(workdir) if n.endswith('integrity.json')]
  assert whole and min(whole) % 4 == 0
  said = stopped_soon(train)
  assert 'goes on from step' in said and 'stopped after step' in said
  assert lease.LEASE not in names(workdir)
  lines = [line['step'] for line in read_metrics(fetched(f'{workdir}/metrics.jsonl').parent)]
  assert lines == list(range(1, len(lines) + 1))
  newest = checkpoint.locate(f'{workdir}/checkpoints')[1]
  assert newest == len(lines) and checkpoint.load_params(f'{workdir}/checkpoints/{newest}')
  assert any(n.startswith('tensorboard/') for n in names(workdir))

  out = f'{cloud_folder}/results'
  evaluate = ('eval.py', f'--config={config}:eval', f'--checkpoint={workdir}/checkpoints', f'--out={out}')
  assert 'digits' in run(*evaluate)
  assert {'answers/dense.jsonl', 'results.json', 'results.png'} <= names(out)
  assert json.loads(fetched(f'{out}/results.json').read_text())['checkpoint'] == f'{workdir}/checkpoints'
  assert 'answers of another' not in run(*evaluate)
  scored = run('eval.py', f'--config={config}:eval', '--config.questions=12', f'--answers={out}/answers/dense.jsonl')
  assert json.loads(scored.splitlines()[-1])['answers'] == f'{out}/answers/dense.jsonl'
  run('-m', 'dynllava_jax.training.plot', f'{cloud_folder}/curves.png', workdir)
  assert 'curves.png' in names(cloud_folder)


def stopped_soon(train):
  """Trains for some steps more, then asks it to end."""
  words, options = command(*train, '--config.steps=100000')
  process = subprocess.Popen(words, **options)
  time.sleep(20)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 130, out + err
  return out + err


@pytest.mark.slow
def test_prepare_killed_resumed_trained_on(cloud_folder, tmp_path):
  source = tmp_path / 'source'
  source.mkdir()
  Image.new('RGB', (40, 30), 'red').save(source / 'a [1].png')
  turns = [{'from': 'human', 'value': '<image>\nWhat is it?'}, {'from': 'gpt', 'value': 'A bus.'}]
  samples = [{'id': f's{i}', 'image': 'a [1].png', 'conversations': turns} for i in range(100)]
  (source / 'mix.json').write_text(json.dumps(samples))
  for file in (*source.rglob('*'), *(GOLDEN / 'text' / 'tok_nonlegacy').iterdir()):
    if file.is_file():
      where = file.relative_to(source) if file.is_relative_to(source) else f'tok/{file.name}'
      remote.write(paths.given(f'{cloud_folder}/in/{where}', 'x'), file.read_bytes())
  inputs, out = f'{cloud_folder}/in', f'{cloud_folder}/prepared/1.0.0'
  prepare = ['-m', 'dynllava_jax.data.prepare', f'--json={inputs}/mix.json', f'--images={inputs}', f'--tokenizer={inputs}/tok']
  prepare += [f'--out={out}', '--text_length=104', '--shard_samples=30', '--processes=1', '--conversation=plain_turns']
  words, options = command(*prepare)
  with subprocess.Popen(words, **options) as process:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(6)
    process.kill()
  assert '100 samples prepared' in run(*prepare) or 'dataset_info.json' in names(out)
  assert 'prepared already' in run(*prepare)
  assert {'dataset_info.json', 'report.json'} <= names(out) and len([n for n in names(out) if 'array_record' in n]) == 4
  assert not [n for n in names(out) if n.startswith('.')]
  (tmp_path / 'tiny.py').write_text(TINY.replace('430', '32000'))
  train = ['train.py', f'--config={tmp_path / "tiny.py"}:prepared', f'--workdir={tmp_path / "run"}', '--config.steps=2']
  train += [f'--config.data.path={out}', f'--config.data.tokenizer={inputs}/tok']
  assert 'step 2/2' in run(*train)
  assert any(n.startswith('index-') for n in names(out))


@pytest.mark.slow
def test_convert_and_export(cloud_folder, tmp_path):
  source, target = GOLDEN / 'public_b' / 'checkpoint', f'{cloud_folder}/c'
  convert = ('convert_weights.py', f'--src={source}', f'--dst={target}')
  words, options = command(*convert)
  for seconds in (3.0, 4.0):
    with subprocess.Popen(words, **options) as process:
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
      process.kill()
    if not {'model.json', '0/integrity.json'} <= names(target):
      assert 'model.json' not in names(target) or remote.UPLOADING in names(target)
  if 'model.json' not in names(target) or remote.UPLOADING in names(target):
    said = run(*convert)
    assert f'to {target}' in said
  assert 'exists and is not empty' in run(*convert, code=1)
  assert f'to {target}' in run(*convert, '--overwrite')
  assert 'layout: dynllava_jax, step 0' in run('convert_weights.py', f'--inspect={target}')
  run('convert_weights.py', f'--src={target}', f'--dst={cloud_folder}/e', '--export=dynamic-llava')
  run('convert_weights.py', f'--src={cloud_folder}/e', f'--dst={tmp_path / "again"}')
  a, b = (checkpoint.load_params(p) for p in (str(target), str(tmp_path / 'again')))
  assert json.dumps(shapes(a)) == json.dumps(shapes(b))


def shapes(tree):
  return {k: shapes(v) if isinstance(v, dict) else [v.shape, float(v.astype('float32').sum())] for k, v in sorted(tree.items())}


@pytest.mark.slow
def test_a_search_writes_into_a_store(cloud_folder):
  said = run(
    '-m', 'dynllava_jax.controller', '--preset=7b', '--target=device=v5e-8,memory=16GiB,batch=64', f'--out={cloud_folder}/c'
  )
  assert f'{cloud_folder}/c/choice.py: a config' in said and names(f'{cloud_folder}/c') == {'choice.py', 'front.png'}
