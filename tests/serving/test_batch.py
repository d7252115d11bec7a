"""Files of questions: every answer once, whatever happens in between."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import together
from conftest import ROOT

import dynllava_jax as dl
from dynllava_jax.evals.benchmarks.base import Question
from dynllava_jax.evals.layout import Layout
from dynllava_jax.evals.store import AnswerStore
from dynllava_jax.serving import batch
from dynllava_jax.serving.engine import Engine
from dynllava_jax.serving.request import Options

pytest_plugins = ('tiny_suite',)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_two_devices_share_the_work(tiny_checkpoint, tmp_path):
  rng = np.random.default_rng(0)
  asked = [
    Question(i, (f'What is {"that " * (i % 3)}{i}?',), str(i), rng.integers(0, 256, (56, 56, 3), np.uint8)) for i in range(9)
  ]
  sizes = dict(max_new_tokens=4, text_lengths=(64,), batch_size=2)
  meshes = batch.meshes(jax.devices()[:4], 2)[:2]
  first = dl.load(tiny_checkpoint, mesh=meshes[0], **sizes)
  models = [first, first.on(meshes[1])]
  make = lambda m: Engine(m.generator, m.loaded.tokenizer, text_length=64, slots=2, steps=2)
  engines = [make(m) for m in models]
  layout = Layout(models[0].loaded, asked, (64,), 0)
  options = Options(temperature=1.0, seed=5)

  def answers(name, engines, left, stop_after=99):
    store, done = AnswerStore(tmp_path, name, {'questions': 9}), []

    def advance(more):
      done.append(more)
      if sum(done) >= stop_after:
        raise KeyboardInterrupt

    batch.Work(layout, [i for i in left if i not in store.rows], options, store, advance).run(engines)
    return store.finish()

  with pytest.raises(KeyboardInterrupt):
    answers('a', engines[:1], range(9), stop_after=3)
  assert 3 <= len((tmp_path / 'a.jsonl').read_text().splitlines()) < 9
  resumed = answers('a', engines, range(9))
  whole = answers('b', engines[:1], range(9))
  assert [r['question_id'] for r in whole] == list(range(9))
  assert [(r['text'], r['metadata']['tokens']) for r in resumed] == [(r['text'], r['metadata']['tokens']) for r in whole]
  assert len({tuple(r['metadata']['tokens']) for r in whole}) > 5


@pytest.mark.parametrize(
  'flags, words',
  [
    (['--questions=q.jsonl', '--out=a.jsonl'], '--checkpoint is missing'),
    (['--checkpoint=c', '--questions=q.jsonl', '--out=a.txt'], '--out=a.txt: expected a file NAME.jsonl'),
    (['--checkpoint=c', '--questions=q.jsonl', '--out=a.jsonl', '--stages=[{'], '--stages: not JSON'),
  ],
)
def test_mistakes_are_one_line(flags, words, tmp_path):
  command = [sys.executable, '-m', 'dynllava_jax.batch', *flags]
  run = subprocess.run(command, cwd=tmp_path, env={'PYTHONPATH': str(ROOT), 'PATH': ''}, capture_output=True, text=True)
  assert run.returncode == 1 and words in run.stderr and run.stderr.count('\n') == 1


@pytest.mark.slow
def test_the_command_answers_a_file(tmp_path):
  rows = [{'question_id': 'a', 'text': 'How many digits are there?'}, {'question_id': 'b', 'text': 'What is the largest digit?'}]
  (tmp_path / 'q.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  sizes = ['--text_lengths=32', '--max_new_tokens=4', '--slots=2']
  files = ['--checkpoint=examples/digits', f'--questions={tmp_path / "q.jsonl"}', f'--out={tmp_path / "a.jsonl"}']
  command = [sys.executable, '-m', 'dynllava_jax.batch', *files, *sizes]
  for words in ('2 answers: ', '2 answers are there already'):
    assert words in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
  answers = [json.loads(line) for line in (tmp_path / 'a.jsonl').read_text().splitlines()]
  assert [a['question_id'] for a in answers] == ['a', 'b'] and all(a['text'] for a in answers)
  files[-1] = f'--out={tmp_path / "hosts.jsonl"}'
  both = together.start(['-m', 'dynllava_jax.batch', '--multihost', *files, *sizes])
  told = [host.communicate(timeout=200) for host in both]
  assert [host.returncode for host in both] == [0, 0], told
  of_hosts = [json.loads(line) for line in (tmp_path / 'hosts.jsonl').read_text().splitlines()]
  assert [(a['question_id'], a['text']) for a in of_hosts] == [(a['question_id'], a['text']) for a in answers]
  assert {p.name for p in (tmp_path / 'hosts.jsonl.parts').iterdir()} >= {'host-0-of-2.jsonl', 'host-1-of-2.jsonl'}
