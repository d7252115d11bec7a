"""What comes from files cannot steer a terminal, forge a line or be taken for markup."""

import io
import subprocess
import sys

import pytest
from conftest import ROOT
from rich.table import Table

from dynllava_jax.display import Terminal, printable

ODD = {
  'red\x1b[31m': 'red\\x1b[31m',
  'back\x08\x7f': 'back\\x08\\x7f',
  'over\rwritten': 'over\\rwritten',
  'two\nlines': 'two\\nlines',
  'csi\x9b2J': 'csi\\x9b2J',
  'right\u202eto left': 'right\\u202eto left',
  'half\ud83d': 'half\\ud83d',
  'unseen\u200b\ufeff': 'unseen\\u200b\\ufeff',
  'par\u2028agraph': 'par\\u2028agraph',
  'tag\U000e0041': 'tag\\U000e0041',
}


@pytest.mark.parametrize('text', ODD)
def test_characters_that_are_no_signs_are_escaped(text):
  assert printable(text) == ODD[text]


@pytest.mark.parametrize('text', ['naïve', 'Москва', '日本語', '🦒', '[bold]', ':dog:', 'ا ب', 'a b'])
def test_ordinary_text_stays(text):
  assert printable(text) == text


def test_messages_may_have_lines():
  assert printable('a\n\x1bb', lines=True) == 'a\n\\x1bb'


def test_a_terminal_prints_text_and_tables_as_they_are():
  out = Terminal(file=io.StringIO(), width=100, force_terminal=True)
  out.print('[bold]x[/bold] :dog: \x1b[2J')
  grid = Table()
  grid.add_column('head\x1b[0m')
  grid.add_row('[red]cell[/red]\x07\x9b')
  out.print(grid)
  printed = out.file.getvalue()
  for text in ('[bold]x[/bold] :dog: \\x1b[2J', 'head\\x1b[0m', '[red]cell[/red]'):
    assert text in printed
  assert '\x1b[2J' not in printed and '\x07' not in printed and '\x9b' not in printed


def test_an_error_message_holds_no_control_character(tmp_path):
  command = [sys.executable, '-m', 'dynllava_jax.data.prepare', '--json=a', '--images=no\u202ewhere', f'--out={tmp_path}']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 1 and done.stderr.startswith('error: --images: no\\u202ewhere is no folder')
