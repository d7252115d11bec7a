"""A run's files: what is damaged, changed, missing or cannot be written is named in one line, and nothing is lost silently."""

import dataclasses
import json
import os
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynllava_jax import checkpoint, locks, sharding
from dynllava_jax.checkpoint import CheckpointError
from dynllava_jax.config import (
  ConfigError,
  DataConfig,
  LlamaConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
  VisionConfig,
  from_config_dict,
)
from dynllava_jax.data import fingerprint
from dynllava_jax.files import reason
from dynllava_jax.training import limits, loop, record, recovery, tracing
from dynllava_jax.training.keeping import Keeping
from dynllava_jax.training.metrics import read_metrics
from dynllava_jax.training.saving import NOT_IN_A_PATH, Saver, check_contents, check_path

MODEL = ModelConfig(
  vision=VisionConfig(image_size=28, hidden_size=16, mlp_dim=16, num_layers=2, num_heads=2),
  llama=LlamaConfig(vocab_size=430, hidden_size=16, mlp_dim=16, num_layers=2, num_heads=2, num_kv_heads=2),
)
CONFIG = TrainConfig(
  model=MODEL, data=DataConfig(text_length=104), optimizer=OptimizerConfig(), batch_size=8, steps=4, log_every=1, save_every=1
)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run') / 'w'
  loop.train(CONFIG, workdir)
  return workdir


@pytest.fixture
def run(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / 'w')


def find(run, cfg=CONFIG):
  """What a start finds in a workdir: (record, step, what it says)."""
  said = []
  started, step = record.find(cfg, run, said.append)
  return started, step, '\n'.join(said)


def flip(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def arrays(run, step):
  return [p for p in (run / 'checkpoints' / str(step)).rglob('*') if p.is_file() and p.name != 'integrity.json']


# Saving.


@pytest.mark.parametrize('name', [f'x{c}1' for c in NOT_IN_A_PATH])
def test_paths_that_orbax_takes_for_patterns_are_refused_before_anything_is_made(name, tmp_path):
  with pytest.raises(CheckpointError, match='is taken for a pattern by the library that writes it; choose a path without'):
    loop.train(CONFIG, tmp_path / name)
  assert not list(tmp_path.iterdir())
  with pytest.raises(CheckpointError):
    check_path(tmp_path / name / 'checkpoints')  # also above the workdir


@pytest.mark.parametrize('name', ['a b', 'b{1,2}', 'p%41', 'q\'"', '~t', 'ünï', 'c:d', 'e#f$HOME!'])
def test_other_strange_paths_work(name, tmp_path):
  with Saver(tmp_path / name) as saver:
    saver.save(1, {'params': {'a': jnp.arange(3.0)}})
  checkpoint.check_integrity(tmp_path / name / '1', 'params')


def described(**arrays):
  return {'params': {name: (value.shape, str(value.dtype)) for name, value in arrays.items()}}


def test_what_is_on_disk_is_counted_against_what_was_saved(tmp_path):
  a, b = jnp.ones((3, 2)), jnp.zeros(4, jnp.bfloat16)
  with Saver(tmp_path) as saver:
    saver.save(1, {'params': {'a': a, 'b': b}})
  check_contents(tmp_path / '1', described(a=a, b=b))
  for wrong, message in (
    (described(a=a, b=b, c=a), "params/c: missing, saved ((3, 2), 'float32')"),
    (described(a=a), 'params/b: nothing of this name was saved'),
    (described(a=a.T, b=b), 'params/a: '),
    (described(a=a.astype(jnp.int32), b=b), 'params/a: '),
  ):
    with pytest.raises(CheckpointError, match=re.escape(message)):
      check_contents(tmp_path / '1', wrong)


def test_a_step_that_lacks_an_array_gets_no_name(tmp_path, monkeypatch):
  monkeypatch.setattr('dynllava_jax.training.saving._described', lambda tree: {'a': ((3,), 'float32'), 'lost': ((1,), 'float32')})
  saver = Saver(tmp_path)
  with pytest.raises(CheckpointError, match='arrays on disk are not what was to be saved, such as params/lost: missing'):
    saver.save(1, {'params': {'a': jnp.ones(3)}})
    saver.close()
  assert not checkpoint.all_steps(tmp_path)


def test_a_file_too_large_is_one_line(tmp_path):
  """As on a full disk; the limit is this process's, so it is taken back at once."""
  saver = Saver(tmp_path / 'steps')
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, before[1]))
  try:
    with pytest.raises(CheckpointError) as error:
      saver.save(1, {'params': {'a': jax.random.normal(jax.random.key(0), (256, 256))}})
      saver.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  message = str(error.value)
  assert re.fullmatch(r'.*/steps/1: cannot be written \(File too large\); what was saved before is intact\. [^\n]*', message), (
    message
  )


