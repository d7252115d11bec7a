"""A server that is killed under load and started again: every client has an answer or a clear error, and none waits for ever."""

import json
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip('uvicorn', reason='requirements-serve.txt is not installed')


@pytest.mark.slow
def test_killed_under_load_nobody_hangs_and_the_next_one_answers(tmp_path):
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    port = found.getsockname()[1]
  load = (
    f'--url=http://127.0.0.1:{port}',
    '--clients=8',
    '--seconds=16',
    '--alone=0',
    '--questions=4',
    '--restarts=1',
    '--every=5',
  )
  server = ('--', '--text_lengths=32', '--max_new_tokens=72', '--slots=4', '--also=')
  command = [sys.executable, ROOT / 'benchmarks' / 'serving.py', f'--checkpoint={ROOT / "examples/digits"}', *load, *server]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout[done.stdout.index('{') :])
  together = found['together']
  assert 'hung' not in together['lost'] and together['answered otherwise'] == 0 and together['answered'] > 0
  assert len(found['killed and started again, seconds without a server']) == 1 and sum(together['lost'].values()) > 0
