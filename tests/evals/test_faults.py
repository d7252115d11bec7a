"""What goes wrong with evaluations, one test each: the message names the place, and no number comes out."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from answer_files import answers_for, config, folder_of, scored
from conftest import ROOT
from rich.console import Console

from dynllava_jax.config import ConfigError, EvalRun, Stage
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals import check, compare, layout, report, runner, score
from dynllava_jax.evals.benchmarks import suite
from dynllava_jax.evals.benchmarks.base import Question

pytest_plugins = ('tiny_suite',)

PUBLISHED = ROOT.parent / 'shared' / 'evaldata' / 'pope'


def needs_published():
  if not PUBLISHED.is_dir():
    pytest.skip(f'the published POPE answers are not at {PUBLISHED}')


def test_published_pope_answers_give_the_published_score():
  needs_published()
  result = scored('pope', PUBLISHED.parent, PUBLISHED / 'answers_llava-v1.5-13b.jsonl', labels=str(PUBLISHED / 'labels_e3e3926'))
  figures = result['figures']
  assert [round(figures[f'{c}/f1_score'], 2) for c in ('adversarial', 'popular', 'random')] == [84.46, 86.25, 87.14]
  assert round(result['score'], 2) == 85.95 and result['answered'] == '8910/8910'
  assert [round(x, 2) for x in result['interval']] == [84.65, 87.23], 'drawn by image: questions alone would give half of it'


def test_published_pope_answers_are_refused_with_later_labels():
  needs_published()
  answers, labels = PUBLISHED / 'answers_llava-v1.5-13b.jsonl', str(PUBLISHED / 'labels_newer')
  with pytest.raises(DataError) as error:
    scored('pope', PUBLISHED.parent, answers, labels=labels)
  assert '246 questions without a label' in str(error.value) and 'e3e39262c85a6a83f26cf5094022a782cb0df58d' in str(error.value)
  partial = scored('pope', PUBLISHED.parent, answers, partial=True, labels=labels)
  assert partial['answered'] == '8664/8910' and round(partial['score'], 2) == 86.04


def test_missing_question_file_is_named(tmp_path):
  with pytest.raises(DataError, match=r'llava_gqa_testdev_balanced.jsonl: missing; .*--check_data'):
    suite.get('gqa').questions(folder_of('gqa', tmp_path))


def test_missing_answer_file_is_named(eval_data, tmp_path):
  with pytest.raises(DataError, match=r'nowhere.jsonl: no such file'):
    scored('gqa', eval_data, tmp_path / 'nowhere.jsonl')


def test_labels_of_other_questions_are_refused(eval_data, tmp_path):
  for file in (eval_data / 'pope' / 'coco').iterdir():
    (tmp_path / file.name).write_text(file.read_text().replace('dog 1', 'cat 1'))
  answers = answers_for('pope', eval_data, tmp_path / 'a.jsonl')
  with pytest.raises(DataError) as error:
    scored('pope', eval_data, answers, labels=str(tmp_path))
  assert '3 labels without a question' in str(error.value) and '3 questions without a label' in str(error.value)


@pytest.mark.parametrize(
  'name, change, problem',
  [
    ('gqa', lambda rows: rows[1:], '1 questions without an answer, e.g. 20'),
    ('gqa', lambda rows: [*rows, rows[0]], '1 answers given more than once, e.g. 20'),
    ('gqa', lambda rows: [*rows, rows[0] | {'question_id': '77'}], '1 answers to questions that were not asked, e.g. 77'),
    (
      'gqa',
      lambda rows: [r | {'question_id': s['question_id']} for r, s in zip(rows, rows[::-1])],
      '2 answers to another question',
    ),
    ('textvqa', lambda rows: rows[:2], '1 questions without an answer, e.g. 0 is there a dog 2?'),
    ('textvqa', lambda rows: [*rows, rows[2]], '1 answers given more than once'),
    ('mme', lambda rows: rows[:-1], '1 questions without an answer, e.g. code_reasoning 7 Is it blue?'),
    ('seed', lambda rows: rows[:-1], '1 questions without an answer, e.g. 2'),
  ],
)
def test_answers_that_do_not_fit_are_refused_with_counts_and_examples(eval_data, tmp_path, name, change, problem):
  path = answers_for(name, eval_data, tmp_path / 'a.jsonl', change)
  with pytest.raises(DataError) as error:
    scored(name, eval_data, path)
  assert problem in str(error.value) and str(path) in str(error.value) and '--allow_partial' in str(error.value)
  partial = scored(name, eval_data, path, partial=True)
  assert partial['answered'] == f'{partial["n"]}/{partial["total"]}' and partial['problems']


def test_ids_that_repeat_are_no_duplicates(eval_data, tmp_path):
  for name, total in (('textvqa', 3), ('mme', 28), ('seed', 4)):
    assert scored(name, eval_data, answers_for(name, eval_data, tmp_path / 'a.jsonl'))['answered'] == f'{total}/{total}'


def test_order_of_the_answers_does_not_matter(eval_data, tmp_path):
  for name in ('pope', 'mme', 'textvqa', 'scienceqa'):
    there = scored(name, eval_data, answers_for(name, eval_data, tmp_path / 'a.jsonl'))
    back = scored(name, eval_data, answers_for(name, eval_data, tmp_path / 'a.jsonl', lambda rows: rows[::-1]))
    assert there['figures'] == back['figures']


def test_answer_file_without_texts_is_named(eval_data, tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"question_id": 1, "answer": "yes"}\n')
  with pytest.raises(DataError, match='answer 1: lacks text; has question_id, answer'):
    scored('gqa', eval_data, tmp_path / 'a.jsonl')


def test_score_that_is_not_defined_is_no_number(eval_data, tmp_path):
  with pytest.raises(DataError, match='not defined for these answers'):
    scored('pope', eval_data, answers_for('pope', eval_data, tmp_path / 'a.jsonl', text='no'))


def test_undecodable_image_stops_the_run(tiny_checkpoint, eval_data, small_machine, tmp_path):
  data = tmp_path / 'data'
  shutil.copytree(eval_data / 'gqa', data / 'gqa')
  (data / 'gqa/data/images/0.png').write_bytes(b'\x89PNG\r\n\x1a\n cut off')
  with pytest.raises(DataError, match=r'question 20: .*0.png: '):
    report.run(config('gqa'), str(tiny_checkpoint), tmp_path / 'out', data)
  assert not (tmp_path / 'out' / 'results.json').exists()


def test_missing_image_stops_the_run(tiny_checkpoint, eval_data, small_machine, tmp_path):
  data = tmp_path / 'data'
  shutil.copytree(eval_data / 'gqa', data / 'gqa')
  (data / 'gqa/data/images/0.png').unlink()
  with pytest.raises(DataError, match=r'question 20: .*0.png cannot be read'):
    report.run(config('gqa'), str(tiny_checkpoint), tmp_path / 'out', data)


def test_prompt_beyond_the_largest_bucket_is_named(tiny_checkpoint, eval_data, small_machine, tmp_path):
  cfg = config('gqa')
  object.__setattr__(cfg, 'text_lengths', (16,))
  with pytest.raises(DataError, match=r'question 20: \d+ text tokens, the largest of config.text_lengths is 16'):
    report.run(cfg, str(tiny_checkpoint), tmp_path / 'out', eval_data)


def test_labels_of_other_questions_are_refused_before_anything_is_computed(tiny_checkpoint, eval_data, small_machine, tmp_path):
  labels = {'20': {'question': 'Is there a cat 0?', 'answer': 'yes'}, '21': {'question': 'Is there a dog 1?', 'answer': 'no'}}
  (tmp_path / 'labels.json').write_text(json.dumps(labels))
  with pytest.raises(DataError) as error:
    report.run(config('gqa', labels=str(tmp_path / 'labels.json')), str(tiny_checkpoint), tmp_path / 'out', eval_data)
  assert '1 answers to another question' in str(error.value) and '1 answers to questions that were not asked' in str(error.value)
  assert not (tmp_path / 'out').exists()


def scores_of_the_first(count, name, data, path):
  """Figures of a run that is asked the first `count` questions only and answers all of them with yes."""
  benchmark, folder = suite.get(name), folder_of(name, data)
  questions = benchmark.questions(folder)[:count]
  labels = score.scorable(dataclasses.replace(config(name), questions=count), benchmark, folder, questions, Console(quiet=True))
  rows = [{'question_id': q.id, 'prompt': q.prompt, 'text': 'yes'} for q in questions]
  _, scores = compare.scores_of(benchmark, labels, runner.RunResult(rows, path, 0, 0))
  return benchmark, scores['figures']


def test_first_questions_are_scored_as_a_part(eval_data, tmp_path):
  """A cut through a pair of MME leaves its second category without whole pairs; one through SEED's doubled id loses no answer."""
  mme, figures = scores_of_the_first(3, 'mme', eval_data, tmp_path)
  assert figures == {'perception': 50, 'existence': 50}
  assert mme.metric_of(figures).startswith('perception: sum over 10 categories of accuracy + accuracy+, of 2000 (without count, ')
  seed, figures = scores_of_the_first(3, 'seed', eval_data, tmp_path)
  assert figures['accuracy'] == 0 and seed.metric_of(figures) == seed.metric