def test_reasons_of_other_failures():
  store = 'PERMISSION_DENIED: Failed writing: "/x": Failed to open [os_error_code=\'13\']'
  assert reason(ValueError(store)) == 'Permission denied'
  assert reason(ValueError(store.replace('13', '122'))) == os.strerror(122)  # quota
  assert reason(ExceptionGroup('', [ValueError('UNAVAILABLE: no way [more]')])) == 'UNAVAILABLE: no way'
  assert reason(OSError(30, 'Read-only file system')) == 'Read-only file system'
  assert reason(KeyError('a bug of ours')) == ''


# What goes on after damage.


def test_three_steps_are_kept(finished):
  assert checkpoint.all_steps(finished / 'checkpoints') == [2, 3, 4]
  assert record.read(finished).saved == 4


@pytest.mark.parametrize('how', ['flipped', 'cut', 'hollow', 'no list', 'half deleted'])
def test_a_damaged_newest_step_is_named_and_set_aside(how, run, capsys):
  step, file = run / 'checkpoints' / '4', max(arrays(run, 4), key=lambda p: p.stat().st_size)
  if how == 'flipped':
    flip(file)
  elif how == 'cut':
    os.truncate(file, file.stat().st_size // 2)
  elif how == 'hollow':
    shutil.rmtree(step)
    step.mkdir()
  elif how == 'no list':
    (step / 'integrity.json').unlink()
  else:
    shutil.rmtree(step / 'params')
  _, found, said = find(run)
  assert found == 3 and 'set aside as 4.damaged' in said and str(step) in said
  assert (run / 'checkpoints' / '4.damaged').is_dir() and checkpoint.all_steps(run / 'checkpoints') == [2, 3]
  if how == 'flipped':
    loop.train(CONFIG, run)
    assert checkpoint.all_steps(run / 'checkpoints') == [2, 3, 4] and 'goes on from step 3' in capsys.readouterr().out
    assert [line['step'] for line in read_metrics(run)] == [1, 2, 3, 4]


def test_older_steps_are_looked_at_too(run):
  os.truncate(max(arrays(run, 2), key=lambda p: p.stat().st_size), 3)
  assert recovery.newest_whole_step(run / 'checkpoints', Keeping(last=3))[0] == 4
  assert (run / 'checkpoints' / '2.damaged').exists()
  shutil.rmtree(run / 'checkpoints' / '3' / 'params')  # as by a kill while it was removed in favour of newer ones
  step, told = recovery.newest_whole_step(run / 'checkpoints', Keeping(last=1))
  assert step == 4 and told == [f'{run}/checkpoints/3: half deleted, the rest is removed now']
  assert not (run / 'checkpoints' / '3').exists()


@pytest.mark.parametrize('lost', ['steps', 'checkpoints', 'record and steps', 'damaged'])
def test_a_run_of_which_nothing_is_left_does_not_start_over(lost, run):
  if lost == 'damaged':
    for step in (2, 3, 4):
      flip(max(arrays(run, step), key=lambda p: p.stat().st_size))
  else:
    shutil.rmtree(run / 'checkpoints')
  if lost == 'steps':
    (run / 'checkpoints').mkdir()
  if lost == 'record and steps':
    (run / record.RUN_FILE).unlink()
  with pytest.raises(ConfigError, match='to start again from step 1, choose another --workdir or move this one away'):
    find(run)
  if lost == 'record and steps':
    (run / record.CONFIG_FILE).unlink()
    with pytest.raises(ConfigError, match='metrics.jsonl: is of a run'):
      find(run)


def test_stopped_before_the_first_save_it_starts_over(run):
  shutil.rmtree(run / 'checkpoints')
  dataclasses.replace(record.read(run), saved=None).write(run)
  assert find(run)[1] == 0


@pytest.mark.parametrize('damage', ['deleted', 'cut', 'of another'])
def test_a_lost_description_is_written_again(damage, run):
  file = run / 'checkpoints' / 'model.json'
  before = json.loads(file.read_text())
  if damage == 'deleted':
    file.unlink()
  elif damage == 'cut':
    os.truncate(file, 100)
  else:
    checkpoint.write_description(file.parent, before | {'conversation': 'vicuna_v1', 'files': {}, 'sha256': None})
  assert 'model.json: missing, damaged or changed; written again' in find(run)[2]
  assert json.loads(file.read_text()) == before
  (run / record.CONFIG_FILE).unlink()  # it is for people alone
  assert find(run)[1:] == (4, '')


def test_without_its_record_a_run_does_not_go_on(run):
  file = run / record.RUN_FILE
  content = json.loads(file.read_text())
  file.write_text(json.dumps(content | {'saved': 3}))
  with pytest.raises(ConfigError, match='run.json: damaged, it does not match its own checksum.*--config.init_from='):
    find(run)
  file.write_text('[' * 100_000)
  with pytest.raises(ConfigError, match='run.json: damaged'):
    find(run)
  file.unlink()
  with pytest.raises(ConfigError, match='run.json: missing; without it nobody knows'):
    find(run)


def test_two_at_once(run):
  with locks.sole_use(run, '--workdir'), pytest.raises(locks.BusyError, match='another process is writing there'):
    loop.train(CONFIG, run)
  assert checkpoint.all_steps(run / 'checkpoints') == [2, 3, 4]


# What a run was started with.


def changed(**changes):
  return dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
  'cfg, message',
  [
    (changed(batch_size=16), 'config.batch_size: .* was started with 8, the config says 16; go on with 8, or start a new run'),
    (changed(steps=3), 'config.steps: .* started with 4, the config says 3; go on with 4, or .*--config.init_from=.*checkpoints'),
    (changed(seed=1), 'config.seed: .*start a new run from its weights: another --workdir'),
    (
      changed(model=dataclasses.replace(MODEL, projector='linear')),
      "config.model.projector: .*'mlp2x_gelu'.*or choose another --workdir",
    ),
  ],
  ids=['batch', 'fewer steps', 'seed', 'model'],
)
def test_every_refusal_ends_with_what_to_do(cfg, message, finished):
  with pytest.raises(ConfigError, match=message):
    find(finished, cfg)


