"""The three root scripts: mistakes are one readable line and exit status 1, never a traceback."""

import json
import os
import resource
import subprocess
import sys
import time
import types

import pytest
import tensorstore
from absl import flags
from conftest import GOLDEN, ROOT
from ml_collections import config_flags

from dynllava_jax import arguments, command_line

DIGITS = '--config=configs/digits.py'


def run(*arguments, devices=8):
  flags = {'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  env = os.environ | {'JAX_PLATFORMS': 'cpu'} | flags
  return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
  'arguments, message',
  [
    ((f'{DIGITS}:base', '--config.bach_size=3'), '--config.bach_size: unknown key; did you mean --config.batch_size?'),
    ((f'{DIGITS}:base', '--config.optimizer.clip_norm=0.5'), '--config.optimizer.clip_norm: the config file does not list it'),
    ((f'{DIGITS}:base', '--config.batch_size=many'), 'batch_size'),
    ((f'{DIGITS}:base', '--config.batch_size=9'), 'config.batch_size: 9 does not divide over data x fsdp = 8 devices'),
    ((f'{DIGITS}:dynamic', '--config.stages[1].image_keep_rate=1.5'), 'image_keep_rate is 1.5'),
    ((f'{DIGITS}:dynamic', '--config.stages[1].start=40'), 'starts at layer 40'),
    ((f'{DIGITS}:dynamic', '--config.init_from=nowhere'), 'nowhere: no checkpoint here'),
    ((f'{DIGITS}:base', '--config.mesh.fsdp=3', '--config.dtype=bfloat16'), 'does not fit 8 devices'),
    ((f'{DIGITS}:nothing',), "has no 'nothing'; expected one of base, dynamic"),
    (('--config=configs/absent.py',), 'absent.py'),
    ((f'{DIGITS}:base', '--multihost'), '--multihost: '),
    ((f'{DIGITS}:base', '--confg=3'), 'confg'),
  ],
)
def test_train_mistakes(arguments, message, tmp_path):
  result = run('train.py', f'--workdir={tmp_path / "run"}', *arguments)
  assert result.returncode == 1, result.stderr
  lines = result.stderr.strip().splitlines()
  assert message in lines[-1] and lines[-1].startswith('error: '), result.stderr
  assert 'Traceback' not in result.stderr


def test_stray_words_are_refused():
  result = run('convert_weights.py', '--src=a', 'true', '--dst=b', devices=1)
  assert result.returncode == 1 and "'true': unexpected" in result.stderr


@pytest.mark.parametrize(
  'arguments, message',
  [
    (
      ('--export=llava', '--add_predictors', '--verify=x.npz', '--base=b'),
      '--base, --add_predictors, --verify: no use with --export',
    ),
    (('--drop_predictors',), '--drop_predictors: no use without --export'),
    (('--inspect=a',), '--src, --dst: no use with --inspect'),
    (('--seed=3',), '--seed: no use without --projector=new or --add_predictors'),
    ((f'--seed={2**63}',), 'seed'),
  ],
)
def test_conversion_flags_without_effect_are_refused(arguments, message):
  result = run('convert_weights.py', '--src=a', '--dst=b', *arguments, devices=1)
  assert result.returncode == 1 and message in result.stderr and 'Traceback' not in result.stderr


def test_eval_names_a_missing_checkpoint(tmp_path):
  result = run('eval.py', f'{DIGITS}:eval', f'--checkpoint={tmp_path}')
  assert result.returncode == 1 and 'no checkpoint here' in result.stderr and 'Traceback' not in result.stderr


