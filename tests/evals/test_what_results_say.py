"""A result is named after what was seen, and its interval is about the score beside it."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from answer_files import answers_for, config, folder_of, scored
from rich.console import Console

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals import check, compare, report, runner, score
from dynllava_jax.evals.answers import Joined
from dynllava_jax.evals.benchmarks import meteor, mme, suite
from dynllava_jax.evals.benchmarks.base import Gold

pytest_plugins = ('tiny_suite',)


def of_images(counts, benchmark, label, right):
  """Tallies with `counts[c]` images of category c, each right with probability `right`; two questions each, as in MME."""
  rng, pairs = np.random.default_rng(0), []
  for c, count in counts.items():
    for i in range(count):
      text = 'yes' if rng.random() < right else 'no'
      pairs += [(Gold((c, i, k), label(c), cluster=(c, i), unit=(c, i)), {'text': text}) for k in range(2)]
  return score.tally(benchmark, Joined(tuple(pairs), len(pairs), {(c, i): 2 for c, n in counts.items() for i in range(n)}))


@pytest.mark.parametrize('right', [1.0, 0.6])
@pytest.mark.parametrize('few', [2, 5, 40])
def test_an_interval_of_summed_categories_is_about_the_sum(few, right):
  """Draws without one of the ten categories are of another sum: they do not count, and where they are most there is no interval."""
  benchmark = suite.get('mme')
  counts = dict.fromkeys(mme.PERCEPTION, 40) | {'OCR': few}
  tallies = of_images(counts, benchmark, lambda c: (c, 'yes'), right)
  value = score.figures(benchmark, tallies)['perception']
  low, high = score.bootstrap(benchmark, tallies)
  assert low <= value <= high and high - low < 400
  assert (low, high) == (2000, 2000) if right == 1 else low < value < high


def test_no_interval_where_most_draws_lack_a_category(eval_data, tmp_path):
  """One image per category, all right: 2000 of 2000, and nothing to say about how sure that is."""
  benchmark = suite.get('mme')
  golds = benchmark.golds(folder_of('mme', eval_data), None)
  rows = [{'question_id': f'{g.key[0]}/{g.key[1]}.png', 'prompt': g.key[2], 'text': g.label[1]} for g in golds]
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  result = scored('mme', eval_data, tmp_path / 'a.jsonl')
  assert result['score'] == 2000 and result['interval'] == []


def test_an_interval_of_pope_has_all_three_sets():
  """Two images of one set among many of the others; a difference of two runs keeps to the rule."""
  benchmark, pairs = suite.get('pope'), []
  for c, count in (('adversarial', 2), ('popular', 100), ('random', 100)):
    for i in range(count):
      pairs += [(Gold((c, i, k), (c, label), unit=(c, i)), {'text': 'yes'}) for k, label in enumerate(('yes', 'no'))]
  tallies = score.tally(benchmark, Joined(tuple(pairs), len(pairs), {}))
  value = score.figures(benchmark, tallies)['f1']
  low, high = score.bootstrap(benchmark, tallies)
  assert low <= value <= high
  assert score.bootstrap(benchmark, tallies, tallies) == [0, 0]


def test_categories_beside_the_score_cost_no_draws():
  """MME's cognition and the media of SEED are not summed in the score: one image of them is left out of a third of the draws."""
  benchmark = suite.get('mme')
  counts = dict.fromkeys(mme.PERCEPTION, 40)
  alone = of_images(counts, benchmark, lambda c: (c, 'yes'), 0.5)
  beside = of_images(counts | {'code_reasoning': 1}, benchmark, lambda c: (c, 'yes'), 0.5)
  assert score.bootstrap(benchmark, beside) == pytest.approx(score.bootstrap(benchmark, alone), abs=40)
  assert benchmark.metric_of(score.figures(benchmark, alone)) == benchmark.metric, 'perception lacks nothing'


def heading_alone(rows):
  """As the prompts of pictures in which no text was found."""
  return [r | {'prompt': re.sub(r'(Reference OCR token:).*', r'\1 ', r['prompt'])} for r in rows]


def without_ocr(rows):
  return [r | {'prompt': '\n'.join(line for line in r['prompt'].split('\n') if not line.startswith('Reference'))} for r in rows]


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda rows: rows, 'VQA accuracy in %, OCR tokens in the prompt'),
    (heading_alone, 'VQA accuracy in %, no OCR tokens in the prompt'),
    (
      lambda rows: [r | {'prompt': r['prompt'].replace('A, B', ', ;')} for r in rows],
      'VQA accuracy in %, no OCR tokens in the prompt',
    ),
    (without_ocr, 'VQA accuracy in %, no OCR tokens in the prompt'),
    (lambda rows: rows[:1] + without_ocr(rows[1:]), 'VQA accuracy in %, OCR tokens in 1 of 3 prompts'),
  ],
)
def test_textvqa_says_whether_prompts_had_ocr_tokens(change, words, eval_data, tmp_path):
  assert scored('textvqa', eval_data, answers_for('textvqa', eval_data, tmp_path / 'a.jsonl', change))['metric'] == words


