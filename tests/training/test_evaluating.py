"""Evaluation while training: the trained weights themselves are asked, and neither stops nor kills change what comes out."""

import dataclasses
import json
import math
import shutil

import jax
import llava_files
import numpy as np
import pytest
from answer_files import scored
from conftest import GOLDEN
from test_run_files import CONFIG
from test_training import dynamic, largest_difference, parameters

from dynllava_jax import checkpoint, sharding
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import ConfigError, DataConfig, EvalConfig, EvalRun, Stage, TrainEval
from dynllava_jax.data import check, preparation
from dynllava_jax.data.pipeline import LayOut
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.sources import new_tokenizer
from dynllava_jax.evals import report
from dynllava_jax.evals.tasks import Answering
from dynllava_jax.training import evaluating, loop
from dynllava_jax.training.metrics import read_metrics
from dynllava_jax.training.stopping import StopRequest

pytest_plugins = ('tiny_suite',)
TOKENIZER = GOLDEN / 'text' / 'tok_nonlegacy'
ASKED = dict(questions=16, batch_size=8, max_new_tokens=8, text_lengths=(32,))
SAMPLES = 8


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """Eight samples, some without image, as two folders of the same."""
  root = tmp_path_factory.mktemp('prepared')
  llava_files.write_pictures(root)
  path = llava_files.write_json(root / 'mix.json', [llava_files.sample(i, image=i % 3 != 0, words=2 + i) for i in range(SAMPLES)])
  data = DataConfig(conversation='vicuna_v1', text_length=90)
  scan = check.Scan(json={'mix': path}, images=root, data=data, tokenizer=None, num_patches=4, processes=1)
  assert preparation.prepare(scan, [1.0], root / 'trained', only_check=False, image_bytes=True, shard_samples=25)
  shutil.copytree(root / 'trained', root / 'held_out')
  return root


def on_prepared(prepared, **changes):
  """A dense run on the samples, all of them in one batch."""
  llama = dataclasses.replace(CONFIG.model.llama, vocab_size=1800)
  data = DataConfig(
    source='prepared', path=str(prepared / 'trained'), tokenizer=str(TOKENIZER), conversation='vicuna_v1', text_length=90
  )
  fields = dict(model=dataclasses.replace(CONFIG.model, llama=llama), data=data, batch_size=SAMPLES)
  return dataclasses.replace(CONFIG, **fields | changes)


def without_times(workdir):
  timed = ('seconds', 'tokens_per', 'compilations')
  return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in read_metrics(workdir)]


@pytest.mark.slow
def test_perplexity_is_that_of_the_loss_in_training(prepared, tmp_path):
  """The first step has learning rate 0, so the evaluation after it sees the weights that its loss is of."""
  evals = {'held_out': TrainEval(every=1, benchmark='perplexity', data=str(prepared / 'held_out'), batch_size=SAMPLES)}
  loop.train(on_prepared(prepared, steps=1, evals=evals), tmp_path)
  trained, evaluated = read_metrics(tmp_path)
  assert evaluated['eval/held_out/perplexity'] == pytest.approx(math.exp(trained['ce']), rel=1e-4)
  assert evaluated['eval/held_out/score'] == evaluated['eval/held_out/perplexity']
  assert evaluated['eval/held_out/questions'] == SAMPLES and 0 <= evaluated['eval/held_out/token_accuracy'] <= 100
  folder = tmp_path / 'evals' / 'held_out' / '1'
  assert (folder / 'tokens.png').read_bytes().startswith(b'\x89PNG')
  assert len((folder / 'answers.jsonl').read_text().splitlines()) == SAMPLES


@pytest.mark.slow
def test_a_benchmark_of_the_suite_is_scored_as_its_answers_are(prepared, eval_data, tmp_path):
  """POPE: questions, pictures and labels in LLaVA's layout."""
  evals = {'pope': TrainEval(every=1, benchmark='pope', data=str(eval_data), batch_size=8, max_new_tokens=3, text_lengths=(64,))}
  loop.train(on_prepared(prepared, steps=1, evals=evals), tmp_path)
  figures = {k.removeprefix('eval/pope/'): v for k, v in read_metrics(tmp_path)[-1].items() if k.startswith('eval/pope/')}
  found = scored('pope', eval_data, tmp_path / 'evals' / 'pope' / '1' / 'answers.jsonl')
  assert figures.pop('questions') == 9 and figures.pop('score') == found['score']
  assert figures and figures == {name: found['figures'][name] for name in figures}


def watched(**changes):
  evals = {'digits': TrainEval(every=2, **ASKED), 'dense': TrainEval(every=3, stages=(Stage(), Stage(start=1)), **ASKED)}
  return dynamic(**dict(steps=5, evals=evals, save_every=9, keep=9, log_every=1) | changes)


def train_on_one_device(workdir):
  """There sums have one order."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ('data', 'fsdp', 'tensor'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda cfg: mesh)
    loop.train(watched(), workdir)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run with evaluations that nobody disturbs."""
  workdir, seen = tmp_path_factory.mktemp('whole'), {}
  run = evaluating.Evaluations.run

  def watching(self, step, groups, stopped):
    seen['groups'] = groups
    yield from run(self, step, groups, stopped)

  rows_of = Answering.rows_of

  def answering(self, generator, chunk):
    given, used = jax.tree.leaves(seen['groups']), jax.tree.leaves(generator.params)
    seen['copied'] = seen.get('copied', 0) + sum(a is not b for a, b in zip(given, used, strict=True))
    return rows_of(self, generator, chunk)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluating.Evaluations, 'run', watching)
    patch.setattr(Answering, 'rows_of', answering)
    train_on_one_device(workdir)
  assert seen['copied'] == 0, 'what is asked are the arrays that are trained'
  return workdir


