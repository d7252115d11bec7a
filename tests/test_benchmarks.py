"""The scripts in benchmarks/ start as their first lines say, from any checkout, without an installed package."""

import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / 'benchmarks'
PARTS = {'checkout.py', 'generation.py'}  # of the others
SCRIPTS = sorted(p.name for p in BENCHMARKS.glob('*.py') if p.name not in PARTS)


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS)
def test_a_script_tells_what_it_takes(script, tmp_path):
  env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, BENCHMARKS / script, '--help']
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
  assert 'Traceback' not in done.stderr
  # Those that compile for TPUs take names alone, or tell that libtpu is missing.
  assert '--' in done.stdout or 'error: ' in done.stderr, done.stderr[-500:]
