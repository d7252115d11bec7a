"""Scorers and comparison on rows small enough to check by hand."""

import collections
import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import eval as eval_configs
from dynllava_jax import methods
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import ConfigError, EvalConfig, Stage, VisionConfig, from_config_dict
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals import compare, forced, score
from dynllava_jax.evals.answers import Joined
from dynllava_jax.evals.benchmarks import meteor, mme, suite
from dynllava_jax.evals.benchmarks.base import Gold, canonical, letter, rates
from dynllava_jax.evals.benchmarks.mmbench import is_empty
from dynllava_jax.evals.benchmarks.perplexity import perplexity
from dynllava_jax.evals.resize import resize_tower
from dynllava_jax.presets import DYNAMIC_LLAVA_7B, LLAVA_1_5_7B


def joined(rows):
  """`rows`: (cluster, label, text); all labels there are."""
  pairs = tuple((Gold(i, label, cluster=c), {'text': text}) for i, (c, label, text) in enumerate(rows))
  return Joined(pairs, len(rows), collections.Counter(c for c, _, _ in rows))


def test_mme_counts_pairs():
  """Two colour images, one with both questions right; one scene with one right: 75 + 50 and 50 + 0."""
  color = [
    (i, ('color', label), text) for i, label, text in ((0, 'yes', 'Yes'), (0, 'no', 'No.'), (1, 'yes', 'Yes'), (1, 'no', 'Sure'))
  ]
  rows = [*color, (2, ('scene', 'yes'), 'no'), (2, ('scene', 'no'), 'no')]
  figures = score.figures(suite.get('mme'), score.tally(suite.get('mme'), joined(rows)))
  assert figures['color'] == 75 + 50 and figures['scene'] == 50 + 0 and figures['perception'] == 175
  assert 'cognition' not in figures, 'no question of that group was asked'


@pytest.mark.parametrize(
  'text, parsed',
  [('Yes', 'yes'), ('no', 'no'), ('No, it is', 'no'), ('I know', 'other'), ('know', 'no'), ('none', 'no'), ('', 'other')],
)
def test_mme_reads_the_first_four_letters(text, parsed):
  assert mme.parse(text) == parsed


def test_mme_labels_in_the_layout_of_the_evaluation_tool(tmp_path):
  for category in mme.CATEGORIES:
    (tmp_path / f'{category}.txt').write_text(f'1.jpg\tIs it {category}?  Please answer yes or no.\tYes\tyes\n')
  labels = list(mme.read_labels(tmp_path))
  assert labels[0] == ('existence', '1', 'Is it existence?  Please answer yes or no.', 'yes') and len(labels) == 14
  (tmp_path / 'OCR.txt').unlink()
  with pytest.raises(DataError, match="has no category 'OCR'"):
    list(mme.read_labels(tmp_path))


def test_mmbench_counts_questions_and_circles():
  rows = [(7, 'A', 'A'), (7, 'B', 'B. dog'), (8, 'A', 'A'), (8, 'C', 'D')]
  figures = score.figures(suite.get('mmbench'), score.tally(suite.get('mmbench'), joined(rows)))
  assert figures == {'accuracy': 75.0, 'circular': 50.0}


@pytest.mark.parametrize(
  'text, read', [('A', 'A'), (' B.', 'B'), ('(C)', 'C'), ('D: dog', 'D'), ('A dog', None), ('E', None), ('', None), ('a', None)]
)
def test_letters(text, read):
  assert letter(text, 'ABCD') == read


def test_empty_cells_as_pandas_reads_them():
  assert all(map(is_empty, ['', 'nan', 'NaN', 'None', 'NA', 'null', None])) and not any(map(is_empty, ['0', 'no', 'Nan bread']))


def test_prompts_are_compared_without_suffix_and_image():
  assert canonical('<image>\nIs  it?\nAnswer the question using a single word or phrase.') == canonical(
    'Is it? Please answer yes or no.'
  )


def test_paired_interval_is_narrower_than_that_of_two_independent_runs():
  """Two runs that differ in 2 of 200 answers: each score is uncertain by several points, their difference is not."""
  benchmark, rng = suite.get('gqa'), np.random.default_rng(0)
  right = rng.random(200) < 0.6
  other = right.copy()
  other[np.flatnonzero(right)[:2]] = False
  tallies = [score.tally(benchmark, joined([(None, ('open', 'yes'), ('no', 'yes')[int(x)]) for x in r])) for r in (right, other)]
  low, high = score.bootstrap(benchmark, tallies[0])
  assert low < 100 * right.mean() < high and high - low > 10
  low, high = score.bootstrap(benchmark, tallies[1], tallies[0])
  assert low < -1 < high <= 0 and high - low < 4
  assert score.bootstrap(benchmark, tallies[0], tallies[0]) == [0, 0]


