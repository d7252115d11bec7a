"""What a user writes as a path: taken as it is, or refused with one line, in every program and before jax is imported."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from conftest import GOLDEN, ROOT
from PIL import Image

from dynllava_jax import checkpoint, paths
from dynllava_jax.config import ConfigError, DataConfig, from_config_dict
from dynllava_jax.data.store import Store
from dynllava_jax.training import plot
from dynllava_jax.training.metrics import METRICS_FILE

ODD = """a [1] {x} *?%20%d $q$ _'"#&;=,:@!~é日"""
REFUSED = {
  '': 'is empty',
  ' ': 'is empty',
  'gcs://b/x': 'gcs: is not supported',
  'file:///x': 'file: is not supported',
  'GS://b/x': 'GS: is not supported',
  'hdfs:/x': 'hdfs: is not supported',
  'gs:': 'names no bucket',
  'gs:/b/x': 'names no bucket',
  's3:///x': 'names no bucket',
  'gs://b/../x': 'has an empty name',
  's3://b//x': 'has an empty name',
  'a\nb': "holds the character '\\n'",
  'a\x1b[31mb': "holds the character '\\x1b'",
  'a\udc80b': "holds the character '\\udc80'",
  '~nobody-of-this-name/x': 'there is no such user',
  'x' * 201: 'a name in it has 201 bytes',
  'é' * 101: 'a name in it has 202 bytes',
  'abcd/' * 900: 'at most 3800 work here',
}


@pytest.mark.parametrize('text', REFUSED, ids=ascii)
def test_what_cannot_work_is_refused_by_name(text):
  with pytest.raises(paths.PathError, match='^--out: ') as found:
    paths.given(text, '--out')
  assert REFUSED[text] in str(found.value) and '\n' not in str(found.value) and len(str(found.value)) < 250


