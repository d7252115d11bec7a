"""What stops an evaluation: numbers that are none, another evaluation in the same folder, damaged answers, absurd sizes."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from answer_files import config
from orbax.checkpoint import v1 as ocp
from rich.console import Console

from dynllava_jax import checkpoint, sharding
from dynllava_jax.checkpoint import CheckpointError
from dynllava_jax.config import ConfigError, EvalConfig, EvalRun
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals import figures, forced, layout, report, runner
from dynllava_jax.evals.benchmarks import suite
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.store import AnswerStore
from dynllava_jax.generate import Generator
from dynllava_jax.locks import BusyError, sole_use

pytest_plugins = ('tiny_suite',)


def copied(source, directory, change):
  """The tiny checkpoint with its parameters changed, sealed again as a conversion would."""
  params = jax.tree.map(np.array, checkpoint.load_params(source))
  change(params)
  checkpoint.write_info(directory, checkpoint.read_info(source), checkpoint.read_tokenizer(source))
  ocp.save_checkpointables(directory / '1', {'params': params})
  checkpoint.seal(directory / '1')
  return str(directory)


def test_weights_that_are_no_numbers_are_named(tiny_checkpoint, eval_data, small_machine, tmp_path):
  """One number of the head, and one of the image predictor, which would show in the choice of tokens alone."""
  for group in ('llama', 'image_predictor'):

    def spoil(params, group=group):
      leaf = jax.tree.leaves(params[group])[-1]
      leaf.reshape(-1)[3] = np.nan

    path = copied(tiny_checkpoint, tmp_path / group, spoil)
    with pytest.raises(CheckpointError, match=f'{group}/.* holds numbers that are not finite'):
      report.run(config('gqa'), path, tmp_path / 'out', eval_data)
    assert not (tmp_path / 'out/answers/own.jsonl').exists()


def huge(params):
  """Finite weights whose logits are not."""
  params['llama']['head'][:] = params['llama']['norm']['scale'][:] = 3e38


def test_an_evaluation_with_logits_that_are_no_numbers_stops(tiny_checkpoint, eval_data, small_machine, tmp_path, monkeypatch):
  for module in (runner, forced):
    monkeypatch.setattr(module, 'Generator', Generator)  # not one with the weights of another test
  path = copied(tiny_checkpoint, tmp_path / 'c', huge)
  with pytest.raises(FloatingPointError, match=r'question 20: the logits of own .* are not finite; no answer was written'):
    report.run(config('gqa'), path, tmp_path / 'out', eval_data)
  assert not (tmp_path / 'out/answers/own.jsonl').exists() and not (tmp_path / 'out/results.json').exists()
  benchmark = suite.get('lvis_single')
  questions = benchmark.questions(Folder(eval_data, benchmark.folders))[:2]
  cfg = config('lvis_single')
  mesh = sharding.make_mesh(cfg.mesh)
  with sharding.on_mesh(mesh), pytest.raises(FloatingPointError, match='question 0: the logits of own'):
    loaded = layout.load_model('own', EvalRun(), path)
    forced.read_answers(cfg, loaded, questions, [[[300, 301]], [[302]]], tmp_path / 'p', mesh, Console(quiet=True))
  assert not (tmp_path / 'p/own.jsonl').exists()


def test_a_row_that_goes_wrong_late_is_found():
  """Rounds of a conversation are looked at one by one, rows that only fill up the batch are not."""
  fine, wrong = np.array([True, True, True]), np.array([True, False, False])
  loaded = type('Loaded', (), {'name': 'own', 'path': 'c'})
  runner.check_numbers([fine, fine], ['a', 'b'], loaded)
  runner.check_numbers([fine, np.array([True, True, False])], ['a', 'b'], loaded)
  with pytest.raises(FloatingPointError, match='question b: '):
    runner.check_numbers([fine, wrong], ['a', 'b'], loaded)


def test_a_second_evaluation_is_kept_out(tiny_checkpoint, eval_data, small_machine, tmp_path):
  with sole_use(tmp_path / 'answers', '--out'), pytest.raises(BusyError, match='answers: another process is writing there'):
    report.run(config('gqa'), str(tiny_checkpoint), tmp_path, eval_data)
  assert list(tmp_path.rglob('*')) == [tmp_path / 'answers']
  report.run(config('gqa'), str(tiny_checkpoint), tmp_path, eval_data)
  assert (tmp_path / 'results.json').exists()


def rows_of(numbers):
  return [{'question_id': i, 'text': f'answer {i}', 'metadata': {'row': i}} for i in numbers]


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda line: line.replace('answer 1', 'answer 2'), 'answer 2: its row_sha256 is not that of the row'),
    (lambda line: line.replace('"row": 1', '"row": 2'), 'answer 2: its row_sha256'),
    (lambda line: re.sub(', "row_sha256": "[0-9a-f]*"', '', line), 'answer 2: its row_sha256'),
    (lambda line: line.replace('"row": 1', '"row": 3'), 'metadata.row is 3, expected the number of one of 3 questions'),
    (lambda line: line.replace('"row": 1', '"row": -1'), 'metadata.row is -1'),
    (lambda line: line.replace('"row": 1', '"row": true'), 'metadata.row is True'),
    (lambda line: line.replace('"row": 1', '"row": "1"'), "metadata.row is '1'"),
    (lambda line: line.replace('"row": 1', '"row": 0'), 'question 0 was answered before'),
    (lambda line: line.replace('"row": 1', '"row": NaN'), 'not a JSON object'),
    (lambda line: '[' * 100000, 'not a JSON object'),
  ],
)
def test_damaged_answers_are_named_when_a_run_goes_on(change, message, tmp_path):
  made_by = {'checkpoint_sha256': 'a', 'questions': 3}
  AnswerStore(tmp_path, 'own', made_by).add(rows_of((0, 1)))
  lines = (tmp_path / 'own.jsonl').read_text().splitlines()
  (tmp_path / 'own.jsonl').write_text(f'{lines[0]}\n{change(lines[1])}\n')
  with pytest.raises(DataError, match=f'{message}.*; delete the line'):
    AnswerStore(tmp_path, 'own', made_by)


@pytest.mark.parametrize('content', ['', '[]', '{"questions": 3', '[' * 100000, 'null'])
def test_answers_without_a_whole_provenance_are_set_aside_and_called_so(content, tmp_path):
  made_by = {'checkpoint_sha256': 'a', 'questions': 3}
  AnswerStore(tmp_path, 'own', made_by).add(rows_of((0,)))
  (tmp_path / 'own.provenance.json').write_text(content)
  again = AnswerStore(tmp_path, 'own', made_by)
  assert again.set_aside.exists() and again.why == 'answers without a whole provenance beside them' and not again.rows


def test_provenance_says_what_the_mesh_was(tiny_checkpoint, eval_data, small_machine, tmp_path):
  """Not the -1 that the config says."""
  report.run(config('gqa'), str(tiny_checkpoint), tmp_path, eval_data)
  provenance = json.loads((tmp_path / 'answers/own.provenance.json').read_text())
  assert provenance['mesh'] == {'data': 1, 'fsdp': 1, 'tensor': 1} and provenance['device'] == jax.devices()[0].device_kind


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(batch_size=10**12), 'batch_size is 1,000,000,000,000, expected at most'),
    (dict(max_new_tokens=10**9), 'max_new_tokens is 1,000,000,000, expected at most'),
    (dict(text_lengths=(128, 10**9)), 'text_lengths is 1,000,000,000, expected at most'),
    (dict(runs={'../x': EvalRun()}), r"'\.\./x' cannot name a file"),
    (dict(runs={'a\x1b[31m': EvalRun()}), 'cannot name a file'),
    (dict(runs={'x' * 200: EvalRun()}), 'cannot name a file'),
    (dict(runs={'': EvalRun()}), 'cannot name a file'),
  ],
)
def test_sizes_and_names_out_of_reason_are_refused(change, message):
  with pytest.raises(ConfigError, match=message):
    EvalConfig(**(dict(runs={'own': EvalRun()}) | change))


def test_more_made_questions_than_there_is_time_for():
  with pytest.raises(ConfigError, match='config.questions: is 1,000,000,000,000, and they are made'):
    suite.get('digits').configured(EvalConfig(runs={'own': EvalRun()}, questions=10**12))
  with pytest.raises(ConfigError, match='image_size is 100000000'):
    EvalRun(image_size=10**8)


def test_texts_of_pictures_are_no_formulas_and_steer_nothing(tiny_checkpoint, eval_data, small_machine, tmp_path):
  """A `$` begins no formula, `\\frac` is no command, an escape is shown as one."""
  report.run(config('gqa'), str(tiny_checkpoint), tmp_path, eval_data)
  rows = [json.loads(line) for line in (tmp_path / 'answers/own.jsonl').read_text().splitlines()]
  benchmark = suite.get('gqa')
  questions = benchmark.questions(Folder(eval_data, benchmark.folders))
  shown = [
    dataclasses.replace(p, question=dataclasses.replace(p.question, text=(r'What is $\frac{1$ \x1b[31m'.replace(r'\x1b', '\x1b'),)))
    for p in figures.pictured(questions, rows)[:1]
  ]
  figure = figures.tokens_figure(shown, layout.load_model('own', EvalRun(), str(tiny_checkpoint)), 'a $ title')
  figure.savefig(tmp_path / 'a.png')
  texts = [t.get_text() for axes in figure.axes for t in axes.texts]
  assert any(r'$\frac{1$ \x1b[31m' in t for t in texts) and not any('\x1b' in t for t in texts)