def test_questions_about_one_image_are_drawn_together():
  """Forty images, every other one wrong in all its questions: ten questions each are no surer than one; paired or not."""
  benchmark = suite.get('gqa')

  def tallies(texts, questions):
    rows = [(Gold((i, j), ('open', 'yes'), unit=i), {'text': t}) for i, t in enumerate(texts) for j in range(questions)]
    return score.tally(benchmark, Joined(tuple(rows), len(rows), {}))

  one, ten = (tallies(['yes', 'no'] * 20, n) for n in (1, 10))
  assert score.bootstrap(benchmark, one) == pytest.approx(score.bootstrap(benchmark, ten))
  assert score.bootstrap(benchmark, ten, tallies(['no'] * 40, 10)) == score.bootstrap(benchmark, ten)


@pytest.mark.parametrize('name, score_of_2', [('vqav2_val', 100), ('vizwiz_val', 30)])
def test_annotators_of_vizwiz_are_compared_as_they_write(name, score_of_2):
  """Nine write `two` and one `2`: ten of a kind if normalised; as written only one of them says what `Two.` becomes."""
  benchmark = suite.get(name)
  assert benchmark.tally([(([], ['two'] * 9 + ['2']), 'Two.')])['correct'] == pytest.approx(score_of_2 / 100)


def test_a_smaller_image_interpolates_positions():
  old, new = (VisionConfig(image_size=s, hidden_size=8, mlp_dim=8, num_layers=1, num_heads=1) for s in (112, 56))
  ramp = jnp.tile(jnp.repeat(jnp.arange(8.0), 8)[:, None], (1, 8))  # the row's number
  params = {'vision': {'position_embedding': jnp.concatenate([jnp.full((1, 8), 9.0), ramp])}, 'llama': {}}
  smaller = resize_tower(params, old, new)['vision']['position_embedding']
  assert smaller.shape == (17, 8) and (smaller[0] == 9).all()
  np.testing.assert_allclose(smaller[1:, 0].reshape(4, 4)[:, 0], [0.5, 2.5, 4.5, 6.5], atol=0.2)
  assert resize_tower(params, old, old) is params


def test_agreement_counts_tokens_not_answers():
  read = [{'best': ['11'], 'log_probs': [[0.0, 0.0]]}, {'best': ['000000'], 'log_probs': [[-4.0] * 6]}]
  assert forced.agreement(read) == {'token_agreement': 25.0, 'answer_perplexity': pytest.approx(np.exp(3))}


def test_a_perplexity_is_a_number():
  with pytest.raises(FloatingPointError, match='the perplexity of an answer is nan'):
    perplexity([-1.0, float('nan')])
  with pytest.raises(FloatingPointError, match='the perplexity of an answer is inf: .* such as -2000.0'):
    perplexity([-2000.0, -1.0])


def test_answer_files_are_scored_against_all_labels(tmp_path):
  config = eval_configs.get_config('pope')
  config.questions = 5
  with pytest.raises(ConfigError, match='config.questions: an answer file is scored against all labels'):
    score.run(from_config_dict(EvalConfig, config), tmp_path / 'answers.jsonl', tmp_path, False, None)


def test_meteor_without_wordnet_goes_by_another_name(monkeypatch):
  benchmark = suite.get('lvis_single')
  row = {'question_id': 1, 'text': 'a dog', 'metadata': {'kept': '10'}}
  monkeypatch.setattr(meteor, 'wordnet', lambda: None)
  figures = benchmark.figures(benchmark.tally([(['a dog'], row)]))
  assert 'meteor' not in figures and benchmark.headline_of(figures) == 'meteor_without_synonyms'
  assert figures['kept'] == 50
  monkeypatch.setattr(meteor, 'wordnet', lambda: meteor.Synonyms({}))
  assert benchmark.headline_of(benchmark.figures(benchmark.tally([(['a dog'], row)]))) == 'meteor'


def long_answers(*metadata):
  """Figures of answers to one-round questions."""
  benchmark = suite.get('lvis_single')
  rows = [(Gold(i, ['a dog']), {'question_id': i, 'text': 'a dog', 'metadata': m}) for i, m in enumerate(metadata)]
  return score.figures(benchmark, score.tally(benchmark, Joined(tuple(rows), len(rows), {})))


def test_long_answers_say_what_their_score_is(monkeypatch):
  monkeypatch.setattr(meteor, 'wordnet', lambda: meteor.Synonyms({}))
  benchmark, read = (
    suite.get('lvis_single'),
    {'perplexity': [9.0], 'reference_fed': [8], 'reference_kept': [6], 'reference_evicted': 2},
  )
  figures = long_answers(read, read)
  assert figures['perplexity'] == 9 and figures['reference_kept'] == 50
  assert benchmark.metric_of(figures).startswith('perplexity')
  figures = long_answers({'kept': '1110', 'evicted': 1}, {'kept': '0011'})
  assert figures['kept'] == 50 and benchmark.metric_of(figures) == 'METEOR in %, mean over samples'


PERPLEXITY = {'perplexity': [9.0], 'reference_fed': [8], 'reference_kept': [8]}