def test_convert_reports_what_it_did(tmp_path):
  """The whole command on the safetensors case; `convert/test_parity.py` runs it with --verify."""
  source = GOLDEN / 'public_b'
  result = run('convert_weights.py', f'--src={source / "checkpoint"}', f'--dst={tmp_path / "out"}', devices=1)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.strip().splitlines()
  assert lines[0] == 'layout: Dynamic-LLaVA (the authors)' and lines[-1].startswith('read back and found equal')
  mapped = {t['source']: t for t in json.loads((tmp_path / 'out' / 'conversion.json').read_text())['tensors']}
  assert mapped['model.norm.weight']['target'] == 'llama/norm/scale' and mapped['model.norm.weight']['shape'] == [80]
  again = run('convert_weights.py', f'--src={source / "checkpoint"}', f'--dst={tmp_path / "out"}')
  assert again.returncode == 1 and 'exists and is not empty' in again.stderr


@pytest.mark.parametrize(
  'content, message',
  [
    (None, 'No such file or directory; for example configs/digits.py:base'),
    (b'\0\1', 'no Python (source code string cannot contain null bytes)'),
    (b'def get_config(:', ', line 1: no Python (invalid syntax)'),
    ('\ufeffx = "\ud7ff'.encode(), 'no Python'),
    (b'{"model": 3}', 'has no function get_config'),
    (b'', 'has no function get_config'),
    (b' ' * (2**20 + 1), 'at most 1,048,576 are read'),
    (b'def get_config(x=0):\n  return unknown', ', line 2: NameError: '),
    (b'import none_such\ndef get_config(): pass', ', line 1: ModuleNotFoundError: '),
    (b'def get_config(x=0):\n  return {}["model"]', ", line 2: KeyError: 'model'"),
  ],
)
def test_what_is_no_config_file_is_one_line(content, message, tmp_path, capsys):
  path = tmp_path / 'mine.py'
  if content is not None:
    path.write_bytes(content)
  assert message in refusal(f'--config={path}:base', capsys)


