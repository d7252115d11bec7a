"""Two processes evaluate while they train as one does, and a run goes on with another number of processes."""

import dataclasses
import json
import shutil

import pytest
from test_training import BASE, base_run, require_like, two_processes

from dynllava_jax import checkpoint
from dynllava_jax.config import EvalConfig, EvalRun, MeshConfig, TrainEval
from dynllava_jax.evals import report
from dynllava_jax.training import loop
from dynllava_jax.training.metrics import read_metrics

__all__ = ['base_run']
pytestmark = pytest.mark.slow
ASKED = dict(questions=12, batch_size=8, max_new_tokens=8, text_lengths=(32,))


def test_two_evaluate_as_one(base_run, tmp_path):
  """Step 4, after which they were asked to stop, is evaluated at the next start; weights are spread over both."""
  evals = {'asked': TrainEval(every=4, **ASKED)}
  told = two_processes(dataclasses.replace(BASE, mesh=MeshConfig(data=1, fsdp=2, tensor=2), evals=evals), tmp_path, 2)
  assert all('stopped after step 4 of 8' in out for out in told)
  require_like(tmp_path, base_run, [2, 4, 6, 8])
  assert [line['step'] for line in read_metrics(tmp_path) if 'eval/asked/score' in line] == [4, 8]
  assert (tmp_path / 'evals' / 'asked' / '4' / 'tokens.png').exists()
  report.run(EvalConfig(runs={'asked': EvalRun()}, **ASKED), str(tmp_path / 'checkpoints' / '8'), tmp_path / 'again')
  files = tmp_path / 'evals' / 'asked' / '8' / 'answers.jsonl', tmp_path / 'again' / 'answers' / 'asked.jsonl'
  told, alone = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
  assert {r['question_id']: r['text'] for r in told} == {r['question_id']: r['text'] for r in alone}


def test_a_run_goes_on_with_other_processes_mesh_and_parts_of_a_batch(base_run, tmp_path, capsys):
  """From one process to two, then back to one, which splits the batch and computes layers again."""
  workdir = shutil.copytree(base_run, tmp_path / 'run')
  shutil.rmtree(workdir / 'checkpoints' / '8')
  cfg = dataclasses.replace(BASE, save_every=2, mesh=MeshConfig(data=2, fsdp=2))
  assert 'goes on from step 4' in two_processes(cfg, workdir)[0]
  assert checkpoint.all_steps(workdir / 'checkpoints') == [4, 6, 8]
  require_like(workdir, base_run, [2, 4, 6, 8])
  shutil.rmtree(workdir / 'checkpoints' / '8')
  loop.train(dataclasses.replace(BASE, accumulate=2, remat='block', mesh=MeshConfig(data=2, fsdp=2, tensor=2)), workdir)
  assert 'goes on from step 6' in capsys.readouterr().out
  require_like(workdir, base_run, [2, 4, 6, 8])
