"""One evaluation from top to bottom: answers of every run, submissions, tables, pictures."""

import contextlib
import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from dynllava_jax import checkpoint, locks, sharding
from dynllava_jax.config import ConfigError, EvalConfig, to_dict
from dynllava_jax.display import Terminal
from dynllava_jax.evals import compare, figures, forced, layout, runner, score
from dynllava_jax.evals.answers import Labels
from dynllava_jax.evals.benchmarks import suite
from dynllava_jax.evals.benchmarks.base import Benchmark, Question
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.store import pictures_sha256, questions_sha256
from dynllava_jax.files import read_regular, sweep, write_atomically
from dynllava_jax.training.plot import save_figure

TABLE_WIDTH = 160  # where there is no terminal to ask
RESULTS = 'results.json'  # written first
BESIDE = ('results.md', 'results.csv', 'results.png', 'tokens.png')


def run(cfg: EvalConfig, path: str, out: pathlib.Path, data: pathlib.Path | None = None) -> None:
  """Evaluates all runs and prints the table.

  Writes to `out`: `answers/RUN.jsonl` with its provenance, submissions, `results.json`, `.md`, `.csv` and `.png`, and
  `tokens.png`, which shows what the run called 'dynamic', or the last one, did to the first pictures.

  Args:
    cfg: the evaluation.
    path: checkpoint, DIR or DIR/STEP, of the runs that name none.
    out: directory for the results; a second call goes on where the first stopped.
    data: folder of the benchmark data; None for those that need none.

  Raises:
    CheckpointError, ConfigError, DataError: what is wrong with checkpoint, config or data.
    BusyError: another evaluation writes to `out`.
    FloatingPointError: a checkpoint computes what is no number.
  """
  # 1. What is asked, and of which models. Nothing is computed before all of it is known to be there.
  width = None if Terminal().is_terminal else TABLE_WIDTH
  console = Terminal(width=width, soft_wrap=False)
  console.quiet = jax.process_index() > 0
  benchmark = suite.get(cfg.benchmark).configured(cfg)
  folder = score.folder_of(cfg, benchmark, data)
  found = score.questions(benchmark, folder)
  questions = found[: cfg.questions or None]
  labels = score.scorable(cfg, benchmark, folder, questions, console)
  if cfg.questions == 0:
    score.submission(benchmark, folder, [], '')  # of no answers: finds out whether all that it needs is there
  models = {name: layout.load_model(name, run, path) for name, run in cfg.runs.items()}
  mesh = sharding.make_mesh(cfg.mesh)
  sharding.check_batch(cfg.batch_size, mesh)

  with contextlib.ExitStack() as held:
    if jax.process_index() == 0:
      held.enter_context(locks.sole_use(out / 'answers', '--out'))
      check_own(out)
      sweep(out / 'answers')
    _evaluate(cfg, Asked(benchmark, folder, questions, len(found), labels, path, models), out, mesh, console)


@dataclasses.dataclass(frozen=True)
class Asked:
  """What an evaluation asks of which models.

  `total`: questions there are; `labels`: None where there are none; `checkpoint`: of the runs that name none.
  """

  benchmark: Benchmark
  folder: Folder
  questions: Sequence[Question]
  total: int
  labels: Labels | None
  checkpoint: str
  models: Mapping[str, layout.Loaded]


