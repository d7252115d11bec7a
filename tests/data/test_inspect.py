"""`data.inspect` shows what the model gets, no more and no less."""

import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from configs import digits
from dynllava_jax.config import IGNORE, TrainConfig, from_config_dict
from dynllava_jax.data import inspect

CONFIG = from_config_dict(TrainConfig, digits.get_config('base'))
PATCHES = CONFIG.model.vision.num_patches


@pytest.mark.parametrize('text', ['README.md', 'docs/data.md', 'dynllava_jax/data/inspect.py'])
def test_the_documented_command_says_where_the_tokenizer_comes_from(text):
  """`configs/llava.py` names none."""
  (command,) = re.findall(r'^python -m dynllava_jax\.data\.inspect .*', (ROOT / text).read_text(), re.MULTILINE)
  assert '--config=configs/llava.py:finetune' in command and '--config.init_from=checkpoints/llava-7b' in command


def test_spans_cover_the_row_and_tell_supervised_from_prompt():
  sample, row, tokenizer = inspect.look(CONFIG, 3)
  spans = inspect.spans(row, PATCHES)
  assert spans[0][1] == 0 and spans[-1][2] == row.tokens.size and all(a[2] == b[1] for a, b in itertools.pairwise(spans))
  assert [(end - start) for kind, start, end in spans if kind == 'image'] == [PATCHES]
  answers = [t['value'] for t in sample.conversations if t['from'] == 'gpt']
  shown = [''.join(tokenizer.piece(t) for t in row.tokens[a:b]) for kind, a, b in spans if kind == 'supervised']
  assert len(shown) == len(answers)
  for text, answer in zip(shown, answers):
    assert answer in text.replace('▁', ' ')
  head, text, ids = inspect.describe(sample, row, tokenizer, PATCHES)
  assert f'{int((row.labels != IGNORE).sum())} supervised' in head.plain and f'<image: positions {row.image_start} to' in text.plain
  green = ''.join(text.plain[s.start : s.end] for s in text.spans if s.style == inspect.SUPERVISED)
  assert green == ''.join(shown) and len(ids.plain.split()) > row.length - PATCHES


def test_command_line_saves_the_picture_under_any_name(tmp_path):
  command = [sys.executable, '-m', 'dynllava_jax.data.inspect', '--config=configs/digits.py:base', '--index=3']
  path = tmp_path / 'new[' / 'x]' / 'picture'
  done = subprocess.run([*command, f'--out={path}'], cwd=ROOT, capture_output=True, text=True, env=os.environ)
  assert done.returncode == 0, done.stderr
  pixels = np.asarray(Image.open(path))
  np.testing.assert_array_equal(pixels, inspect.look(CONFIG, 3)[1].pixels)
  assert 'sample ' in done.stdout and f'the picture as the model gets it: {path}' in done.stdout
  done = subprocess.run([*command[:-1], '--index=-1'], cwd=ROOT, capture_output=True, text=True, env=os.environ)
  assert done.returncode == 1 and done.stderr.startswith('error: --index: -1, the source has samples 0 to')
