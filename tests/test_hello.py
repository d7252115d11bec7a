"""The checkpoint that ships with the repository, and the first minute with it."""

import hashlib
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from dynllava_jax import checkpoint

SHIPPED = ROOT / 'examples/digits'


def test_the_shipped_checkpoint_is_whole_small_and_says_where_it_is_from():
  listed = dict(line.split('  ')[::-1] for line in (SHIPPED / 'SHA256SUMS').read_text().splitlines())
  files = {str(p.relative_to(SHIPPED)): p for p in SHIPPED.rglob('*') if p.is_file() and p.name != 'SHA256SUMS'}
  assert listed == {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}
  assert sum(p.stat().st_size for p in files.values()) < 3_000_000
  made = json.loads((SHIPPED / 'made.json').read_text())
  assert made['weights_sha256'] == checkpoint.weights_digest(SHIPPED) and len(made['commit']) == 40 and made['made_by']
  assert {str(p.dtype) for p in checkpoint.stored_params(SHIPPED).values()} == {'bfloat16'}


@pytest.mark.slow
def test_hello_answers_and_leaves_pictures(tmp_path):
  command = [sys.executable, '-m', 'dynllava_jax.hello', f'--out={tmp_path}']
  shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
  assert 'How many digits are' in shown and 'truth' in shown and '49' in shown and 'tokens.png' in shown
  assert {p.name for p in tmp_path.iterdir()} == {'scene.png', 'tokens.png'}