def test_seed_says_which_media_were_answered(eval_data, tmp_path):
  data = tmp_path / 'data'
  shutil.copytree(eval_data / 'seed_bench', data / 'seed_bench')
  answers = answers_for('seed', data, tmp_path / 'a.jsonl')
  assert scored('seed', data, answers)['metric'] == 'accuracy in % over images alone'
  file = data / 'seed_bench/SEED-Bench.json'
  file.write_text(file.read_text().replace('"data_type": "image"', '"data_type": "video"', 1))
  assert scored('seed', data, answers)['metric'] == 'accuracy in % over images and videos'


def test_scienceqa_says_if_no_image_was_named(eval_data, tmp_path):
  blind = lambda rows: [r | {'prompt': r['prompt'].replace('<image>\n', '')} for r in rows]
  there, here = (scored('scienceqa', eval_data, answers_for('scienceqa', eval_data, tmp_path / 'a', c)) for c in (list, blind))
  assert there['metric'] == 'accuracy in % on questions with an image'
  assert here['metric'] == there['metric'] + ', asked without naming the image in the prompt'


def test_empty_answers_are_no_answers(eval_data, tmp_path):
  """They are scored as the official scorers do, and counted."""
  for name, given in (('gqa', 1), ('lvis_multi', 1)):
    change = lambda rows: [rows[0] | {'text': rows[0]['text']}, *(r | {'text': ' \n'} for r in rows[1:])]
    if name == 'lvis_multi':
      change = lambda rows: [rows[0] | {'text': ['yes', '']}, rows[1] | {'text': ['', '']}, rows[2] | {'text': ['']}]
    result = scored(name, eval_data, answers_for(name, eval_data, tmp_path / 'a.jsonl', change))
    assert result['n'] == 3 and result['answered'] == f'{given}/3' and '2 answers are empty' in result['notes'][-1]


@pytest.mark.parametrize('name', ['scienceqa', 'gqa', 'pope', 'vizwiz_val', 'mmbench', 'seed', 'vqav2'])
def test_answers_to_other_words_are_joined_by_id_if_asked_for(name, eval_data, tmp_path):
  """Refused by default; with --allow_partial scored as the official scorers do, which look at ids alone, and said so."""
  reworded = lambda rows: [r | {'prompt': f'Q{i}'} for i, r in enumerate(rows)]
  last = lambda rows: rows if name != 'seed' else rows[:2]  # of its doubled id two answers need no words to tell them apart
  plain = answers_for(name, eval_data, tmp_path / 'a.jsonl', last)
  there = scored(name, eval_data, plain, partial=True)
  answers = answers_for(name, eval_data, tmp_path / 'a.jsonl', lambda rows: reworded(last(rows)))
  with pytest.raises(DataError, match='answers to another question'):
    scored(name, eval_data, answers)
  result = scored(name, eval_data, answers, partial=True)
  count = result['problems']['answers whose prompt is worded differently, scored by id']
  assert result['n'] == there['n'] == count and result['score'] == there['score']
  assert name == 'vqav2' or result['metric'].endswith(f'({count} prompts worded differently)')


@pytest.mark.parametrize(
  'text, guess',
  [
    ('A dog. It runs! "Good." He said so, etc. Then it slept. No. 5 e.g. this. The fig. shows approx. two.', False),
    ('It ends with Mr.', False),
    ('He met Mr. Smith.', True),
    ('There are 5. The first', True),
    ('J. Bach', True),
    ('He waits... Then', True),
  ],
)
def test_meteor_goes_by_its_name_only_where_punkt_would_cut_alike(text, guess, monkeypatch):
  """What English Punkt does not know ends a sentence; where it needs more than its abbreviations, the number has another name."""
  monkeypatch.setattr(meteor, 'punkt', lambda: None)
  monkeypatch.setattr(meteor, 'wordnet', lambda: meteor.Synonyms({}))
  benchmark = suite.get('lvis_single')
  tallies = [benchmark.tally([(['a dog'], {'question_id': 1, 'text': t})]) for t in ('a dog', text)]
  sums = {k: sum(t.get(k, 0) for t in tallies) for k in tallies[0] | tallies[1]}
  assert benchmark.headline_of(benchmark.figures(sums)) == ('meteor_without_punkt' if guess else 'meteor')
  assert any('punkt_tab' in remark for remark in benchmark.remarks())
  assert not {'e.g', 'i.e', 'etc', 'no', 'approx', 'fig'} & set(meteor.ABBREVIATIONS)
  monkeypatch.setattr(meteor, 'wordnet', lambda: None)
  figures = benchmark.figures(benchmark.tally([(['a dog'], {'question_id': 1, 'text': text})]))
  assert ('meteor_without_synonyms_and_punkt' if guess else 'meteor_without_synonyms') in figures


