"""Every benchmark of the suite on a few rows, through the command line: questions, answers, submission, score."""

import dataclasses
import io
import json
import os
import socket
import subprocess
import sys

import openpyxl
import pytest
from absl import flags
from conftest import ROOT
from rich.console import Console

import eval as eval_script
from dynllava_jax import sharding
from dynllava_jax.config import EvalConfig, EvalRun, Piece, Stage
from dynllava_jax.data.digits import Questions
from dynllava_jax.evals import figures, forced, layout, report
from dynllava_jax.evals.benchmarks import suite
from dynllava_jax.evals.benchmarks.base import Problems
from dynllava_jax.evals.folders import Folder

pytest_plugins = ('tiny_suite',)

SMALL = ('--config.text_lengths=(192,)', '--config.batch_size=2', '--config.max_new_tokens=3', '--config.dtype=float32')
SUBMISSIONS = {
  'vqav2': 'answers_upload/llava_vqav2_mscoco_test-dev2015/own.json',
  'vizwiz': 'answers_upload/own.json',
  'gqa': 'answers_upload/own/testdev_balanced_predictions.json',
  'mme': 'eval_tool/answers/own/existence.txt',
  'mmbench': 'answers_upload/mmbench_dev_20230712/own.xlsx',
  'mmbench_cn': 'answers_upload/mmbench_dev_cn_20231003/own.xlsx',
  'seed': 'answers_upload/own.jsonl',
  'mmvet': 'results/own.json',
}


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


@pytest.mark.parametrize('name', [n for n in suite.BENCHMARKS if n not in ('digits', 'questions')])
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
  if name in SUBMISSIONS:
    assert (tmp_path / SUBMISSIONS[name]).stat().st_size > 0
  capsys.readouterr()

  command(f'--config=configs/eval.py:{name}', f'--answers={tmp_path / "answers" / "own.jsonl"}', f'--data={eval_data}')
  (line,) = capsys.readouterr().out.splitlines()
  scored = json.loads(line)
  assert scored['answered'] == f'{len(rows)}/{len(rows)}' and scored['problems'] == {}
  if 'score' in run and not questions[0].reference:
    assert scored['score'] == pytest.approx(run['score'])


def test_comparison(tiny_checkpoint, eval_data, small_machine, tmp_path):
  """Dense, dynamic, a smaller image and merged tokens on long answers, with agreement: table in three forms, plot, picture."""
  dynamic = (Stage(), Stage(start=1, selector='dynamic', image_keep_rate=0.25))
  runs = {'dense': EvalRun(stages=(Stage(),)), 'dynamic': EvalRun(stages=dynamic)}
  runs['small'] = EvalRun(stages=(Stage(),), image_size=28)
  runs['merged'] = EvalRun(stages=(Stage(),), reducer=Piece('visionzip', {'dominant': 3, 'contextual': 1}))
  cfg = EvalConfig(
    runs=runs, benchmark='lvis_single', text_lengths=(192,), questions=0, batch_size=2, max_new_tokens=3, agreement=True
  )
  report.run(cfg, str(tiny_checkpoint), tmp_path, eval_data)
  results = json.loads((tmp_path / 'results.json').read_text())['runs']
  assert {n: r['image_tokens'] for n, r in results.items()} == {'dense': 16, 'dynamic': 4, 'small': 4, 'merged': 4}
  assert {n: r['image_tokens_layer_average'] for n, r in results.items()} == {'dense': 16, 'dynamic': 10, 'small': 4, 'merged': 4}
  dense = results['dense']
  assert dense['agreement']['token_agreement'] == 100, 'reading its own greedy answer, dense chooses every token of it again'
  assert dense['answers_differ'] == 0 and dense['difference'] is None and dense['figures']['reference_kept'] == 100
  for name in ('dynamic', 'small', 'merged'):
    run = results[name]
    assert run['difference'] == pytest.approx(run['score'] - dense['score'])
    assert run['difference_interval'][0] <= run['difference'] <= run['difference_interval'][1]
    assert run['flops_per_sample'] < dense['flops_per_sample'] and run['kv_bytes_per_sample'] < dense['kv_bytes_per_sample']
  assert dense['score'] == pytest.approx(dense['figures']['perplexity']) and dense['score'] > 1
  assert (tmp_path / 'results.md').read_text().count('\n| ') == 5
  assert len((tmp_path / 'results.csv').read_text().splitlines()) == 5
  for picture in ('results.png', 'tokens.png'):
    assert (tmp_path / picture).read_bytes().startswith(b'\x89PNG')
  rows = [json.loads(row) for row in (tmp_path / 'answers' / 'merged.jsonl').read_text().splitlines()]
  kept = [row['metadata']['kept_image'] for row in rows]
  assert all(k[0] == -1 and len(set(k)) == 4 and max(k) < 16 for k in kept), 'the class token, and three patches of the picture'
  loaded = layout.load_model('merged', runs['merged'], str(tiny_checkpoint))
  questions = suite.get('lvis_single').questions(Folder(eval_data, suite.get('lvis_single').folders))
  picture = figures.tokens_figure(figures.pictured(questions, rows)[:1], loaded, '').axes[0]
  assert len(picture.patches) == 3, 'the class token is no part of the picture'


