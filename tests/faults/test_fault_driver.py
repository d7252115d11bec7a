"""That the driver sees what it is there to see, and kill -9 in the middle of each kind of write, without jax."""

import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from fault_driver import KINDS, Done, Program, damage_all, kill_all_along, trials
from fault_tally import FULL, KILLED, LEAST, TWICE, Tally, pattern, table

KILLS = 25  # of each writer
COMMON = (KILLED, TWICE, FULL)
# Writers that go on until they are killed, in forks of a process without jax; what they left is read by the next one.
WRITERS = """
import json, os, pathlib, random, signal, sys, time
from dynllava_jax.evals.store import AnswerStore
from dynllava_jax.files import sweep, write_atomically
from dynllava_jax.training.metrics import MetricsLog, read_metrics, unreadable_lines

assert 'jax' not in sys.modules
root, kills, rng = pathlib.Path(sys.argv[1]), int(sys.argv[2]), random.Random(0)

def whole_files(start):
  for i in range(start, 10**9):
    write_atomically(root / 'file', json.dumps([i] * 20_000).encode())

def answers(start):
  store = AnswerStore(root / 'answers', 'own', {'checkpoint_sha256': 'a'})
  for i in range(len(store.rows), 10**9):
    store.add([{'question_id': i, 'text': 'x' * 2000, 'metadata': {'row': i}}])

def metrics(start):
  log = MetricsLog(root / 'log', start)
  for i in range(start + 1, 10**9):
    log.write(i, {'loss': 1 / i})

def found(writer):
  if writer is whole_files:
    content = json.loads((root / 'file').read_bytes()) if (root / 'file').exists() else [0] * 20_000
    assert len(content) == 20_000 and len(set(content)) == 1
    return content[0]
  if writer is answers:
    rows = AnswerStore(root / 'answers', 'own', {'checkpoint_sha256': 'a'}).rows
    assert sorted(rows) == list(range(len(rows)))
    return len(rows)
  steps = [line['step'] for line in read_metrics(root / 'log')]
  assert steps == list(range(1, len(steps) + 1)) and not unreadable_lines(root / 'log')
  return len(steps)

(root / 'log').mkdir()
for writer in (whole_files, answers, metrics):
  before = 0
  for _ in range(kills):
    pid = os.fork()
    if not pid:
      writer(before)
    time.sleep(rng.uniform(0.002, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    now = found(writer)
    assert now >= before, (writer.__name__, before, now)
    before = now
  assert before, writer.__name__
  sweep(root)
  assert not list(root.glob('.*'))
  print(f'{writer.__name__}: kills {kills}, lost 0, written {before}')
"""


def test_kills_in_the_middle_of_writing(tmp_path):
  command = [sys.executable, '-c', WRITERS, str(tmp_path), str(KILLS)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  print(done.stdout)


class Pretended:
  """Answers in the place of commands."""

  def __init__(self, *answers):
    self.answers = [*answers]

  def run(self, words, **how):
    answer = self.answers.pop(0)
    return answer(words) if callable(answer) else answer


@pytest.mark.parametrize(
  'answer, count',
  [
    (Done(1, err='error: x/a.json: damaged; copy it again'), 'named'),
    (Done(1, err='error: something is wrong'), 'silent'),
    (Done(1, err='Traceback (most recent call last):\n  x\nKeyError: a.json'), 'tracebacks'),
    (Done(1), 'tracebacks'),
    (Done(-11, err='a.json'), 'tracebacks'),
    (Done(-9, err='a.json'), 'tracebacks'),
    (Done('late'), 'tracebacks'),
    (Done(0, out='a.json: set aside'), 'named'),
    (Done(0), 'exact'),
  ],
)
def test_what_a_damaged_file_counts_as(answer, count, tmp_path):
  (tmp_path / 'whole').mkdir()
  (tmp_path / 'whole' / 'a.json').write_text('{}')
  tally = Tally('Training')
  damage_all(Pretended(answer), tally, tmp_path / 'whole', tmp_path / 's', {'a.json': ('cut',)}, 1, str, lambda folder: {}, {})
  assert tally.counts['damaged'] == tally.counts[count] == 1 and bool(tally.wrong) == (count in ('silent', 'tracebacks'))


def test_a_wrong_end_is_silent_and_an_early_one_lost(tmp_path):
  (tmp_path / 'whole').mkdir()
  (tmp_path / 'whole' / 'a.json').write_text('{}')
  tally = Tally('Training')
  damage_all(
    Pretended(Done(0)), tally, tmp_path / 'whole', tmp_path / 's', {'a.json': ('cut',)}, 1, str, lambda folder: {'a': 2}, {'a': 1}
  )
  assert tally.counts['silent'] == 1
  left = [3, 2, 1]
  program = Program(str, lambda folder: {'a': 1}, lambda folder: left.pop())
  whole = tmp_path / 'whole', Done(0, events=5, seconds=1.0)
  kill_all_along(Pretended(Done(-9), Done(-9), Done(0)), program, tally, tmp_path, whole, 2, each=2)
  assert tally.counts['kills'] == 2 and tally.counts['lost'] == 0
  left[:] = [1, 2]
  kill_all_along(Pretended(Done(-9), Done(-9), Done(0)), program, tally, tmp_path, whole, 2, each=2)
  assert tally.counts['lost'] == 1
  with pytest.raises(AssertionError, match='lost: chain 1'):
    tally.report()
  tally.wrong.clear()
  with pytest.raises(AssertionError, match='expected 24 and 75 at least'):
    tally.report()


def test_every_file_and_kind_has_its_turn():
  found = trials({'a': tuple(KINDS), 'b': tuple(KINDS)}, 20, random.Random(0))
  assert len(found) == len(set(found)) == 20 and sum(name == 'a' for name, _ in found) == 10
  few = trials({f'{folder}/{i}': tuple(KINDS) for folder in '345' for i in range(10)}, 15, random.Random(0))
  assert {name[0] for name, _ in few} == {*'345'}, 'the last folder is tried too'


def test_a_whole_run_kills_and_damages_enough():
  assert all(sum(least) >= 200 for least in zip(*LEAST.values()))


def test_messages_of_the_table():
  for program in LEAST:
    rows = table(program)
    assert len(rows) >= 3 and all(rows.values()), f'{program}: a row without a message'
    assert all(any(row.startswith(name) for row in rows) for name in ((KILLED, TWICE) if program == 'Object stores' else COMMON))
  assert re.search(pattern('goes on from step ...'), 'w: goes on from step 3') and not re.search(pattern('a ... b'), 'a  c')


def test_a_message_counts_only_in_a_case_of_its_row():
  tally = Tally('Object stores')
  kills = ('w: goes on from step 3', '12 samples prepared')
  twice = 'another program is writing there (process 3 on host); wait until it has ended, or choose another --workdir'
  cut_off = 'x: its upload was interrupted; start the program that writes it again'
  for text in kills:
    tally.check(Done(0, out=text), 'a kill', row=KILLED)
  tally.check(Done(1, err=f'error: {twice}'), 'the second', row=TWICE)
  tally.check(Done(1, err=f'error: {cut_off}'), 'damage')
  with pytest.raises(AssertionError, match='promises what no test saw: .*an upload of a conversion'):
    tally.check_messages()
  tally.check(Done(1, err=f'error: {cut_off}'), 'an upload', row='an upload of a conversion')
  tally.check_messages()
  tally.check(Done(0), 'a thing', row='a thing nobody tells of')
  with pytest.raises(AssertionError, match='has no row for'):
    tally.check_messages()
