"""Pictures of what is kept: one PNG per question and one HTML file that needs nothing else."""

import base64
import io
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

EXAMPLE = ROOT / 'examples' / 'digits'


def visualize(*arguments, cwd):
  command = [sys.executable, '-m', 'dynllava_jax.visualize', *arguments]
  return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.slow
def test_questions_of_a_benchmark_are_drawn_and_sent_as_one_file(tmp_path, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  sizes = ('--questions=2', '--keep=0.2', '--max_new_tokens=12', '--text_lengths=32', f'--out={tmp_path / "out"}')
  done = visualize(f'--checkpoint={EXAMPLE}', '--benchmark=digits', *sizes, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['001.png', '002.png', 'report.html']
  for i in (1, 2):
    drawn = Image.open(tmp_path / 'out' / f'{i:03d}.png').convert('RGB')
    assert min(drawn.size) > 300 and len(drawn.resize((64, 64)).getcolors(64 * 64)) > 50
  page = (tmp_path / 'out' / 'report.html').read_text()
  assert (
    not re.search(r'(src|href)="(?!data:)', page) and '<script' not in page and 'http' not in re.sub(r'xmlns="[^"]*"', '', page)
  )
  pictures = [Image.open(io.BytesIO(base64.b64decode(p))) for p in re.findall(r'data:image/png;base64,([^"]+)', page)]
  assert len(pictures) >= 2
  for name in ('own', '20%', 'dense'):
    assert name in page


@pytest.mark.parametrize(
  'arguments, message',
  [
    ((), 'error: --checkpoint is missing'),
    ((f'--checkpoint={EXAMPLE}',), 'error: give either --question, or --benchmark'),
    ((f'--checkpoint={EXAMPLE}', '--question=a?', '--benchmark=digits'), 'error: give either --question, or --benchmark'),
    ((f'--checkpoint={EXAMPLE}', '--question=a?', '--keep=0.1,2'), "error: --keep: '2', expected shares above 0 up to 1"),
  ],
)
@pytest.mark.slow
def test_what_cannot_be_drawn_is_one_line(arguments, message, tmp_path, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  done = visualize(*arguments, cwd=tmp_path)
  assert done.returncode == 1 and done.stderr.strip().startswith(message) and done.stderr.count('\n') == 1