def test_seed_of_the_random_baseline(tiny_checkpoint, eval_data, small_machine, tmp_path):
  """Another seed draws other image tokens and is another run; with 0 a row's seed is the number of its question."""
  assert [int(layout.row_seed(0, i)) for i in (0, 7)] == [0, 7]
  assert len({int(layout.row_seed(s, i)) for s in range(5) for i in range(100)}) == 500
  stages = (Stage(), Stage(start=1, selector='random', image_keep_rate=0.25))
  cfg = EvalConfig(
    runs={'own': EvalRun(stages=stages)}, benchmark='gqa', text_lengths=(192,), questions=0, batch_size=2, max_new_tokens=3
  )

  def drawn(seed):
    report.run(dataclasses.replace(cfg, seed=seed), str(tiny_checkpoint), tmp_path, eval_data)
    rows = (tmp_path / 'answers/own.jsonl').read_text().splitlines()
    return [json.loads(row)['metadata']['kept_image'] for row in rows]

  assert drawn(0) != drawn(1)
  assert (tmp_path / 'answers/own.previous-1.jsonl').exists()


def test_given_answers_are_read_with_the_room_of_generation(tiny_checkpoint, eval_data, small_machine, tmp_path):
  """A quarter of 8 tokens, however long the answers in the file are; what the full cache gave up is told."""
  stages = (Stage(), Stage(start=1, selector='dynamic', image_keep_rate=0.25, text_keep_budget=0.25))
  run = EvalRun(stages=stages)
  cfg = EvalConfig(runs={'own': run}, benchmark='lvis_single', text_lengths=(192,), questions=0, batch_size=2, max_new_tokens=8)
  loaded = layout.load_model('own', run, str(tiny_checkpoint))
  benchmark = suite.get('lvis_single')
  questions = benchmark.questions(Folder(eval_data, benchmark.folders))[:2]
  answers = [[list(range(300, 320))], [[5] * 30]]
  mesh = sharding.make_mesh(cfg.mesh)
  with sharding.on_mesh(mesh):
    read = forced.read_answers(cfg, loaded, questions, answers, tmp_path, mesh, Console(quiet=True))
  for row in forced.with_perplexity([{'metadata': {}}] * 2, read):
    kept, evicted = row['metadata']['reference_kept'], row['metadata']['reference_evicted']
    assert sum(kept) - evicted == 2 and evicted > 0


HOST = """
import pathlib, sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from dynllava_jax.config import EvalConfig, EvalRun
from dynllava_jax.evals import report
cfg = EvalConfig(runs={'own': EvalRun()}, benchmark='gqa', text_lengths=(192,), questions=0, batch_size=2, max_new_tokens=3)
report.run(cfg, sys.argv[3], pathlib.Path(sys.argv[5]), pathlib.Path(sys.argv[4]))
"""


