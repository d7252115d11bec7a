"""Every recorded row of the official scorers (tests/golden/text/scorers.json)."""

import json

import numpy as np
import pytest
from conftest import GOLDEN

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals import hosts, score
from dynllava_jax.evals.benchmarks import gqa, meteor, pope, scienceqa, scienceqa_prompts, suite, vqa_text
from dynllava_jax.evals.benchmarks.base import added
from dynllava_jax.evals.benchmarks.perplexity import mean_perplexity, perplexity
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.hosts import share

RECORDED = json.loads((GOLDEN / 'text' / 'scorers.json').read_text())


def write_lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join((r if isinstance(r, str) else json.dumps(r)) + '\n' for r in rows))
  return path


def scored(name, data, answers, **options):
  benchmark = suite.get(name)
  return score.score_file(benchmark, Folder(data, benchmark.folders), answers, options.get('allow_partial', False))


def submitted(name, data, answers, **options):
  """The one submission file of a benchmark."""
  benchmark = suite.get(name)
  folder = Folder(data, benchmark.folders)
  (path,) = score.write_submission(benchmark, folder, answers, data / 'out', 'me', options.get('allow_partial', False))
  return json.loads(open(path).read())


def test_answer_processor():
  for row in RECORDED['answer_processor']:
    words = vqa_text.strip_words(row['input'])
    assert words == row['after_word_tokenize'], row
    assert vqa_text.strip_punctuation(words.replace('\n', ' ').replace('\t', ' ').strip()) == row['after_punctuation'], row
    assert vqa_text.normalize(row['input']) == row['output'], row


def test_textvqa_rows():
  rows = RECORDED['textvqa']['rows']
  scores = [vqa_text.accuracy(r['pred_answer'], r['gt_answers']) for r in rows]
  assert [r['score'] for r in rows] == scores
  assert [r['unique_answer_scores'] for r in rows] == [vqa_text.soft_scores(r['gt_answers']) for r in rows]
  assert added(scores) / len(scores) == RECORDED['textvqa']['accuracy']
  named = [vqa_text.normalize(r['pred_answer']) in map(vqa_text.normalize, r['gt_answers']) for r in rows]
  assert sum(named) / len(named) == RECORDED['textvqa']['stvqa_accuracy']


@pytest.mark.parametrize('case', RECORDED['textvqa']['errors'], ids=lambda c: str(c['n_gt']))
def test_textvqa_needs_ten_annotators(case):
  with pytest.raises(ValueError, match=f'expected 10 annotators, found {case["n_gt"]}'):
    vqa_text.accuracy('a', ['a'] * case['n_gt'])


@pytest.mark.parametrize('case', RECORDED['textvqa_prompt_processor'], ids=lambda c: c['prompt'][:20])
def test_textvqa_prompts(case):
  from dynllava_jax.evals.benchmarks.textvqa import question_of

  if 'exception' in case:
    with pytest.raises(ValueError, match='expected the question'):
      question_of(case['prompt'])
  else:
    assert question_of(case['prompt']) == case['question']


def test_textvqa_script(tmp_path):
  case = RECORDED['textvqa_script']
  (tmp_path / 'TextVQA_0.5.1_val.json').write_text(json.dumps(case['annotations']))
  result = scored('textvqa', tmp_path, write_lines(tmp_path / 'r.jsonl', case['results']))
  assert f'Samples: {result["n"]}\nAccuracy: {result["score"]:.2f}%' in case['run']['stdout']


@pytest.mark.parametrize('case', RECORDED['pope'])
def test_pope(case):
  assert [pope.parse(t) for t in case['texts']] == case['parsed']
  counts = pope.counts(case['texts'], case['labels'])
  if 'exception' in case:
    with pytest.raises(ZeroDivisionError):
      pope.rates(counts)
    return
  assert {k: case[k] for k in counts} == counts
  rates = pope.rates(counts)
  if len(case['texts']) > len(case['labels']):  # the ratio alone counts texts without a label, which joining by key refuses
    rates['yes_ratio'] = case['parsed'].count('yes') / len(case['texts'])
  assert rates == pytest.approx({k: case[k] for k in rates}, abs=1e-12)


