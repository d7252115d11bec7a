"""Evaluation: killed, on full disks, with damaged answers and checkpoints, twice at once."""

import json
import shutil

import fault_programs
import pytest
from fault_driver import GROSS, KINDS, damage_all, files_of, kill_all_along, permissions, refuse, start_twice, starve, undisturbed
from fault_programs import evaluated, rows, tiny_config
from fault_tally import Tally

pytest_plugins = ('fault_fixtures',)
pytestmark = pytest.mark.faults
EVALUATION = Tally('Evaluation')


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  return tiny_config(tmp_path_factory.mktemp('config'))


@pytest.fixture(scope='module')
def checkpoints(nursery, tiny, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('trained') / 'w'
  done = nursery.run(('train.py', f'--config={tiny}:base', f'--workdir={workdir}', '--config.steps=1'))
  assert done.code == 0, done.text
  return workdir / 'checkpoints'


@pytest.fixture(scope='module')
def evaluation(tiny, checkpoints):
  return fault_programs.evaluation(tiny, checkpoints)


@pytest.fixture(scope='module')
def whole(nursery, evaluation, tmp_path_factory):
  folder = tmp_path_factory.mktemp('evaluation')
  return folder / 'whole', undisturbed(nursery, evaluation, folder)[1]


def test_killed_evaluations(nursery, evaluation, whole, tmp_path):
  kill_all_along(nursery, evaluation, EVALUATION, tmp_path, whole, 30, each=6)


def test_damaged_results(nursery, evaluation, whole, tmp_path):
  """Answers have a digest each; what is made of them is made again."""
  files = files_of(whole[0], KINDS, lambda name: None if name.startswith('answers/') else GROSS)
  row = lambda name: ('the provenance' if 'provenance' in name else 'an answer is damaged') if name.startswith('answers/') else None
  arguments = (evaluation.words, evaluated, evaluated(whole[0]))
  damage_all(nursery, EVALUATION, whole[0], tmp_path / 'scratch', files, 30, *arguments, first=('answers/dense.jsonl',), row=row)


def test_a_line_that_is_none(nursery, evaluation, whole, tmp_path):
  broken = shutil.copytree(whole[0], tmp_path / 'broken')
  file = broken / 'answers' / 'dense.jsonl'
  file.write_bytes(b'x' + file.read_bytes())
  said = ('dense.jsonl, line 1', 'not a JSON object', 'delete the line')
  refuse(nursery, EVALUATION, evaluation.words(broken), *said, row='an answer is damaged')


def test_damaged_answers_that_are_scored(nursery, tiny, whole, tmp_path):
  score = lambda folder: ('eval.py', f'--config={tiny}:eval', f'--answers={folder / "dense.jsonl"}', f'--out={folder / "scored"}')
  kept = lambda folder: {k: v for k, v in json.loads(said(folder)).items() if k != 'answers'}
  ended = {}

  def said(folder):
    return ended[folder] if folder in ended else nursery.run(score(folder)).out.splitlines()[-1]

  folder = whole[0] / 'answers'
  expected = kept(folder)
  row, files = lambda name: 'an answer file that is scored', {'dense.jsonl': tuple(KINDS)}
  damage_all(nursery, EVALUATION, folder, tmp_path / 'scratch', files, 15, score, kept, expected, row=row)


def test_damaged_checkpoints(nursery, tiny, checkpoints, whole, tmp_path):
  def command(folder):
    return ('eval.py', f'--config={tiny}:eval', f'--checkpoint={folder}', f'--out={folder.parent / "out"}')

  def answers(folder):
    strip = lambda line: {k: v for k, v in json.loads(line).items() if k not in ('answer_id', 'metadata')}
    return {name: [strip(line) for line in lines] for name, lines in rows(folder).items()}

  files = files_of(checkpoints, KINDS, lambda name: () if 'optimizer' in name else None)  # it is not read
  names = lambda name: (name, 'integrity.json') if name.startswith('1/') else (name,)
  arguments = (command, lambda folder: answers(folder.parent / 'out'), answers(whole[0]), names)
  largest = max(checkpoints.glob('1/params/**/*'), key=lambda p: p.stat().st_size).relative_to(checkpoints).as_posix()
  first, row = ('model.json', '1/integrity.json', largest), lambda name: 'the checkpoint is damaged'
  damage_all(nursery, EVALUATION, checkpoints, tmp_path / 'scratch', files, 10, *arguments, first=first, row=row)


def test_full_disks(nursery, evaluation, whole, tmp_path):
  starve(nursery, evaluation, EVALUATION, tmp_path, evaluated(whole[0]), (0, 3000, 10_000), (60,))


def test_two_at_once(nursery, evaluation, whole, tmp_path):
  start_twice(nursery, evaluation, EVALUATION, tmp_path, evaluated(whole[0]), whole[1].events)


def test_permissions(nursery, evaluation, checkpoints, tmp_path):
  out = tmp_path / 'out'
  out.mkdir()
  with permissions(out, 0o500):
    refuse(nursery, EVALUATION, evaluation.words(out), 'out', 'ermission denied', plain=1)
  for name in ('model.json', '1/integrity.json', '1/params'):
    with permissions(checkpoints / name, 0):
      refuse(nursery, EVALUATION, evaluation.words(tmp_path / 'x'), name, plain=1)


def test_counts():
  EVALUATION.report()


def test_messages():
  EVALUATION.check_messages()