@pytest.mark.slow
def test_evaluations_are_made_in_time_and_what_they_ask_is_saved(whole):
  lines = read_metrics(whole)
  made = [(line['step'], key.split('/')[1]) for line in lines for key in line if key.endswith('/questions')]
  assert made == [(2, 'digits'), (3, 'dense'), (4, 'digits'), (5, 'digits'), (5, 'dense')]
  assert checkpoint.all_steps(whole / 'checkpoints') == [2, 3, 4, 5]
  assert all((whole / 'evals' / name / str(step) / 'tokens.png').exists() for step, name in made)
  assert lines[-3]['evaluate_seconds'] > 0


@pytest.mark.slow
def test_answers_are_those_of_an_evaluation_of_the_saved_step(whole, tmp_path):
  runs = {'digits': EvalRun(), 'dense': EvalRun(stages=(Stage(), Stage(start=1)))}
  cfg = EvalConfig(runs=runs, **ASKED)
  report.run(cfg, str(whole / 'checkpoints' / '5'), tmp_path)
  results = json.loads((tmp_path / 'results.json').read_text())['runs']
  figures = {k: v for line in read_metrics(whole) if line['step'] == 5 for k, v in line.items()}
  for name in runs:
    told = [json.loads(line) for line in (whole / 'evals' / name / '5' / 'answers.jsonl').read_text().splitlines()]
    asked = [json.loads(line) for line in (tmp_path / 'answers' / f'{name}.jsonl').read_text().splitlines()]
    assert {r['question_id']: r['metadata']['tokens'] for r in told} == {r['question_id']: r['metadata']['tokens'] for r in asked}
    assert figures[f'eval/{name}/score'] == results[name]['score']


@pytest.mark.slow
@pytest.mark.parametrize('how', ['stopped', 'died'])
def test_stopped_or_dead_in_an_evaluation_it_goes_on_bit_for_bit(how, whole, tmp_path, monkeypatch):
  rows_of, calls = Answering.rows_of, []

  class Death(BaseException):
    """Nobody catches it, as nobody catches kill -9."""

  def disturbed(self, generator, chunk):
    calls.append(self.setting.name)
    if self.setting.name == 'dense' and calls.count('dense') == 1:  # the first batch of it, after step 3
      if how == 'died':
        raise Death
      requests[-1].requested = True
    return rows_of(self, generator, chunk)

  requests, init = [], StopRequest.__init__
  monkeypatch.setattr(StopRequest, '__init__', lambda self, *args: requests.append(self) or init(self, *args))
  monkeypatch.setattr(Answering, 'rows_of', disturbed)
  with pytest.raises(loop.Interrupted if how == 'stopped' else Death) as error:
    train_on_one_device(tmp_path)
  if how == 'stopped':
    assert 'stopped after step 3 of 5' in str(error.value) and error.value.code == 75
  assert checkpoint.all_steps(tmp_path / 'checkpoints') == [2, 3]
  assert not (tmp_path / 'evals' / 'dense').exists()
  train_on_one_device(tmp_path)
  assert without_times(tmp_path) == without_times(whole)
  assert largest_difference(parameters(tmp_path), parameters(whole)) == 0
  for file in ('dense/3/answers.jsonl', 'digits/5/answers.jsonl'):
    assert (tmp_path / 'evals' / file).read_text() == (whole / 'evals' / file).read_text()


@pytest.mark.parametrize(
  'evals, message',
  [
    (dict(x=TrainEval(every=1, benchmark='pope')), 'config.evals.x.data: is empty; name the folder of pope'),
    (dict(x=TrainEval(every=1, benchmark='pope', data='nowhere')), 'nowhere/pope/llava_pope_test.jsonl.*missing'),
    (dict(x=TrainEval(every=1, benchmark='perplexity', data='nowhere')), 'nowhere is no finished data set'),
    (dict(x=TrainEval(every=1, batch_size=12)), 'config.evals.x: batch_size: 12 does not divide'),
    (dict(x=TrainEval(every=1, text_lengths=(4,))), 'question .*: .* text tokens, the largest of config.text_lengths is 4'),
  ],
  ids=['no data', 'no such data', 'nothing prepared', 'batch', 'too long'],
)
def test_what_cannot_be_evaluated_is_one_line_before_the_first_step(evals, message, tmp_path):
  cfg = dataclasses.replace(CONFIG, evals=evals)
  layout = LayOut(cfg.data, cfg.model.vision, new_tokenizer(cfg.data, 430), 4)
  info = CheckpointInfo(model=cfg.model, conversation=cfg.data.conversation)
  with pytest.raises((ConfigError, DataError), match=message) as error:
    evaluating.Evaluations(cfg, info, layout, sharding.make_mesh(cfg.mesh), tmp_path, [])
  assert '\n' not in str(error.value)


def test_evaluations_that_mislead_are_refused():
  held_out = TrainEval(every=1, benchmark='perplexity', data='mine')
  with pytest.raises(ConfigError, match='evals.x.data: mine is what the run is trained on'):
    dataclasses.replace(CONFIG, data=DataConfig(source='prepared', path='mine'), evals={'x': held_out})
  with pytest.raises(ConfigError, match=r'evals.x.stages: must begin at the layers of the trained ones \(0\)'):
    dataclasses.replace(CONFIG, evals={'x': TrainEval(every=1, stages=(Stage(), Stage(start=1)))})
  with pytest.raises(ConfigError, match='evals: .* cannot name a folder'):
    dataclasses.replace(CONFIG, evals={'../x': TrainEval(every=1)})
  with pytest.raises(ConfigError, match='every is 0'):
    TrainEval(every=0)