def test_score_of_a_part_names_the_missing_categories(eval_data, tmp_path):
  answers = answers_for('pope', eval_data, tmp_path / 'a.jsonl', lambda rows: rows[:3])
  assert scored('pope', eval_data, answers, partial=True)['metric'] == f'{suite.get("pope").metric} (without popular, random)'


@pytest.mark.parametrize(
  'name, file, content, message',
  [
    ('gqa', 'llava_gqa_testdev_balanced.jsonl', '{"question_id": 1, "image": null, "text": "Is it?"}', 'row 1: image is None'),
    (
      'scienceqa',
      'llava_test_CQM-A.json',
      '[{"id": "1", "conversations": [{"from": "human", "value": "Is it?"}]}]',
      'conversations has 1 turns',
    ),
    (
      'mmbench',
      'mmbench_dev_20230712.tsv',
      'index\tquestion\timage\tA\nx\tIs it?\tAAAA\tyes\n',
      "index is 'x', expected a whole number",
    ),
    (
      'vqav2_val',
      'v2_OpenEnded_mscoco_val2014_questions.json',
      '{"annotations": []}',
      'questions.json: lacks questions; has annotations',
    ),
    ('mmvet', 'llava-mm-vet.jsonl', '\n', r'mmvet: there is no question in its files \(.*llava-mm-vet.jsonl\)'),
  ],
)
def test_malformed_question_files_are_named(name, file, content, message, tmp_path):
  (tmp_path / file).write_text(content)
  with pytest.raises(DataError, match=message):
    report.run(config(name), 'nowhere', tmp_path / 'out', tmp_path)


