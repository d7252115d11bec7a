"""The installable package: what it needs agrees with what is pinned, and it holds all that its programs read."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
EXTRAS = {k: [Requirement(r) for r in v] for k, v in PROJECT['optional-dependencies'].items()}


def pinned(*names: str) -> dict[str, str]:
  text = ''.join((ROOT / name).read_text() for name in names)
  lines = re.findall(r'^([\w.-]+)(?:\[\w+\])?==([\w.]+)$', text, re.M)
  return {canonicalize_name(k): v for k, v in lines}


@pytest.mark.parametrize(
  'files, asked',
  [
    (['requirements.txt'], [Requirement(r) for r in PROJECT['dependencies']]),
    (['requirements-cloud.txt'], EXTRAS['cloud']),
    (['requirements-serve.txt'], EXTRAS['serve']),
    (['requirements-dev.txt', 'requirements-torch.txt'], [r for r in EXTRAS['dev'] if r.name != PROJECT['name']]),
  ],
)
def test_what_is_pinned_is_what_the_package_asks_for(files, asked):
  pins = pinned(*files)
  assert {canonicalize_name(r.name) for r in asked} == set(pins)
  assert [str(r) for r in asked if pins[canonicalize_name(r.name)] not in r.specifier] == []


def test_supported_versions_are_said_once_and_alike():
  assert PROJECT['requires-python'] == '>=3.11,<3.14' and 'Python 3.11 to 3.13' in (ROOT / 'README.md').read_text()
  jax = next(Requirement(r) for r in PROJECT['dependencies'] if r.startswith('jax'))
  for extra in ('tpu', 'cuda'):
    (same,) = EXTRAS[extra]
    assert same.specifier == jax.specifier and same.extras
  assert 'jax 0.10 to 0.12' in (ROOT / 'README.md').read_text()
  assert not any('torch' in r for r in PROJECT['dependencies'])  # nothing but the extra brings it


def test_configs_and_examples_are_found_from_any_folder(tmp_path):
  script = 'from dynllava_jax import paths; print(paths.shipped("configs/llava.py"), paths.shipped("configs/absent.py"))'
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  found = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout
  assert found.split() == [str(ROOT / 'configs/llava.py'), 'configs/absent.py']
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs/llava.py').touch()  # one's own goes first
  found = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout
  assert found.split()[0] == 'configs/llava.py'


@pytest.mark.slow
def test_the_installed_package_runs_all_three_programs(tmp_path):
  """Installed alone into an empty folder that is put in front of the libraries at hand; run far from the checkout."""
  pytest.importorskip('hatchling')
  site, away = tmp_path / 'site', tmp_path / 'away'
  away.mkdir()
  pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-build-isolation', '--target', str(site), str(ROOT)]
  subprocess.run(pip, check=True, cwd=away)
  env = os.environ | {'PYTHONPATH': str(site), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}

  def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', f'dynllava_jax.{module}', *arguments]
    return subprocess.run(command, cwd=away, env=env, capture_output=True, text=True)

  shipped = site / 'dynllava_jax' / 'examples' / 'digits'
  seen = run('convert_weights', f'--inspect={shipped}')
  assert seen.returncode == 0 and 'parameters' in seen.stdout, seen.stderr
  wrong = run('train', '--config=configs/digits.py:base', '--workdir=run', '--config.batch_size=7', '--config.mesh.fsdp=3')
  assert 'config.mesh' in wrong.stderr and wrong.returncode == 1 and len(wrong.stderr.splitlines()) == 1
  answers = ('--config=configs/digits.py:eval', '--config.questions=4', f'--checkpoint={shipped}', '--out=out')
  done = run('eval', *answers)
  assert done.returncode == 0, done.stderr
  assert json.loads(pathlib.Path(away, 'out', 'results.json').read_text())
