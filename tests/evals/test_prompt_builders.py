"""ScienceQA's prompts in all formats of LLaVA's converter, recorded from it, and files that cannot be converted."""

import itertools
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks import scienceqa_prompts as prompts
from dynllava_jax.evals.benchmarks import suite

RECORDED = json.loads((ROOT / 'tests/evals/recorded/scienceqa_formats.json').read_text())


@pytest.fixture
def release(tmp_path):
  """ScienceQA's own files; returns a function that changes them first."""

  def write(change=lambda problems, splits: None):
    problems, splits = json.loads(json.dumps(RECORDED['problems'])), {'test': list(RECORDED['problems'])}
    change(problems, splits)
    (tmp_path / 'problems.json').write_text(json.dumps(problems))
    (tmp_path / 'pid_splits.json').write_text(json.dumps(splits))
    return tmp_path

  return write


def test_every_format_is_that_of_the_converter(release):
  folder = release()
  for asked, answered in itertools.product(RECORDED['questions'], RECORDED['answers']):
    prompts.main(str(folder), 'test', f'{asked}-{answered}')
    rows = json.loads((folder / f'llava_test_{asked}-{answered}.json').read_text())
    assert [r['conversations'][0]['value'] for r in rows] == RECORDED['questions'][asked]
    assert [r['conversations'][1]['value'] for r in rows] == RECORDED['answers'][answered]
    assert [r.get('image') for r in rows] == RECORDED['images']
  assert set(RECORDED['questions']) == set(prompts.ASKED) and set(RECORDED['answers']) == {*prompts.ANSWERED, prompts.LEPA}


@pytest.mark.parametrize('asked', prompts.ASKED)
def test_prompts_that_leave_the_answer_open(asked):
  for id_, problem in RECORDED['problems'].items():
    assert list(prompts.example(problem, f'{asked}-A', is_test=True)) == RECORDED['open'][asked][id_]


def test_null_and_absent_parts_are_empty(release):
  def change(problems, splits):
    del splits
    del problems['2']['hint'], problems['2']['lecture']
    problems['3'] |= {'hint': None, 'solution': None, 'image': None}

  folder = release(change)
  prompts.main(str(folder), 'test', 'QCM-ALE')
  rows = json.loads((folder / 'llava_test_QCM-ALE.json').read_text())
  assert 'Context: N/A' in rows[1]['conversations'][0]['value'] and rows[2]['conversations'][1]['value'] == 'The answer is E.'


@pytest.mark.parametrize(
  'change, split, form, message',
  [
    (lambda p, s: s['test'].append('77'), 'test', 'QCM-A', 'pid_splits.json: test names problem 77, which .*problems.json lacks'),
    (lambda p, s: None, 'minival', 'QCM-A', 'pid_splits.json: lacks minival'),
    (lambda p, s: None, 'test', 'MQC-A', "'MQC-A': unknown; choose one of CQM"),
    (lambda p, s: None, 'test', 'QCM', "'QCM': unknown"),
    (lambda p, s: p['3'].update(answer=5), 'test', 'QCM-A', 'problem 3: answer is 5, expected the number of one of its 5 choices'),
    (lambda p, s: p['3'].update(answer=-1), 'test', 'QCM-A', 'problem 3: answer is -1'),
    (lambda p, s: p['3']['choices'].append('f'), 'test', 'QCM-A', 'problem 3: choices are .* at most 5'),
    (lambda p, s: p['3'].update(lecture=['x']), 'test', 'QCM-AE', 'problem 3: lecture is .* expected a text'),
    (lambda p, s: p['3'].update(image='../../x.png'), 'test', 'QCM-A', "problem 3: image is '../../x.png'"),
    (lambda p, s: p.update({'3': None}), 'test', 'QCM-A', 'problem 3: expected an object, got null'),
  ],
)
def test_files_that_do_not_fit_are_named(release, change, split, form, message):
  with pytest.raises(DataError, match=message):
    prompts.main(str(release(change)), split, form)


def test_the_program_ends_in_one_line(release):
  folder = release(lambda problems, splits: splits['test'].append('7\x1b[31m7'))
  command = [sys.executable, '-m', 'dynllava_jax.evals.benchmarks.scienceqa_prompts', folder, 'test', 'CQM-A']
  ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert ended.returncode == 1 and ended.stderr.count('\n') == 1 and ended.stderr.startswith('error: ')
  assert '\x1b' not in ended.stderr and r'\x1b' in ended.stderr


@pytest.mark.parametrize(
  'answer, right',
  [
    ('The answer is B.', 'B'),
    ('The answer is B. BECAUSE: Its vitamin is vitamin C.', 'B'),
    ('LECTURE: Plan A. SOLUTION: vitamin C. The answer is B.', 'B'),
    ('C', 'C'),
    ('The answer is DNA', None),
  ],
)
def test_the_right_letter_is_the_answers_not_an_explanations(answer, right, tmp_path):
  turns = [{'from': 'human', 'value': 'Which?'}, {'from': 'gpt', 'value': answer}]
  (tmp_path / 'q.json').write_text(json.dumps([{'id': '1', 'conversations': turns}]))
  scienceqa = suite.get('scienceqa')
  if right is None:
    with pytest.raises(DataError, match='names no letter'):
      scienceqa._rows(tmp_path / 'q.json')
  else:
    assert [row[2] for row in scienceqa._rows(tmp_path / 'q.json')] == [right]