@pytest.mark.parametrize(
  'metadata, message',
  [
    ([PERPLEXITY, {}, {}], '1 of 3 answers have metadata.perplexity, expected all or none'),
    ([{}, {'kept': '1'}], '1 of 2 answers have metadata.kept, expected all or none'),
    ([{'perplexity': [9.0]}], 'answer 0: metadata.reference_fed is None, expected a list of 1, a number per round'),
    ([PERPLEXITY | {'perplexity': 9.0}], 'answer 0: metadata.perplexity is 9.0, expected a list of 1'),
    ([PERPLEXITY | {'perplexity': []}], r'answer 0: metadata.perplexity is \[\], expected a list of 1'),
    ([{'kept': [True]}], r'answer 0: metadata.kept is \[True\], expected a 0 or 1 for each token fed'),
  ],
)
def test_metadata_that_cannot_be_averaged_is_refused(metadata, message):
  with pytest.raises(DataError, match=message):
    long_answers(*metadata)


def test_configs_of_all_benchmarks_can_be_built():
  for name, mode in itertools.product(suite.BENCHMARKS, ('', ',methods', ',compare')):
    cfg = from_config_dict(EvalConfig, eval_configs.get_config(name + mode))
    assert cfg.benchmark == name and cfg.max_new_tokens == suite.get(name).max_new_tokens
  assert set(cfg.runs) == {'dense', 'dynamic_40', 'dynamic_20', 'dynamic_10', 'uniform_20', 'random_20', 'image_168'}
  assert cfg.reference == 'dense'
  for run in from_config_dict(EvalConfig, eval_configs.get_config('pope,methods')).runs.values():
    vision = LLAVA_1_5_7B.vision
    model = dataclasses.replace(LLAVA_1_5_7B, vision=dataclasses.replace(vision, image_size=run.image_size or vision.image_size))
    methods.check_run(model, run.stages, run.reducer)
  assert suite.get('MM-Vet') is suite.get('mmvet') and suite.get('LLaVA-Bench').name == 'llava_bench'
  with pytest.raises(ConfigError, match="'popes' is unknown; expected one of vqav2"):
    suite.get('popes')
  with pytest.raises(ConfigError, match='text_lengths are'):
    from_config_dict(EvalConfig, ConfigDict(dict(runs=dict(own=dict()), text_lengths=(64, 32))))


def test_layer_average_and_both_flops_of_the_7b_model():
  """The paper's 10.07 T and 2.49 T, the true 7.63 T and 1.88 T, and 143.8 tokens."""
  from dynllava_jax import costs

  dynamic = (Stage(), Stage(start=2, selector='uniform', image_keep_rate=0.2))
  for stages, paper, true, tokens in (((Stage(),), 10.07, 7.63, 576), (dynamic, 2.49, 1.88, 143.8)):
    setting = costs.paper_setting(LLAVA_1_5_7B, stages)
    assert costs.paper_flops(setting) / 1e12 == pytest.approx(paper, abs=0.01)
    assert costs.decoder_flops(LLAVA_1_5_7B, stages) / 1e12 == pytest.approx(true, abs=0.01)
    assert np.mean(setting.tokens_per_layer) == pytest.approx(tokens, abs=0.05)


def test_flops_of_a_full_cache_grow_no_more():
  """Eight tokens kept in room for four are read like four kept and four dropped."""
  from dynllava_jax import costs

  flops = lambda kept, share: costs.sample_flops(
    DYNAMIC_LLAVA_7B, (Stage(), Stage(start=2, selector='dynamic', text_keep_budget=share)), 40, kept, CacheSpec(max_new_tokens=8)
  )
  assert flops([True] * 8, 0.5) == flops([True] * 4 + [False] * 4, 1.0) < flops([True] * 8, 1.0)


def test_given_up_tokens_are_the_kept_ones_of_smallest_margin():
  from dynllava_jax.evals.runner import given_up

  kept, margin = np.array([True, False, True, True, True]), np.array([2.0, -5.0, 0.5, 3.0, 1.0])
  assert given_up(kept, margin, 2) == [2, 4] and given_up(kept, margin, 0) == []


def test_tables_hold_the_same_numbers_in_three_forms():
  row = {
    'score': 85.946,
    'interval': [85.0, 86.5],
    'figures': {'f1': 85.946},
    'flops_per_sample': 7.63e12,
    'kv_bytes_per_sample': 3 * 2**20,
    'generated_kept': 0.5,
  }
  runs = {
    'dense': row | {'difference': None},
    'dynamic': row | {'difference': -1.5, 'difference_interval': [-2.0, -1.0], 'answers_differ': 7},
  }
  page = compare.markdown(suite.get('pope'), 'pope', runs)
  assert (
    '| dynamic | 85.95 (85.00 to 86.50) |' in page
    and '-1.50 (-2.00 to -1.00)' in page
    and '7.63 TFLOPs' in page
    and '3.00 MiB' in page
  )
  lines = compare.comma_separated(runs).splitlines()
  assert lines[0].startswith('run,score,interval') and lines[2].startswith('dynamic,85.946,"[85.0, 86.5]"')
  assert json.loads(lines[2].split('"')[1]) == [85.0, 86.5]


def test_a_category_called_accuracy_does_not_replace_the_score():
  sums = {'n': 4, 'correct': 1, 'accuracy/n': 1, 'accuracy/correct': 1, 'z/n': 3}
  assert rates(sums) == {'accuracy': 25.0, 'accuracy (category)': 100.0, 'z': 0.0}