def test_missing_submission_input_is_named_before_anything_is_computed(eval_data, tmp_path):
  data = tmp_path / 'data'
  shutil.copytree(eval_data / 'vqav2', data / 'vqav2')
  (data / 'vqav2/llava_vqav2_mscoco_test2015.jsonl').unlink()
  with pytest.raises(DataError, match='llava_vqav2_mscoco_test2015.jsonl: missing'):
    report.run(config('vqav2'), 'nowhere', tmp_path / 'out', data)


def test_results_are_there_if_a_submission_fails(tiny_checkpoint, eval_data, small_machine, tmp_path, monkeypatch):
  def submission(self, folder, rows, name):
    if rows:
      raise OSError('no space left')
    return {}

  monkeypatch.setattr(type(suite.get('gqa')), 'submission', submission)
  with pytest.raises(OSError, match='no space left'):
    report.run(config('gqa'), str(tiny_checkpoint), tmp_path, eval_data)
  assert (tmp_path / 'results.json').exists() and (tmp_path / 'results.md').exists() and (tmp_path / 'results.csv').exists()


def test_check_data_says_what_is_missing_and_where_to_get_it(eval_data, tmp_path, capsys):
  data = tmp_path / 'data [red]'
  shutil.copytree(eval_data / 'gqa', data / 'gqa')
  (data / 'gqa/data/images/1.png').unlink()
  assert check.run(data, config('gqa')) == 1 and check.run(data, config('mme')) == 1
  out = ' '.join(capsys.readouterr().out.split())
  assert '1 missing' in out and '3, expected 12,578' in out and 'llava_mme.jsonl' in out and '0 of 1 benchmarks' in out
  assert '[red]' in out, 'brackets in a path are no markup'