def test_steps_of_a_dense_run_can_be_raised(run, capsys):
  longer = changed(steps=5)
  loop.train(longer, run, profile=range(4, 9))
  out = capsys.readouterr().out
  assert 'steps raised from 4 to 5 at step 4' in out and 'the learning rate follows the schedule of 5 steps' in out
  assert checkpoint.all_steps(run / 'checkpoints') == [3, 4, 5]
  assert record.read(run).history == ('step 4: steps 4 -> 5',)
  (trace,) = (run / 'tensorboard' / 'plugins' / 'profile').rglob('*.xplane.pb')  # of step 5, where the run ended
  assert any(list(plane.lines) for plane in jax.profiler.ProfileData.from_file(str(trace)).planes)
  with pytest.raises(ConfigError, match='config.steps: .* was started with 5, the config says 4'):
    find(run)


def test_weights_to_begin_with_are_refused_once_a_run_has_its_own(run):
  before = (run / record.RUN_FILE).read_bytes()
  with pytest.raises(ConfigError, match='config.init_from: .* was started without, .* would have no effect; leave it empty'):
    loop.train(changed(init_from=str(run / 'checkpoints')), run)
  assert (run / record.RUN_FILE).read_bytes() == before


def test_steps_to_be_traced_are_a_pair():
  assert tracing.read_steps('100:105') == range(100, 106) and tracing.read_steps('7:7') == range(7, 8)
  for text in ('5', '5:', ':5', '0:3', '5:4', 'a:b', '-1:2', '1:2:3'):
    with pytest.raises(ConfigError, match='--profile=.*: expected the first and the last step to be traced, such as 100:105'):
      tracing.read_steps(text)


def test_what_the_config_only_names_is_compared(run):
  started = record.read(run)
  assert started.inputs.keys() == {'tokenizer'}
  known = dataclasses.replace(started, inputs={'samples': '1' * 64, 'pictures': '2' * 64, 'base weights': '3' * 64})
  record.check_same_inputs(CONFIG, known, dict(known.inputs), run)
  named = {'samples': 'the samples in config.data.path', 'pictures': 'the pictures in', 'base weights': 'init_from'}
  for name, words in named.items():
    with pytest.raises(ConfigError, match=f'{words}.*SHA-256 .{{12}}, now ffffffffffff.*put them back, or start a new run'):
      record.check_same_inputs(CONFIG, known, known.inputs | {name: 'f' * 64}, run)
  checkpoint.write_info(run / 'checkpoints', checkpoint.read_info(run / 'checkpoints'), {'tokenizer.model': b'another'})
  assert find(run)[2]  # the description is the run's own again, and the file does not belong to it
  with pytest.raises(CheckpointError, match='tokenizer.model: damaged'):
    checkpoint.read_tokenizer(run / 'checkpoints')