def refusal(argument, capsys):
  """What the command line says to a config, in this process."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, '', flag_values=values)
  with pytest.raises(SystemExit) as caught:
    command_line.parsed(['train.py', argument], values)
  assert not capsys.readouterr().err
  return caught.value.code


@pytest.mark.parametrize('path', ['/dev/zero', '/dev/null', '/', '/proc/self/mem', 'x/' * 2000, '', 'gs://bucket/config.py'])
def test_a_config_file_is_a_file_that_ends(path, capsys):
  message = refusal(f'--config={path}', capsys)
  assert message.startswith('error: --config') and len(message) < 300


def test_a_pipe_in_the_place_of_a_config_is_not_waited_for(tmp_path, capsys):
  os.mkfifo(tmp_path / 'pipe')
  assert 'it is no regular file' in refusal(f'--config={tmp_path / "pipe"}', capsys)


def test_what_generation_refuses_is_for_the_user_to_mend():
  with (
    pytest.raises(SystemExit, match='^error: max_new_tokens: 1000000000000, expected an integer from 1 to 9$'),
    command_line.readable_errors(),
  ):
    arguments.integer('max_new_tokens', 10**12, 1, 9)


@pytest.mark.parametrize('text', ['[', '[' * 10**5, '[{"start": 1e}]'])
def test_stages_that_are_no_json(text):
  flag = types.SimpleNamespace(name='stages', value=text)
  with pytest.raises(command_line.ConfigError, match='^--stages: not JSON .*; for example'):
    command_line.stages(flag)


def test_a_message_of_any_length_is_told_in_short():
  with pytest.raises(SystemExit) as ended, command_line.readable_errors():
    raise command_line.ConfigError(f'--rules: {"[" * 10**5}, expected NAME=NUMBER\nsecond line')
  first, second = ended.value.code.split('\n')
  assert (
    len(first) < 3100
    and first.startswith('error: --rules: [[')
    and first.endswith('expected NAME=NUMBER')
    and second == 'second line'
  )


def test_a_value_of_any_length_is_told_in_short():
  values = flags.FlagValues()
  flags.DEFINE_integer('steps', 1, '', flag_values=values)
  with pytest.raises(SystemExit) as caught:
    command_line.parsed(['train.py', '--steps=' + 'a' * 3000], values)
  assert len(caught.value.code) < 700 and 'flag --steps=aaa' in caught.value.code


def test_configs_that_ship_are_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for given in (['--config=configs/digits.py:base'], ['--config', 'configs/digits.py:dynamic']):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', None, '', flag_values=values)
    assert command_line.parsed(['train.py', *given], values) == ['train.py'] and values.config.batch_size == 16


@pytest.mark.parametrize('words, shown', [('Event loop is closed', False), ('something else', True)])
def test_a_write_that_ends_after_the_failure_is_not_told_of(words, shown, capfd):
  """As tensorstore tells of a callback that fails: no code can catch it."""

  def failing(_):
    raise RuntimeError(words)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'unraisablehook', command_line._unraisable)
    promise, future = tensorstore.Promise.new()
    future.add_done_callback(failing)
    promise.set_result(1)
    time.sleep(0.1)
  assert (words in capfd.readouterr().err) == shown


def test_what_is_null_in_a_config_file_is_set_there(tmp_path, monkeypatch):
  (tmp_path / 'mine.py').write_text(
    'from ml_collections import ConfigDict\ndef get_config(x=0):\n  return ConfigDict(dict(model=dict(packer=None)))'
  )
  values, argv = flags.FlagValues(), ['train.py', f'--config={tmp_path / "mine.py"}', '--config.model.packer=True']
  monkeypatch.setattr(sys, 'argv', argv)  # where ml_collections looks for overrides
  config_flags.DEFINE_config_file('config', None, '', flag_values=values)
  with pytest.raises(SystemExit) as caught:
    command_line.parsed(argv, values)
  assert caught.value.code == (
    'error: --config.model.packer: is null in the config file, and no flag replaces that; set it in the file'
  )


def test_keys_of_clients_in_a_file_of_another_kind(tmp_path):
  """Each is refused before jax starts: one that never ends, no text, a folder, none in it."""
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'binary').write_bytes(bytes(range(256)))
  (tmp_path / 'empty').write_text('\n')
  expected = {
    'pipe': 'no regular file',
    'binary': 'it is no text',
    '.': 'no regular file',
    'empty': 'holds no key',
    'none': 'No such',
  }
  words = [sys.executable, '-m', 'dynllava_jax.serve', '--checkpoint=x']
  started = [subprocess.Popen([*words, f'--api_keys={tmp_path / n}'], cwd=ROOT, stderr=-1, text=True) for n in expected]
  for process, why in zip(started, expected.values()):
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and err.count('\n') == 1 and err.startswith('error: --api_keys=') and why in err, err


def test_what_is_printed_arrives_or_one_line_says_why(tmp_path):
  """In an encoding without the letters, onto a full disk, to a reader that has seen enough, to nobody; at the end or at once."""
  read, broken = os.pipe()
  os.close(read)
  full = os.open(tmp_path / 'full', os.O_WRONLY | os.O_CREAT)
  nothing = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
  cases = [
    (subprocess.PIPE, {'PYTHONIOENCODING': 'ascii'}, None, (0, r'\xe9', '')),
    (full, {}, nothing, (1, None, 'File too large')),
    (broken, {}, None, (1, None, '')),
    (subprocess.PIPE, {}, lambda: os.close(1), (0, '', '')),
  ]
  for count in (1, 10**5):
    code = f'from dynllava_jax import command_line\nwith command_line.readable_errors():\n  print("é" * {count})'
    words, pipe = [sys.executable, '-c', code], subprocess.PIPE
    started = [
      subprocess.Popen(words, cwd=ROOT, env=os.environ | env, stdout=out, stderr=pipe, text=True, preexec_fn=first)
      for out, env, first, _ in cases
    ]
    for process, (*_, expected) in zip(started, cases):
      out, err = process.communicate(timeout=60)
      assert (process.returncode, out and out.strip()[:4]) == expected[:2] and expected[2] in err, err
      assert err.count('\n') == err.startswith('error: ') == bool(expected[2]), err
  os.close(broken)
  os.close(full)