def test_check_data_looks_at_the_labels_of_the_config(eval_data, tmp_path):
  data = tmp_path / 'data'
  shutil.copytree(eval_data / 'pope', data / 'pope')
  (data / 'pope/coco').rename(tmp_path / 'elsewhere')
  states = lambda labels: {what: state for what, state, _ in check.inspect(suite.get('pope'), folder_of('pope', data, labels))}
  assert 'missing' in states('').values() and states('nowhere')['labels: nowhere'] == 'missing'
  found = states(str(tmp_path / 'elsewhere'))
  assert found.pop('9 questions') == '9, expected 8,910' and found['9 labels'] == 'ok' and set(found.values()) == {'ok'}


def test_mme_images_without_labels_are_no_labels(eval_data, tmp_path):
  shutil.copytree(eval_data / 'MME', tmp_path / 'MME')
  for file in (tmp_path / 'MME').rglob('*.txt'):
    file.unlink()
  (row,) = [r for r in check.inspect(suite.get('mme'), folder_of('mme', tmp_path)) if r[0] == 'labels']
  assert row[1].startswith('unreadable: ') and 'existence: has no labels; expected a text file per image' in row[1]
  with pytest.raises(DataError, match='existence: has no labels'):
    report.run(config('mme'), 'nowhere', tmp_path / 'out', tmp_path)


def test_scoring_needs_neither_jax_nor_a_checkpoint(eval_data, tmp_path):
  """The command in a process where jax cannot be imported: one JSON line, or one message."""
  result = without_jax(eval_data, answers_for('pope', eval_data, tmp_path / 'a.jsonl'))
  assert result.returncode == 0, result.stderr
  (line,) = result.stdout.splitlines()
  assert json.loads(line)['answered'] == '9/9'
  result = without_jax(eval_data, answers_for('pope', eval_data, tmp_path / 'a.jsonl', lambda rows: rows[1:]))
  assert result.returncode == 1 and result.stdout == '' and '1 questions without an answer' in result.stderr
  assert result.stderr.startswith('error: ') and 'Traceback' not in result.stderr


def without_jax(data, answers):
  code = (
    'import sys, runpy\n'
    'class NoJax:\n'
    '  def find_spec(self, name, *_):\n'
    '    if name.split(".")[0] in ("jax", "jaxlib", "flax"): raise ImportError("jax was asked for")\n'
    'sys.meta_path.insert(0, NoJax())\n'
    f'sys.argv = ["eval.py", "--config=configs/eval.py:pope", "--answers={answers}", "--data={data}"]\n'
    'runpy.run_path("eval.py", run_name="__main__")'
  )
  return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_unknown_selector_is_named_before_anything_is_computed(tiny_checkpoint, eval_data, tmp_path):
  runs = {
    'dense': EvalRun(stages=(Stage(),)),
    'other': EvalRun(stages=(Stage(), Stage(start=1, selector='fastest', image_keep_rate=0.5))),
  }
  with pytest.raises(ConfigError, match="config.runs.other: selector 'fastest' is unknown; expected one of all, .*dynamic, "):
    report.run(dataclasses.replace(config('gqa'), runs=runs), str(tiny_checkpoint), tmp_path, eval_data)
  assert not list(tmp_path.iterdir())


def test_pictures_are_made_square_as_in_training(tiny_checkpoint, eval_data):
  """A checkpoint trained with `square` sees the middle of a wide picture, not the picture with bars above and below."""
  loaded = layout.load_model('own', EvalRun(), str(tiny_checkpoint))
  wide = np.zeros((28, 56, 3), np.uint8)
  wide[:, 14:42] = 255
  for aspect, whites in (('square', True), ('pad', False)):
    info = dataclasses.replace(loaded.info, image_aspect=aspect)
    rows = layout.Layout(dataclasses.replace(loaded, info=info), [Question('q', ('Is it?',), 'Is it?', wide)], (192,), 0)
    assert (rows.rows([0]).pixels > 200).all() == whites