def test_everything_else_is_taken_as_it_is(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  kept = (ODD, 'a:b/c', './gs:/x', 'C:/x', '-x', '$HOME', 'x' * 200)
  assert [str(paths.given(text, '-')) for text in kept] == [str(pathlib.Path(text)) for text in kept]
  assert [str(paths.given(text, '-')) for text in ('~', '~/a//b/', 'a/~', '/')] == ['/home/me', '/home/me/a/b', 'a/~', '/']


def test_two_dots_are_resolved_as_the_system_does(monkeypatch, tmp_path):
  (tmp_path / 'a' / 'b').mkdir(parents=True)
  (tmp_path / 'link').symlink_to(tmp_path / 'a' / 'b')
  monkeypatch.chdir(tmp_path / 'a')
  for text, place in (('../x', 'x'), ('b/../x/', 'a/x'), ('../link/../x', 'a/x'), ('..', '')):
    assert paths.given(text, '-') == tmp_path / place


def test_a_current_folder_that_is_gone(monkeypatch, tmp_path):
  (tmp_path / 'gone').mkdir()
  monkeypatch.chdir(tmp_path / 'gone')
  (tmp_path / 'gone').rmdir()
  with pytest.raises(paths.PathError, match='--out: x: the current folder was removed'):
    paths.given('x', '--out')
  assert paths.given('/x', '--out') == pathlib.Path('/x')


def test_a_user_without_a_home_and_a_cache_in_a_place_that_cannot_be(monkeypatch):
  monkeypatch.delenv(paths.CACHE, raising=False)
  with monkeypatch.context() as patch:
    patch.setattr(os.path, 'expanduser', lambda path: path)  # what Python makes of `~` where nobody knows the user
    with pytest.raises(paths.PathError, match=f'no home folder; set HOME, or {paths.CACHE}'):
      paths.cache()
    assert paths.named('gs://b/x') == 'gs://b/x'  # messages do not need it
    with pytest.raises(paths.PathError, match='--out: ~/x: this user has no home folder'):
      paths.given('~/x', '--out')
  for text, why in (('gs://b/x', 'kept on this machine|needs the package'), ('a\nb', 'holds the character'), (' ', 'is empty')):
    monkeypatch.setenv(paths.CACHE, text)
    with pytest.raises(paths.PathError, match=f'^{paths.CACHE}: .*({why})'):
      paths.cache()
    assert paths.named('x') == 'x'


def test_fields_of_a_config_are_paths_too(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  data = from_config_dict(DataConfig, {'path': '~/x/', 'images': ''})
  assert (data.path, data.images) == ('/home/me/x', '')
  for field in ('path', 'images', 'tokenizer'):
    with pytest.raises(ConfigError, match=rf'^config.data.{field}: az://b: az: is not supported'):
      from_config_dict(DataConfig, {field: 'az://b'}, 'config.data')


def test_a_missing_package_is_one_line(monkeypatch):
  monkeypatch.setattr(paths.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(paths.PathError, match='--data: s3:// needs the package s3fs; pip install -r requirements-cloud.txt'):
    paths.given('s3://b/x', '--data')


PROGRAMS = {
  'train.py': ('workdir',),
  'eval.py': ('checkpoint', 'data', 'out', 'answers'),
  'convert_weights.py': ('src', 'dst', 'vision', 'base', 'projector', 'inspect', 'verify'),
  'dynllava_jax.data.prepare': ('json', 'images', 'out', 'tokenizer'),
  'dynllava_jax.data.inspect': ('batch', 'out'),
  'dynllava_jax.data.verify': ('path',),
}


@pytest.mark.parametrize('program', PROGRAMS)
def test_path_flags_are_checked_at_the_very_start(program, tmp_path):
  """Without jax at hand."""
  blocked = (
    'import runpy, sys\n'
    'class NoJax:\n'
    '  def find_spec(self, name, *_):\n'
    '    if name.split(".")[0] == "jax": raise RuntimeError("jax was asked for")\n'
    'sys.meta_path.insert(0, NoJax())\n'
    'sys.argv = sys.argv[1:]\n'
    'run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module\n'
    'run(sys.argv[0], run_name="__main__")\n'
  )
  for name in PROGRAMS[program]:
    words = [sys.executable, '-c', blocked, program, f'--{name}=gcs://bucket/x']
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count('\n') == 1, done.stderr
    assert done.stderr.startswith(f'error: --{name}: gcs://bucket/x: gcs: is not supported')
  assert not [p for p in ROOT.iterdir() if p.name.endswith(':')]


@pytest.fixture
def odd(tmp_path):
  folder = tmp_path / ODD
  folder.mkdir()
  return folder


def run(*arguments):
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'XLA_FLAGS': ''}
  done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def test_prepared_data_in_an_odd_place(odd):
  Image.new('RGB', (20, 20)).save(odd / 'p.png')
  turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'A bus.'}]
  (odd / 'mix [1].json').write_text(json.dumps([{'id': 'a', 'image': 'p.png', 'conversations': turns}] * 4))
  out, given = odd / 'out', [f'--json={odd / "mix [1].json"}', f'--images={odd}/', f'--out={odd / "out"}/']
  assert 'samples prepared' in run('-m', 'dynllava_jax.data.prepare', *given, '--shard_samples=2', '--processes=1')
  store = Store(str(out))
  assert len(store) == 4 and store[3].image.size == (20, 20)


def test_conversion_and_export_in_an_odd_place(odd):
  for part in ('checkpoint', 'clip'):
    shutil.copytree(GOLDEN / 'public_b' / part, odd / part)
  converted = run('convert_weights.py', f'--src={odd / "checkpoint"}/', f'--dst={odd / "dst"}/')
  assert 'read back and found equal' in converted and checkpoint.load_params(odd / 'dst' / '0')
  assert 'read back' in run('convert_weights.py', f'--src={odd / "dst"}', f'--dst={odd / "e"}', '--export=dynamic-llava')


def test_curves_of_runs_with_odd_names(odd):
  for name in ('$a$ _b [x]', '_hidden'):
    (odd / name).mkdir()
    (odd / name / METRICS_FILE).write_text('{"step": 1, "loss": 2.0, "ce": 2.0, "tau": 1.0}\n')
  plot.main(str(odd / 'p.png'), str(odd / '$a$ _b [x]'), f'{odd / "_hidden"}/')
  assert Image.open(odd / 'p.png').size[0] > 100
