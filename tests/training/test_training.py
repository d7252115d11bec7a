"""The step and the loop: what is trained, resumed and sharded."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dynllava_jax import checkpoint, sharding
from dynllava_jax.config import (
  ConfigError,
  DataConfig,
  LlamaConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  PredictorConfig,
  SparsityConfig,
  Stage,
  TrainConfig,
  VisionConfig,
  to_dict,
)
from dynllava_jax.data.batches import Batch
from dynllava_jax.evals import report
from dynllava_jax.models.trained_masks import temperature
from dynllava_jax.training import loop, plot, record, starting
from dynllava_jax.training.metrics import MetricsLog, read_metrics
from dynllava_jax.training.saving import Saver
from dynllava_jax.training.step import State, cut_abstract, make_optimizer, make_train_step, schedule, split_frozen

ROOT = pathlib.Path(__file__).parent.parent.parent
MODEL = ModelConfig(
  vision=VisionConfig(image_size=98, hidden_size=32, mlp_dim=32, num_layers=2, num_heads=2),
  llama=LlamaConfig(vocab_size=430, hidden_size=32, mlp_dim=48, num_layers=3, num_heads=2, num_kv_heads=2),
)
DYNAMIC = (Stage(), Stage(start=1, selector='dynamic', image_keep_rate=0.2))
BASE = TrainConfig(
  model=MODEL,
  data=DataConfig(text_length=104),
  optimizer=OptimizerConfig(learning_rate=3e-3),
  batch_size=8,
  steps=8,
  log_every=2,
  save_every=4,
)


def dynamic(**changes):
  model = dataclasses.replace(MODEL, predictor=PredictorConfig(d_model=16, num_heads=2, num_layers=1, mlp_dim=16))
  return dataclasses.replace(
    BASE, model=model, stages=DYNAMIC, frozen=('vision', 'projector'), sparsity=SparsityConfig(min_answer_len=20), **changes
  )


def parameters(workdir):
  return checkpoint.load_params(workdir / loop.CHECKPOINTS)


def largest_difference(a, b):
  return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))


@pytest.fixture(scope='module')
def base_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('base')
  loop.train(BASE, workdir)
  return workdir


@pytest.fixture(scope='module')
def dynamic_run(tmp_path_factory, base_run):
  workdir = tmp_path_factory.mktemp('dynamic')
  loop.train(dynamic(init_from=str(base_run / loop.CHECKPOINTS)), workdir)
  return workdir


def test_loss_falls_and_is_logged(base_run):
  lines = read_metrics(base_run)
  assert [line['step'] for line in lines] == [2, 4, 6, 8]
  assert lines[-1]['loss'] < lines[0]['loss'] - 0.3
  assert lines[0]['tokens_per_second'] > 0 and lines[0]['supervised_tokens'] > 0
  assert list((base_run / 'tensorboard').iterdir())


@pytest.fixture
def one_device(monkeypatch):
  """A mesh of one device, where sums have one order; over several CPU devices it varies from run to run."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ('data', 'fsdp', 'tensor'))
  monkeypatch.setattr(sharding, 'make_mesh', lambda cfg: mesh)


def test_interrupted_and_resumed_equals_uninterrupted(one_device, tmp_path, monkeypatch):
  """Bit for bit: SIGTERM in step 3, started again, same parameters as never interrupted."""
  loop.train(BASE, tmp_path / 'whole')
  workdir = tmp_path / 'interrupted'
  real = loop.make_train_step

  def interrupting(*args):
    step_fn = real(*args)

    def step(state, frozen, batch):
      if int(state.step) == 2:
        signal.raise_signal(signal.SIGTERM)
      return step_fn(state, frozen, batch)

    return step

  monkeypatch.setattr(loop, 'make_train_step', interrupting)
  with pytest.raises(loop.Interrupted, match='stopped after step 3 of 8'):
    loop.train(BASE, workdir)
  monkeypatch.setattr(loop, 'make_train_step', real)
  assert checkpoint.all_steps(workdir / loop.CHECKPOINTS) == [3]
  loop.train(BASE, workdir)
  assert largest_difference(parameters(workdir), parameters(tmp_path / 'whole')) == 0
  assert [line['step'] for line in read_metrics(workdir)] == [2, 4, 6, 8]


def test_asked_to_stop_while_logging_it_ends_after_the_next_step(one_device, tmp_path, monkeypatch):
  write = MetricsLog.write

  def interrupted(self, step, values):
    if step == 6:
      signal.raise_signal(signal.SIGTERM)
    write(self, step, values)

  monkeypatch.setattr(MetricsLog, 'write', interrupted)
  with pytest.raises(loop.Interrupted, match='stopped after step 7 of 8'):
    loop.train(BASE, tmp_path)
  assert checkpoint.all_steps(tmp_path / loop.CHECKPOINTS) == [4, 7]