@pytest.mark.parametrize(
  'metadata, message',
  [
    ({'perplexity': [float('nan')]}, 'metadata.perplexity is'),
    ({'perplexity': [float('inf')]}, 'metadata.perplexity is'),
    ({'perplexity': [True]}, 'metadata.perplexity is'),
    ({'perplexity': [0.5]}, 'expected at least 1'),
    ({'reference_kept': [9]}, 'expected at least 1, and 0 <= kept <= fed'),
    ({'reference_evicted': 'x'}, "metadata.reference_evicted is 'x', expected a whole number from 0 to 6"),
    ({'kept': '11', 'evicted': None}, 'metadata.evicted is None'),
    ({'kept': '11', 'evicted': 3}, 'metadata.evicted is 3, expected a whole number from 0 to 2'),
  ],
)
def test_numbers_that_are_none_get_no_score(metadata, message):
  read = {'perplexity': [9.0], 'reference_fed': [8], 'reference_kept': [6]} | metadata
  pairs = ((Gold(0, ['a dog']), {'question_id': 0, 'text': 'a dog', 'metadata': read}),)
  with pytest.raises(DataError, match=message):
    score.tally(suite.get('lvis_single'), Joined(pairs, 1, {}))


def test_a_score_that_is_not_finite_is_refused(monkeypatch):
  benchmark = suite.get('gqa')
  tallies = score.tally(benchmark, Joined(((Gold(0, ('open', 'yes')), {'text': 'yes'}),), 1, {}))
  monkeypatch.setattr(type(benchmark), 'figures', lambda self, sums: {'accuracy': float('nan')})
  with pytest.raises(DataError, match='gqa: accuracy is nan'):
    score.figures(benchmark, tallies)


def test_missing_labels_are_reported_once(eval_data, tmp_path):
  for name, file in (('gqa', 'gqa/data/testdev_balanced_questions.json'), ('pope', 'pope/coco/coco_pope_random.json')):
    data = tmp_path / name
    shutil.copytree(eval_data / name, data / name)
    (data / file).unlink()
    rows = check.inspect(suite.get(name), folder_of(name, data))
    assert [state for what, state, _ in rows if 'label' in what].count('missing') == 1
    assert not [row for row in rows if 'unreadable' in row[1]], rows
  rows = check.inspect(suite.get('gqa'), folder_of('gqa', eval_data, labels='nowhere.json'))
  assert [r[1:] for r in rows if 'label' in r[0]] == [('missing', 'config.labels names it; is the path right?')]


def test_questions_that_cannot_be_read_are_reported_beside_missing_images(eval_data, tmp_path):
  shutil.copytree(eval_data / 'gqa', tmp_path / 'gqa')
  shutil.rmtree(tmp_path / 'gqa/data/images')
  (tmp_path / 'gqa/llava_gqa_testdev_balanced.jsonl').write_text('{"question_id": 1}')
  states = [state for _, state, _ in check.inspect(suite.get('gqa'), folder_of('gqa', tmp_path))]
  assert 'missing' in states and any('lacks text' in state for state in states)


def test_a_report_without_scores_does_not_name_a_metric(eval_data, tmp_path):
  """Without labels, and of answers for which the score is not defined."""
  benchmark = suite.get('pope')
  folder = folder_of('pope', eval_data)
  questions = benchmark.questions(folder)
  cfg = dataclasses.replace(config('pope'), questions=len(questions))
  labels = score.scorable(cfg, benchmark, folder, questions, Console(quiet=True))
  results = {}
  for name, text in (('no', 'no'), ('yes', 'yes')):
    rows = [{'question_id': q.id, 'prompt': q.prompt, 'text': text} for q in questions]
    results[name] = runner.RunResult(rows, tmp_path, 0, 0)
  of = lambda names: {n: compare.scores_of(benchmark, labels, results[n])[1] for n in names}
  assert report.metric_of(benchmark, of(['no']), results) == 'not scored'
  assert report.metric_of(benchmark, of(['no', 'yes']), results) == benchmark.metric
  assert report.metric_of(benchmark, {'no': {}}, results) == 'not scored'