def test_other_code_is_told(run):
  started = record.read(run)
  assert record.changed_code(started, record.code_versions()) == ''
  older = dataclasses.replace(started, code=started.code | {'jax': '0.1'})
  assert 'warning: other code than the run was started with' in record.changed_code(older, started.code)


def test_digest_of_weights_is_of_all_parameters_and_nothing_else(run):
  steps = run / 'checkpoints'
  digests = {step: checkpoint.weights_digest(steps / str(step)) for step in (2, 3, 4)}
  assert len(set(digests.values())) == 3
  assert checkpoint.weights_digest(steps) == digests[4]


def test_digest_of_files_sees_content_names_and_sizes(tmp_path, monkeypatch):
  monkeypatch.setattr(fingerprint, 'WHOLE', 2**18)  # the larger file is read in part
  small, large = tmp_path / 'a', tmp_path / 'b'
  small.write_bytes(b'labels')
  large.write_bytes(bytes(2**20))
  seen = {fingerprint._files([small]), fingerprint._files([large])}
  small.write_bytes(b'Labels')
  seen.add(fingerprint._files([small]))
  large.write_bytes(bytes(2**20 - 1))
  seen.add(fingerprint._files([large]))
  large.write_bytes(bytes(2**20 - 1) + b'x')
  seen.add(fingerprint._files([large]))
  assert len(seen) == 5


# Before the first step.


@pytest.mark.parametrize(
  'llama, vision, name',
  [
    (dict(vocab_size=10**12), {}, 'model.llama: vocab_size, hidden_size'),
    (dict(num_layers=10**9), {}, 'model.llama: num_layers'),
    ({}, dict(num_layers=10**9), 'model.vision: num_layers'),
    ({}, dict(image_size=14 * 10**6), 'model.vision.image_size'),
  ],
  ids=['vocabulary', 'layers', 'tower', 'pictures'],
)
def test_absurd_sizes_are_one_line_by_arithmetic(llama, vision, name, tmp_path):
  model = dataclasses.replace(
    MODEL, llama=dataclasses.replace(MODEL.llama, **llama), vision=dataclasses.replace(MODEL.vision, **vision)
  )
  with pytest.raises(ConfigError, match=f'config..*{name}.* ask for .*per device, which has .*; choose smaller ones'):
    loop.train(changed(model=model), tmp_path)


def test_absurd_batches_are_one_line_too():
  with pytest.raises(ConfigError, match='config.batch_size and '):
    limits.require_room(changed(batch_size=8 * 10**9), sharding.make_mesh(MeshConfig()))


@pytest.mark.parametrize('value, words', [(np.nan, 'not finite'), (-np.inf, 'not finite'), (1e30, '1e+30, which is no weight')])
def test_weights_that_are_none_are_named(value, words):
  params = {'llama': {'head': np.ones((3, 2), np.float32)}, 'projector': {'bias': np.ones(4, np.float32)}}
  limits.check_weights(params, 'base')
  params['projector']['bias'][2] = value
  with pytest.raises(FloatingPointError, match='base: projector/bias holds .*' + re.escape(words)):
    limits.check_weights(params, 'base')


def test_a_dynamic_run_ends_at_the_steps_it_was_started_with(finished):
  """Its temperature would rise again."""
  started = record.read(finished)
  dynamic = [{'start': 0, 'selector': 'all'}, {'start': 1, 'selector': 'dynamic', 'image_keep_rate': 0.5}]
  settings = started.settings | {'stages': dynamic, 'sparsity': started.settings['sparsity'] | {'image_keep_rate': 0.5}}
  settings['model'] = settings['model'] | {'predictor': {'d_model': 16, 'num_heads': 2, 'num_layers': 1, 'mlp_dim': 16}}
  cfg = from_config_dict(TrainConfig, settings | {'steps': 9})
  with pytest.raises(ConfigError, match='config.steps: .*temperature follow from the number of steps'):
    record.check_same_run(cfg, dataclasses.replace(started, settings=settings), finished, 4)