@pytest.mark.parametrize('case', RECORDED['science_qa'], ids=lambda c: str(len(c['problems'])))
def test_scienceqa(case):
  """The official script counts a missing prediction as wrong and leaves it out of the image questions."""
  benchmark = suite.get('scienceqa')
  predictions = {p['question_id']: p for p in case['predictions']}
  sums = {}
  for id_, problem in case['problems'].items():
    given = predictions.get(id_, {'text': scienceqa.FAILED, 'prompt': 'Unknown'})
    kind = 'image' if '<image>' in given['prompt'] else 'text'
    for k, v in benchmark.tally([(([kind], scienceqa.OPTIONS[problem['answer']]), given['text'])]).items():
      sums[k] = sums.get(k, 0) + v
  figures = benchmark.figures(sums)
  for script in ('llava', 'dynamic_llava'):
    run = case[script]
    if 'exception' in run:
      assert run['exception'] == 'ZeroDivisionError' and benchmark.headline not in figures
      continue
    expected = f'Total: {sums["n"]}, Correct: {sums["correct"]:.0f}, Accuracy: {figures["accuracy"]:.2f}%'
    assert run['stdout'] == f'{expected}, IMG-Accuracy: {figures["image"]:.2f}%\n'
    rows = run['outputs']['output']['correct'] + run['outputs']['output']['incorrect']
    assert len(rows) == len(case['problems'])
    for row in rows:
      letter, choices = scienceqa.parse(row['pred']), case['problems'][row['question_id']]['choices']
      assert letter == row['parsed_ans'], row
      assert scienceqa.choice(letter, len(choices)) == run['outputs']['result']['results'][row['question_id']]


@pytest.mark.parametrize('case', RECORDED['science_qa_prompts'], ids=lambda c: f'{c["format"]}-{c["is_test"]}')
def test_scienceqa_prompts(case):
  for id_, problem in case['problems'].items():
    assert list(scienceqa_prompts.example(problem, case['format'], case['is_test'])) == case['examples'][id_]


def test_gqa():
  case = RECORDED['gqa']
  assert [gqa.prediction(r['text']) for r in case['rows']] == [r['prediction'] for r in case['run']['outputs']['out']]


def test_gqa_submission(tmp_path):
  case = RECORDED['gqa']
  labels = {str(r['question_id']): {'question': '', 'answer': 'yes'} for r in case['rows']}
  (tmp_path / 'testdev_balanced_questions.json').write_text(json.dumps(labels))
  answers = write_lines(tmp_path / 'a.jsonl', case['rows'])
  assert submitted('gqa', tmp_path, answers) == case['run']['outputs']['out']


def test_vqav2_submission(tmp_path):
  """Its result file has a line that is no JSON, a duplicate and missing questions: refused, and reproduced if asked for."""
  case = RECORDED['vqav2']
  for file in ('llava_vqav2_mscoco_test-dev2015.jsonl', 'llava_vqav2_mscoco_test2015.jsonl'):
    write_lines(tmp_path / 'vqav2' / file, [q | {'image': 'a.jpg', 'text': ''} for q in case['test_split']])
  answers = write_lines(tmp_path / 'a.jsonl', case['result_lines'])
  with pytest.raises(DataError) as error:
    submitted('vqav2', tmp_path, answers)
  for problem in ('1 unreadable lines', '1 answers given more than once', '2 questions without an answer'):
    assert problem in str(error.value)
  assert submitted('vqav2', tmp_path, answers, allow_partial=True) == case['run']['outputs']['out']


@pytest.mark.parametrize('case', RECORDED['vizwiz'], ids=lambda c: str(len(c['results'])))
def test_vizwiz_submission(tmp_path, case):
  write_lines(tmp_path / 'vizwiz' / 'llava_test.jsonl', [q | {'text': ''} for q in case['annotation']])
  answers = write_lines(tmp_path / 'a.jsonl', case['results'])
  if 'exception' in case['run']:
    with pytest.raises(DataError, match='1 questions without an answer'):
      submitted('vizwiz', tmp_path, answers)
  else:
    assert submitted('vizwiz', tmp_path, answers) == case['run']['outputs']['out']


