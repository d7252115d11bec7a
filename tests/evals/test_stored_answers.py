"""Answers of evaluations that were stopped, damaged or made by something else: kept, set aside or named, never mixed."""

import json
import os
import signal
import subprocess
import sys

import pytest
from answer_files import config
from conftest import ROOT

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals import report
from dynllava_jax.evals.store import AnswerStore

pytest_plugins = ('tiny_suite',)


def rows_of(numbers):
  return [{'question_id': i, 'text': f'answer {i}', 'metadata': {'row': i}} for i in numbers]


def test_line_cut_off_by_a_kill_is_dropped_and_the_rest_kept(tmp_path):
  store = AnswerStore(tmp_path, 'own', {'checkpoint': 'a'})
  store.add(rows_of((2, 0)))
  with open(tmp_path / 'own.jsonl', 'a') as file:
    file.write('{"question_id": 1, "te')
  again = AnswerStore(tmp_path, 'own', {'checkpoint': 'a', 'versions': {'jax': 'another'}})
  assert sorted(again.rows) == [0, 2] and again.set_aside is None
  again.add(rows_of((1,)))
  assert [r['question_id'] for r in again.finish()] == [0, 1, 2]
  assert [json.loads(line)['question_id'] for line in (tmp_path / 'own.jsonl').read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize(
  'damage, message', [('not JSON', 'own.jsonl, line 2: not a JSON object'), ('{}', 'own.jsonl, answer 2: lacks metadata.row')]
)
def test_damaged_line_is_named(damage, message, tmp_path):
  AnswerStore(tmp_path, 'own', {'checkpoint_sha256': 'a'}).add(rows_of((0,)))
  with open(tmp_path / 'own.jsonl', 'a') as file:
    file.write(f'{damage}\n')
  with pytest.raises(DataError, match=f'{message}.*; delete the line'):
    AnswerStore(tmp_path, 'own', {'checkpoint_sha256': 'a'})


def test_a_pipe_in_the_place_of_answers_is_one_line(tmp_path):
  AnswerStore(tmp_path, 'own', {'checkpoint_sha256': 'a'}).add(rows_of((0,)))
  (tmp_path / 'own.jsonl').unlink()
  os.mkfifo(tmp_path / 'own.jsonl')
  with pytest.raises(DataError, match='own.jsonl: cannot be read .it is no regular file.; move it away'):
    AnswerStore(tmp_path, 'own', {'checkpoint_sha256': 'a'})


def test_provenance_tells_what_made_which_answers(tmp_path):
  """The same checkpoint by another path goes on, as a part of its own; opening finished answers changes nothing."""
  first = {'checkpoint': 'a', 'checkpoint_sha256': 'x', 'batch_size': 2}
  AnswerStore(tmp_path, 'own', first).add(rows_of((0,)))
  again = AnswerStore(tmp_path, 'own', first | {'checkpoint': './a', 'batch_size': 4})
  assert again.set_aside is None and [r['question_id'] for r in again.finish()] == [0]
  provenance = lambda: json.loads((tmp_path / 'own.provenance.json').read_text())
  assert provenance() == first
  for i in (1, 2):
    again.add(rows_of((i,)))
  assert provenance() == first | {'later_parts': [{'answers_before': 1, 'checkpoint': './a', 'batch_size': 4}]}
  assert sorted(AnswerStore(tmp_path, 'own', first).rows) == [0, 1, 2]


def test_answers_of_another_checkpoint_are_set_aside_not_mixed(tmp_path):
  AnswerStore(tmp_path, 'own', {'checkpoint_sha256': 'a'}).add(rows_of((0,)))
  other = AnswerStore(tmp_path, 'own', {'checkpoint_sha256': 'b'})
  assert other.rows == {} and other.set_aside == tmp_path / 'own.previous-1.jsonl'
  assert json.loads(other.set_aside.read_text())['text'] == 'answer 0'


def test_killed_run_goes_on_without_losing_or_doubling_an_answer(tiny_checkpoint, eval_data, small_machine, tmp_path, monkeypatch):
  """Stopped in the middle of a batch's rows; the second start answers what is missing, and all equals one whole run."""
  cfg, run = config('pope'), lambda out: report.run(cfg, str(tiny_checkpoint), tmp_path / out, eval_data)
  run('whole')
  add, calls = AnswerStore.add, []

  def dying(self, rows):
    calls.append(1)
    if len(calls) == 3:
      with open(self.path, 'a') as file:
        file.write('{"question_id": 10, "prom')  # what a kill leaves of a line
      raise KeyboardInterrupt
    add(self, rows)

  monkeypatch.setattr(AnswerStore, 'add', dying)
  with pytest.raises(KeyboardInterrupt):
    run('killed')
  monkeypatch.setattr(AnswerStore, 'add', add)
  run('killed')
  whole, killed = ((tmp_path / out / 'answers' / 'own.jsonl').read_text() for out in ('whole', 'killed'))
  assert killed == whole and len(whole.splitlines()) == 9


KILLED_AFTER_2_BATCHES = """
import os, runpy, signal, sys
from dynllava_jax.evals.store import AnswerStore
add = AnswerStore.add
def fatal(self, rows):
  add(self, rows)
  if len(self.rows) == 2:
    os.kill(os.getpid(), signal.SIGKILL)
AnswerStore.add = fatal
sys.argv = ['eval.py', *sys.argv[1:]]
runpy.run_path('eval.py', run_name='__main__')
"""


@pytest.mark.slow
def test_command_killed_by_9_goes_on_when_started_again(tiny_checkpoint, eval_data, tmp_path):
  """The real command in a process of its own, killed while it works, then started as a user would."""
  answers = tmp_path / 'answers' / 'own.jsonl'
  options = ('text_lengths=(192,)', 'batch_size=1', 'max_new_tokens=3', 'dtype=float32')
  arguments = ['--config=configs/eval.py:pope', *(f'--config.{o}' for o in options)]
  arguments += [f'--checkpoint={tiny_checkpoint}', f'--data={eval_data}', f'--out={tmp_path}']
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT)}

  def start(*program):
    return subprocess.run([sys.executable, *program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)

  killed = start('-c', KILLED_AFTER_2_BATCHES)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  begun = [json.loads(line) for line in answers.read_text().splitlines()]
  assert len(begun) == 2
  again = start('eval.py')
  assert again.returncode == 0, again.stderr
  rows = [json.loads(line) for line in answers.read_text().splitlines()]
  assert [r['metadata']['row'] for r in rows] == list(range(9))
  assert all(row in rows for row in begun)  # answer ids and all: kept, not made again
