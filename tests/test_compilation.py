"""The cache of compiled programs: on by default, where and whether the user says, bounded, shared by processes."""

import os
import subprocess
import sys

import jax
import pytest
from conftest import ROOT

from dynllava_jax import compilation, paths

OPTIONS = ('jax_compilation_cache_dir', 'jax_compilation_cache_max_size', 'jax_persistent_cache_min_compile_time_secs')


@pytest.fixture
def keep(monkeypatch, tmp_path):
  """`compilation.keep` as a new process has it, with a cache folder of its own."""
  before = {name: getattr(jax.config, name) for name in OPTIONS}
  monkeypatch.delenv(paths.COMPILED)
  monkeypatch.setenv(paths.CACHE, str(tmp_path / 'cache'))
  yield compilation.keep.__wrapped__
  for name, value in before.items():
    jax.config.update(name, value)
  compilation.compilation_cache.reset_cache()


def test_on_by_default_and_bounded(keep, tmp_path):
  folder = keep()
  assert folder.parent == tmp_path / 'cache' / 'compiled' and folder.is_dir()
  assert jax.config.jax_compilation_cache_dir == str(folder)
  assert jax.config.jax_compilation_cache_max_size == compilation.AT_MOST


def test_the_user_says_where_and_whether(keep, monkeypatch, tmp_path):
  monkeypatch.setenv(paths.COMPILED, 'off')
  assert keep() is None and jax.config.jax_compilation_cache_dir is None
  monkeypatch.setenv(paths.COMPILED, str(tmp_path / 'mine'))
  assert keep().parent == tmp_path / 'mine'


def test_a_cache_set_up_with_jax_is_left_alone(keep, tmp_path):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'own'))
  assert keep() is None and jax.config.jax_compilation_cache_dir == str(tmp_path / 'own')


def test_a_folder_that_cannot_be_written(keep, monkeypatch, tmp_path):
  """Asked for, it is an error; by default there is no cache then."""
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv(paths.CACHE, str(tmp_path / 'file'))
  assert keep() is None
  monkeypatch.setenv(paths.COMPILED, str(tmp_path / 'file'))
  with pytest.raises(
    paths.PathError, match=rf'{paths.COMPILED}=.*file: cannot be written \(Not a directory\); choose another folder'
  ):
    keep()
  monkeypatch.setenv(paths.COMPILED, 'gs://bucket/x')
  with pytest.raises(paths.PathError, match='kept on this machine|needs the package'):
    keep()


def test_what_a_killed_process_left_is_removed(keep):
  folder = keep()
  for name, parts in {'whole': (b'x', b'12345678'), 'half': (b'x', None), 'empty': (b'x', b'')}.items():
    for content, suffix in zip(parts, (compilation.PROGRAM, compilation.USED)):
      if content is not None:
        (folder / f'{name}{suffix}').write_bytes(content)
  keep.__globals__['_remove_unfinished'](folder)
  assert {p.name for p in folder.glob('*-*')} == {'whole-cache', 'whole-atime'}


def test_processes_share_it_and_one_on_a_full_disk_goes_without_a_word(tmp_path):
  code = (
    'from dynllava_jax import compilation; import jax, jax.numpy as jnp, resource, sys\n'
    'compilation.keep(); jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)\n'
    'resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)\n'
    'print(float(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8)))))'
  )

  def start(folder, most=2**30):
    env, pipe = dict(os.environ) | {paths.COMPILED: str(tmp_path / folder)}, subprocess.PIPE
    return subprocess.Popen([sys.executable, '-c', code, str(most)], cwd=ROOT, env=env, stdout=pipe, stderr=pipe)

  processes = [start('shared'), start('shared'), start('full', 100)]
  results = [p.communicate(timeout=120) for p in processes]
  assert [r[0] for r in results] == [b'64.0\n'] * 3 and not any(r[1] for r in results)
  programs = {p.name: p.read_bytes() for p in (tmp_path / 'shared').rglob(f'*{compilation.PROGRAM}')}
  assert any(name.startswith('jit__lambda') for name in programs)