def test_mmvet_submission(tmp_path):
  case = RECORDED['mmvet']
  rows = [{'question_id': r['question_id'], 'image': 'a.png', 'text': ''} for r in case['rows']]
  write_lines(tmp_path / 'mm-vet' / 'llava-mm-vet.jsonl', rows)
  answers = write_lines(tmp_path / 'a.jsonl', case['rows'])
  assert submitted('mmvet', tmp_path, answers) == case['run']['outputs']['out']


def test_seed(tmp_path):
  """The recorded script ends in a KeyError of its own when it comes to videos; what it printed before is reproduced."""
  case = RECORDED['seed']
  (tmp_path / 'SEED-Bench.json').write_text(json.dumps(case['annotation']))
  result = scored('seed', tmp_path, write_lines(tmp_path / 'a.jsonl', case['results']))
  figures = result['figures']
  lines = [f'{name}: {figures[name]:.2f}%' for name in case['annotation']['question_type']]
  lines += [f'Total accuracy: {result["score"]:.2f}%', f'image accuracy: {figures["image"]:.2f}%']
  assert '\n'.join(lines) + '\n' == case['run']['stdout']
  videos = [q for q in case['annotation']['questions'] if q['data_type'] == 'video']
  given = {str(r['question_id']): r['text'] for r in case['results']}
  right = sum(given[q['question_id']] == q['answer'] for q in videos)
  assert figures['video'] == pytest.approx(100 * right / len(videos))


@pytest.mark.parametrize('case', RECORDED['chunks'], ids=str)
def test_shares_of_hosts(case):
  """As LLaVA splits question files, but a host beyond the last chunk has nothing to do instead of an IndexError."""
  items, count = list(range(case['n_items'])), case['n_chunks']
  if 'chunk_idx' in case:
    assert share(items, count, case['chunk_idx']) == case.get('chunk', [])
  else:
    shares = [share(items, count, i) for i in range(count)]
    assert [s for s in shares if s] == case.get('chunks', [])
    assert [i for s in shares for i in s] == items


def test_a_host_answers_the_rows_that_its_devices_hold(monkeypatch):
  """Also where the rows of two hosts interleave, and where several of its devices hold the same."""

  class Interleaved:
    def addressable_devices_indices_map(self, shape):
      assert shape == (8,)
      return {0: (slice(4, 6),), 1: (slice(None, 2),), 2: (slice(4, 6),)}

  monkeypatch.setattr(hosts, 'batch_sharding', lambda mesh: Interleaved())
  assert hosts.own_part(list('abcdef'), 8, None) == ['a', 'b', 'e', 'f']
  assert hosts.own_part(list('abc'), 8, None) == ['a', 'b', 'c', 'c']


def test_perplexity():
  case = RECORDED['ppl']
  values = []
  for sample in case['per_sample']:
    logits = np.asarray(sample['logits'], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    values.append(perplexity(log_probs[np.arange(len(logits)), sample['labels']]))
  assert values == pytest.approx([s['ppl'] for s in case['per_sample']], rel=1e-5)
  mean = mean_perplexity([[v] for v in values])
  assert mean == pytest.approx(case['single_round_mean_ppl'], rel=1e-5)
  # The authors' script skips an unreadable image and still divides by all; here such a sample stops the run.
  skipped = len(values) / (len(values) + 1)
  assert mean * skipped == pytest.approx(case['single_round_mean_ppl_with_one_skipped_image'], rel=1e-5)
  rounds = case['multi_round']
  assert [np.mean(r) for r in rounds['round_ppls']] == pytest.approx(rounds['mean_round_ppl'])
  assert mean_perplexity(rounds['round_ppls']) == pytest.approx(rounds['mean_ppl'])


@pytest.mark.parametrize('row', RECORDED['meteor']['rows'], ids=lambda r: r['label'][:20])
def test_meteor(row):
  table = RECORDED['meteor']['synonym_table']
  assert meteor.tokens(row['label'].strip().lower()) == row['label_tokens']
  assert meteor.tokens(row['answer'].strip()) == row['answer_tokens']
  assert meteor.score(row['label'], row['answer'], None) == pytest.approx(row['meteor_exact_and_stem_only'], abs=1e-12)
  with_synonyms = meteor.score(row['label'], row['answer'], meteor.Synonyms(table))
  assert with_synonyms == pytest.approx(row['meteor_with_given_synonyms'], abs=1e-12)