HOST = """
import json, pathlib, signal, sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_disable_most_optimizations', True)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from dynllava_jax.models.trained_masks import temperature
from dynllava_jax.training import loop
from dynllava_jax.config import TrainConfig, from_config_dict
if sys.argv[2] == '1':  # the other host is not told
  real = loop.make_train_step
  def asked_to_stop(*args):
    step_fn = real(*args)
    def step(state, frozen, batch):
      if int(state.step) == 2:
        signal.raise_signal(signal.SIGTERM)
      return step_fn(state, frozen, batch)
    return step
  loop.make_train_step = asked_to_stop
cfg = from_config_dict(TrainConfig, json.loads(sys.argv[3]))
for attempt in range(int(sys.argv[5])):
  try:
    loop.train(cfg, pathlib.Path(sys.argv[4]))
  except loop.Interrupted as e:
    print(e)
"""


def two_processes(cfg, workdir, attempts=1):
  """What two processes with two devices each say; the second is asked to stop in step 3."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    command = [sys.executable, '-c', HOST, f'127.0.0.1:{probe.getsockname()[1]}']
  words = [json.dumps(to_dict(cfg)), workdir, str(attempts)]
  how = dict(cwd=ROOT, env=os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}, stdout=-1, stderr=-1, text=True)
  hosts = [subprocess.Popen([*command, str(i), *words], **how) for i in range(2)]
  told = [host.communicate(timeout=600) for host in hosts]
  assert [host.returncode for host in hosts] == [0, 0], told
  return [out for out, _ in told]


def require_like(workdir, expected, steps):
  """Losses and gradients at some steps are those of another run, but for the order of sums."""
  for name, tolerance in (('loss', 1e-3), ('grad_norm', 2e-3)):
    found, whole = ({x['step']: x[name] for x in read_metrics(w) if name in x} for w in (workdir, expected))
    np.testing.assert_allclose([found[s] for s in steps], [whole[s] for s in steps], rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
  'mesh, attempts',
  [(MeshConfig(data=2, fsdp=1, tensor=2), 1), (MeshConfig(data=1, fsdp=1, tensor=4), 2)],
  ids=['rows of their own', 'the same rows'],
)
def test_two_hosts_train_as_one(mesh, attempts, base_run, tmp_path):
  """One is asked to stop in step 3, both do after step 4, where they log."""
  told = two_processes(dataclasses.replace(BASE, mesh=mesh), tmp_path, attempts)
  assert all('stopped after step 4 of 8' in out for out in told)
  assert 'samples per epoch' in told[0] and 'samples per epoch' not in told[1], 'the first host speaks'
  steps = [2, 4, 6, 8][: 2 * attempts]
  assert [line['step'] for line in read_metrics(tmp_path)] == steps, 'and writes'
  require_like(tmp_path, base_run, steps)


def test_finished_run_is_left_alone(base_run, capsys):
  before = (base_run / 'metrics.jsonl').read_text()
  loop.train(BASE, base_run)
  assert 'finished already' in capsys.readouterr().out
  assert (base_run / 'metrics.jsonl').read_text() == before


def test_workdir_of_another_run_is_refused(base_run):
  other = dataclasses.replace(BASE, model=dataclasses.replace(MODEL, projector='linear'))
  started = "config.model.projector: the run in .* was started with 'mlp2x_gelu', the config says 'linear'"
  with pytest.raises(ConfigError, match=started):
    loop.train(other, base_run)


def test_resuming_with_other_settings_is_refused(base_run):
  with pytest.raises(ConfigError, match='config.batch_size: the run in .* was started with 8, the config says 16'):
    loop.train(dataclasses.replace(BASE, batch_size=16), base_run)


def test_dynamic_trains_decoder_and_predictors_and_freezes_the_rest(base_run, dynamic_run):
  before, after = parameters(base_run), parameters(dynamic_run)
  assert largest_difference(before['vision'], after['vision']) == 0
  assert largest_difference(before['projector'], after['projector']) == 0
  assert largest_difference(before['llama'], after['llama']) > 1e-4
  assert {'image_predictor', 'text_predictor'} <= after.keys()
  lines = read_metrics(dynamic_run)
  assert {'tau', 'image_keep', 'text_keep', 'image_mask', 'text_mask', 'ce'} <= lines[0].keys()
  assert 0 < lines[0]['image_keep'] < 1
  total = lines[0]['ce'] + 100 * (lines[0]['image_mask'] + lines[0]['text_mask'])
  assert lines[0]['loss'] == pytest.approx(total, rel=1e-5)


def test_what_is_trained_is_float32_whatever_the_checkpoint_holds(base_run, tmp_path):
  half = tmp_path / 'half'
  checkpoint.write_info(half, checkpoint.read_info(base_run / loop.CHECKPOINTS), {'tokenizer.model': b'-'})
  with Saver(half) as saver:
    saver.save(0, {'params': jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters(base_run))})
  cfg = dynamic(init_from=str(half))
  mesh = sharding.make_mesh(cfg.mesh)
  with sharding.on_mesh(mesh):
    state, frozen = starting.initial_state(cfg, make_optimizer(cfg.optimizer, cfg.steps), mesh, tmp_path / 'new')
  assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {'float32'}
  assert {str(x.dtype) for x in jax.tree.leaves(frozen)} == {'bfloat16'}


def test_init_from_another_model_is_refused(base_run, tmp_path):
  llama = dataclasses.replace(MODEL.llama, mlp_dim=64)
  cfg = dynamic(init_from=str(base_run / loop.CHECKPOINTS))
  message = 'the model in .* has llama.mlp_dim 48, the config says 64; set --config.model.llama.mlp_dim=48'
  with pytest.raises(ConfigError, match=message):
    loop.train(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, llama=llama)), tmp_path)


def test_dense_training_from_a_dynamic_checkpoint_leaves_the_predictors_out(dynamic_run):
  cfg = dataclasses.replace(BASE, init_from=str(dynamic_run / loop.CHECKPOINTS))
  assert set(starting.pretrained(cfg, sharding.make_mesh(cfg.mesh))) == {'vision', 'projector', 'llama'}


def test_settings_of_an_earlier_version_have_their_defaults(base_run, tmp_path):
  started = record.read(base_run)
  del started.settings['sparsity']['dense_share']
  started.write(tmp_path)
  assert record.check_same_run(BASE, record.read(tmp_path), tmp_path, 8) == ''
  (tmp_path / record.RUN_FILE).write_text('{"model": ')
  with pytest.raises(ConfigError, match='run.json: damaged .*Copy it back from elsewhere, or start a new run from its weights'):
    record.read(tmp_path)


def test_mesh_does_not_change_the_result(base_run, tmp_path):
  """Data alone (the fixture) and data x fsdp x tensor: the same losses and gradients.

  Parameters are not compared: Adam turns the sign of a gradient that is zero but for rounding into a full step.
  """
  loop.train(dataclasses.replace(BASE, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), tmp_path)
  for name, tolerance in (('loss', 1e-3), ('grad_norm', 2e-3)):
    split, whole = ([line[name] for line in read_metrics(w)] for w in (tmp_path, base_run))
    np.testing.assert_allclose(split, whole, rtol=tolerance)


def test_every_device_computes_its_own_rows_only():
  """On eight devices each does an eighth of the work, whatever the split of the weights would suggest."""
  cfg = dynamic(mesh=MeshConfig(fsdp=8))
  mesh, optimizer = sharding.make_mesh(cfg.mesh), make_optimizer(cfg.optimizer, cfg.steps)
  size = cfg.data.text_length + cfg.model.vision.num_patches
  shape = lambda dims, dtype: jax.ShapeDtypeStruct((cfg.batch_size, *dims), dtype)
  row, token, image = shape((), jnp.int32), shape((size,), jnp.int32), cfg.model.vision.image_size
  batch = Batch(shape((image, image, 3), jnp.uint8), token, token, row, row, row, shape((), jnp.uint32))
  with sharding.on_mesh(mesh):
    trained, frozen = (sharding.unboxed(t) for t in split_frozen(cut_abstract(cfg), cfg.frozen))
    state = State(jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(optimizer.init, trained))
    step = make_train_step(cfg, optimizer, mesh).lower(state, frozen, batch)
  of_all, of_one = step.cost_analysis()['flops'], step.compile().cost_analysis()['flops']  # loop bodies count once
  assert of_all / 8 < of_one < 1.08 * of_all / 8


def test_batch_must_divide_over_the_mesh(tmp_path):
  with pytest.raises(ConfigError, match='12 does not divide over data x fsdp = 8'):
    loop.train(dataclasses.replace(BASE, batch_size=12), tmp_path)


@pytest.mark.parametrize('sizes', [dict(data=3), dict(fsdp=-2, tensor=-4), dict(tensor=0)], ids=str)
def test_mesh_must_fit_the_devices(sizes):
  with pytest.raises(ConfigError, match='does not fit 8 devices'):
    sharding.make_mesh(MeshConfig(**sizes))


def test_evaluation_of_the_trained_checkpoint(dynamic_run, tmp_path):
  from dynllava_jax.config import EvalConfig, EvalRun

  uniform = (Stage(), Stage(start=1, selector='uniform', image_keep_rate=0.2))
  cfg = EvalConfig(
    runs={'dense': EvalRun(stages=(Stage(),)), 'dynamic': EvalRun(stages=DYNAMIC), 'uniform': EvalRun(stages=uniform)},
    text_lengths=(32,),
    questions=20,
    batch_size=8,
    max_new_tokens=12,
  )
  report.run(cfg, str(dynamic_run / loop.CHECKPOINTS), tmp_path)
  results = json.loads((tmp_path / 'results.json').read_text())
  runs = results['runs']
  assert set(runs) == {'dense', 'dynamic', 'uniform'} and results['questions'] == 20
  for run in runs.values():
    assert {'accuracy', 'image_tokens', 'generated_kept', 'flops_per_sample', 'kv_bytes_per_sample'} <= run.keys()
    assert sum(run['questions_by_task'].values()) == 20
    assert run['programs_compiled'] == 2  # one prefill, one decoding loop, whatever the number of batches
  assert [runs[n]['image_tokens'] for n in runs] == [49, 9, 9]
  assert runs['dense']['generated_kept'] == runs['uniform']['generated_kept'] == 1.0
  assert runs['dense']['flops_per_sample'] > runs['uniform']['flops_per_sample']
  assert runs['dense']['kv_bytes_per_sample'] == 3 * (81 + 12) * 2 * 32 * 4
  for name in runs:
    assert len((tmp_path / 'answers' / f'{name}.jsonl').read_text().splitlines()) == 20
  assert (tmp_path / 'tokens.png').read_bytes().startswith(b'\x89PNG')


def test_python_of_the_readme_answers_a_question(dynamic_run, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  Image.new('RGB', (98, 98)).save('scene.png')
  code = re.search(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)[1]
  code = code.replace('runs/digits/dynamic/checkpoints', str(dynamic_run / loop.CHECKPOINTS))
  exec(code.replace("are there?')", "are there?', max_tokens=4)"), names := {})
  reply = names['model'].reply('scene.png', 'How many digits are there?', max_tokens=4)
  assert capsys.readouterr().out == f'{reply.text}\n'


def test_training_picture(base_run, dynamic_run, tmp_path):
  plot.main(str(tmp_path / 'training.png'), str(base_run), str(dynamic_run))
  assert (tmp_path / 'training.png').read_bytes().startswith(b'\x89PNG')
  runs = {'base': read_metrics(base_run), 'dynamic': [*read_metrics(dynamic_run), {'step': 8, 'eval/digits/score': 90.0}]}
  for in_turn, ends in ((False, {8}), (True, {8, 16})):
    axes = plot.training_figure(runs, in_turn).axes
    assert [a.get_ylabel() for a in axes] == ['loss', 'gradient norm', 'keep rate', 'temperature', 'digits']
    assert {line.get_xdata()[-1] for line in axes[0].lines} == ends
    assert {line.get_color() for line in axes[2].lines} == {'C1'}, 'a dense run keeps no rates'
  with pytest.raises(SystemExit, match='missing or empty'):
    plot.main(str(tmp_path / 'x.png'), str(tmp_path))


def test_temperature_and_learning_rate_follow_the_paper():
  cfg = SparsityConfig()
  assert float(temperature(jnp.int32(0) / 100, cfg)) == pytest.approx(1.0)
  assert float(temperature(jnp.int32(50) / 100, cfg)) == pytest.approx(0.1**0.5)
  assert float(temperature(jnp.int32(100) / 100, cfg)) == pytest.approx(0.1)
  rate = schedule(2e-4, 100, OptimizerConfig())
  assert float(rate(0)) == 0 and float(rate(3)) == pytest.approx(2e-4) and float(rate(100)) == pytest.approx(0, abs=1e-9)


def test_predictors_have_their_own_learning_rate():
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, predictor_learning_rate=1e-1, clip_norm=1e9), 100)
  params = {'llama': jnp.ones(3), 'text_predictor': jnp.ones(3)}
  state = optimizer.init(params)
  for _ in range(5):
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
  np.testing.assert_allclose(updates['text_predictor'] / updates['llama'], 100, rtol=1e-3)


def test_metrics_cut_off_by_a_kill_are_mended(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
  log = MetricsLog(tmp_path, 1)
  log.write(2, {'loss': 0.5})
  log.close()
  assert read_metrics(tmp_path) == [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 0.5}]