def _evaluate(cfg: EvalConfig, asked: Asked, out: pathlib.Path, mesh: jax.sharding.Mesh, console: Console) -> None:
  """Answers, scores and pictures, by the one process that writes to `out`."""
  benchmark, questions, models = asked.benchmark, asked.questions, asked.models

  # 2. Answers, run by run.
  with sharding.on_mesh(mesh):
    results = {name: runner.answer_all(cfg, model, questions, out, mesh, console) for name, model in models.items()}
    agreements = read_given_answers(cfg, questions, models, results, out, mesh, console)
  if jax.process_index():
    return

  # 3. Scores, costs, submissions.
  rows = compare.compare(cfg, benchmark, asked.labels, models, results)
  for name, found in agreements.items():
    rows[name]['agreement'] = found
  metric = metric_of(benchmark, rows, results)
  asked_of_all = f'the first {len(questions)} of {asked.total}' if len(questions) < asked.total else str(len(questions))
  title = f'{benchmark.name}: {metric}, {asked_of_all} questions'
  report = {
    'benchmark': benchmark.name,
    'metric': metric,
    'runs': rows,
    'reference': cfg.reference,
    'questions': len(questions),
    'questions_sha256': questions_sha256(questions),
    'pictures_sha256': pictures_sha256(questions),
    'checkpoint': str(asked.checkpoint),
    'step': checkpoint.locate(asked.checkpoint)[1] if any(not run.checkpoint for run in cfg.runs.values()) else None,
    'dtype': cfg.dtype,
    'stages': {n: [to_dict(s) for s in m.stages] for n, m in models.items()},
    'reducer': {n: m.reducer.to_plain() if m.reducer else None for n, m in models.items()},
    'conventions': list(compare.CONVENTIONS),
    'notes': benchmark.remarks(),
  }
  write_atomically(out / RESULTS, (json.dumps(report, indent=1) + '\n').encode())
  write_atomically(out / 'results.md', compare.markdown(benchmark, title, rows).encode())
  write_atomically(out / 'results.csv', compare.comma_separated(rows).encode())
  console.print(compare.console_table(benchmark, title, rows))
  for name, result in results.items():
    if cfg.questions == 0:  # servers want all questions answered
      for file, content in score.submission(benchmark, asked.folder, result.rows, name).items():
        write_atomically(out / file, content)

  # 4. Pictures.
  if any('score' in row for row in rows.values()):
    save_figure(compare.figure(title, metric, rows), out / 'results.png')
  shown = 'dynamic' if 'dynamic' in results else list(results)[-1]
  pictured = figures.pictured(questions, results[shown].rows)
  if pictured:
    title = f'{shown}: image tokens kept (bright), generated tokens dropped (grey) and given up later (orange)'
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'Glyph')  # characters that the font lacks become boxes
      save_figure(figures.tokens_figure(pictured, models[shown], title), out / 'tokens.png')


def check_own(out: pathlib.Path) -> None:
  """ConfigError if a file in `out` that an evaluation writes is not one's: what somebody else left there is not replaced."""
  try:
    content = json.loads(read_regular(out / RESULTS))
    own = isinstance(content, dict) and content.keys() >= {'benchmark', 'metric', 'runs'}
  except (OSError, ValueError, RecursionError):
    own = False
  if own or any((out / 'answers').glob('*.provenance.json')):
    return
  if foreign := next((name for name in (RESULTS, *BESIDE) if os.path.lexists(out / name)), None):
    raise ConfigError(f'--out: {out / foreign} was not written by an evaluation; move it away, or choose another --out')


def metric_of(benchmark: Benchmark, rows: Mapping[str, Mapping[str, Any]], results: Mapping[str, runner.RunResult]) -> str:
  """What the scores are, in words; that there are none, if so."""
  of_runs = [benchmark.metric_of(row['figures'], results[name].rows) for name, row in rows.items() if 'figures' in row]
  return next(iter(of_runs), 'not scored' if benchmark.scored else benchmark.metric)


def read_given_answers(
  cfg: EvalConfig,
  questions: Sequence[Question],
  models: Mapping[str, layout.Loaded],
  results: dict[str, runner.RunResult],
  out: pathlib.Path,
  mesh: jax.sharding.Mesh,
  console: Console,
) -> dict[str, dict[str, float]]:
  """Adds the perplexity of reference answers to `results`; returns, if asked for, each run's agreement with the reference run."""
  if questions[0].reference:
    for name, model in models.items():
      ids = [forced.reference_ids(q, model.tokenizer) for q in questions]
      read = forced.read_answers(cfg, model, questions, ids, out / 'perplexity', mesh, console)
      results[name] = dataclasses.replace(results[name], rows=forced.with_perplexity(results[name].rows, read))
  if not cfg.agreement:
    return {}
  given = [[r['metadata']['tokens'][: r['metadata'].get('first_round')]] for r in results[cfg.reference].rows]
  given = runner.from_first_host(given)
  found = {}
  for name, model in models.items():
    read = forced.read_answers(cfg, model, questions, given, out / 'agreement', mesh, console)
    found[name] = forced.agreement(read) if read else {}
  return found