@pytest.mark.slow
def test_two_hosts_give_the_answers_of_one(tiny_checkpoint, eval_data, small_machine, tmp_path):
  """Two processes with one device each; every batch is divided over them."""
  cfg = EvalConfig(runs={'own': EvalRun()}, benchmark='gqa', text_lengths=(192,), questions=0, batch_size=2, max_new_tokens=3)
  report.run(cfg, str(tiny_checkpoint), tmp_path / 'one', eval_data)
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  env = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=1'}
  command = [sys.executable, '-c', HOST, address]
  hosts = [
    subprocess.Popen([*command, str(i), tiny_checkpoint, eval_data, tmp_path / 'two'], cwd=ROOT, env=env, stderr=subprocess.PIPE)
    for i in range(2)
  ]
  errors = [host.communicate(timeout=600)[1].decode() for host in hosts]
  assert [host.returncode for host in hosts] == [0, 0], errors
  one, two = ([json.loads(x) for x in (tmp_path / o / 'answers/own.jsonl').read_text().splitlines()] for o in ('one', 'two'))
  assert [r['question_id'] for r in two] == [r['question_id'] for r in one]
  assert [r['text'] for r in two] == [r['text'] for r in one]


def test_submissions_in_the_official_forms(eval_data):
  """VQAv2 has an empty answer where nothing was asked; MMBench's sheet and MME's tables have the official columns."""

  def submit(name):
    benchmark = suite.get(name)
    folder = Folder(eval_data, benchmark.folders)
    rows = [{'question_id': q.id, 'prompt': q.prompt, 'text': '=A\tb'} for q in benchmark.questions(folder)]
    return next(iter(benchmark.submission(folder, rows, 'me').values()))

  assert json.loads(submit('vqav2'))[-1] == {'question_id': 99, 'answer': ''}
  assert submit('mme').decode() == (
    '7.txt\tIs it red? Please answer yes or no.\tYes\t=A b\n7.txt\tIs it blue? Please answer yes or no.\tNo\t=A b\n'
  )
  sheet = openpyxl.load_workbook(io.BytesIO(submit('mmbench'))).active
  assert [c.value for c in sheet[1]] == ['index', 'question', 'A', 'B', 'C', 'D', 'prediction', 'answer', 'split']
  assert [c.value for c in sheet[2]][-3:] == ['=A\tb', 'A', 'dev'] and sheet['G2'].data_type == 's' and sheet.max_row == 4


@pytest.mark.parametrize(
  'name, images',
  [('vqav2_val', 3), ('gqa', 3), ('textvqa', 1), ('pope', 3), ('mmbench', 3), ('seed', 3), ('lvis_single', 3), ('lvis_multi', 2)],
)
def test_intervals_draw_images(name, images, eval_data):
  golds = suite.get(name).golds(Folder(eval_data, suite.get(name).folders), Problems())
  units = {g.unit for g in golds}
  assert None not in units and len(units) == images


def test_digits_need_no_files(command, tmp_path, capsys):
  """Their answers are scored and their questions checked without `--data`, as many as the config asks for."""
  answers = tmp_path / 'a.jsonl'
  samples = [Questions('test', 0, 5)[i] for i in range(5)]
  rows = [{'question_id': s.id, 'text': s.conversations[1]['value']} for s in samples]
  answers.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  command('--config=configs/digits.py:eval', '--config.questions=5', f'--answers={answers}')
  scored = json.loads(capsys.readouterr().out)
  assert scored['score'] == 100 and scored['answered'] == '5/5'
  with pytest.raises(SystemExit) as end:
    command('--config=configs/digits.py:eval', '--config.questions=5', '--check_data', f'--data={tmp_path}')
  assert end.value.code == 0 and '1 of 1 benchmarks are complete' in capsys.readouterr().out
  with pytest.raises(SystemExit, match='config.questions: is 0, .*; use configs/digits.py:eval'):
    command('--config=configs/eval.py:digits', f'--answers={answers}')
  with pytest.raises(SystemExit, match='pope: --data=DIR is missing'):
    command('--config=configs/eval.py:pope', f'--answers={answers}')
