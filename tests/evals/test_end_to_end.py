"""Every benchmark of the suite on a few rows, through the command line: questions, answers, submission, score."""

import json
import sys

import pytest
from absl import flags

import eval as eval_script
from dynllava_jax.evals import suite
from dynllava_jax.evals.folders import Folder

pytest_plugins = ('tiny_suite',)

SMALL = ('--config.text_lengths=(192,)', '--config.batch_size=2', '--config.max_new_tokens=3', '--config.dtype=float32')


@pytest.fixture
def command(monkeypatch, small_machine):
  """Runs `eval.py` with these flags in this process."""

  def run(*arguments):
    argv = ['eval.py', *map(str, arguments)]
    monkeypatch.setattr(sys, 'argv', argv)  # where ml_collections looks for overrides
    try:
      flags.FLAGS(argv)
      eval_script.main([])
    finally:
      for name in [n for n in flags.FLAGS if n.startswith('config.')]:
        delattr(flags.FLAGS, name)
      for name in ('config', 'checkpoint', 'data', 'out', 'answers', 'allow_partial', 'check_data'):
        flags.FLAGS[name].unparse()

  return run


@pytest.mark.parametrize('name', [n for n in suite.BENCHMARKS if n != 'digits'])
def test_benchmark(name, command, tiny_checkpoint, eval_data, tmp_path, capsys):
  command(f'--config=configs/eval.py:{name}', *SMALL, f'--checkpoint={tiny_checkpoint}', f'--data={eval_data}', f'--out={tmp_path}')
  benchmark = suite.get(name)
  questions = benchmark.questions(Folder(eval_data, benchmark.folders))
  rows = [json.loads(line) for line in (tmp_path / 'answers' / 'own.jsonl').read_text().splitlines()]
  assert [r['question_id'] for r in rows] == [q.id for q in questions]
  assert [r['prompt'] for r in rows] == [q.prompt for q in questions]
  assert {'text', 'answer_id', 'model_id', 'metadata'} <= rows[0].keys()
  image = [
    r['metadata']['rendered_prompt'].startswith('A chat between') and '<image>\n' in r['metadata']['rendered_prompt'] for r in rows
  ]
  assert image == [q.image is not None for q in questions]
  assert all(r['metadata']['rendered_prompt'].endswith(' ASSISTANT:') for r in rows)
  provenance = json.loads((tmp_path / 'answers' / 'own.provenance.json').read_text())
  assert provenance['benchmark'] == name and len(provenance['checkpoint_sha256']) == 64 and provenance['versions']['jax']
  results = json.loads((tmp_path / 'results.json').read_text())
  run = results['runs']['own']
  assert run['image_tokens'] == 4 and run['image_tokens_layer_average'] == 10
  assert ('score' in run) == benchmark.scored
  capsys.readouterr()

  command(f'--config=configs/eval.py:{name}', f'--answers={tmp_path / "answers" / "own.jsonl"}', f'--data={eval_data}')
  (line,) = capsys.readouterr().out.splitlines()
  scored = json.loads(line)
  assert scored['answered'] == f'{len(rows)}/{len(rows)}' and scored['problems'] == {}
  if 'score' in run and not questions[0].reference:
    assert scored['score'] == pytest.approx(run['score'])
