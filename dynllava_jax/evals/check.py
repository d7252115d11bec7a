"""`--check_data`: what of each benchmark is there, what is missing, where it comes from."""

import os
import pathlib
import sys

from rich.table import Table
from rich.text import Text

from dynllava_jax import paths, remote
from dynllava_jax.config import EvalConfig
from dynllava_jax.data.samples import DataError
from dynllava_jax.display import Terminal
from dynllava_jax.evals import score
from dynllava_jax.evals.benchmarks import suite
from dynllava_jax.evals.benchmarks.base import Benchmark, Problems
from dynllava_jax.evals.folders import Folder

WIDTH = 150  # where there is no terminal to ask
OK, MISSING = 'ok', 'missing'
LABELS = ('labels', 'questions and labels')  # what `config.labels` takes the place of


def inspect(benchmark: Benchmark, folder: Folder) -> list[tuple[str, str, str]]:
  """(file, state, what to do) of everything one benchmark needs; state is 'ok', 'missing' or what is wrong."""
  root, found = folder.root, []
  for needed in benchmark.needed:
    if folder.labels and needed.what in LABELS:
      continue
    path = folder.find(*needed.paths)
    where = f'{needed.what}: {path.relative_to(root) if path else pathlib.Path(benchmark.folders[0], needed.paths[0])}'
    count = benchmark.expected_questions if needed.what == 'questions' else None
    source = f'{needed.source} ({count:,} questions)' if count else needed.source
    found.append((where, OK if path else MISSING, '' if path else source))
  if folder.labels:
    exists = remote.fetched(paths.given(folder.labels, 'config.labels')).exists()
    found.append(
      (f'labels: {folder.labels}', OK if exists else MISSING, '' if exists else 'config.labels names it; is the path right?')
    )
  labelled = exists if folder.labels else not any(s == MISSING and 'labels' in what for what, s, _ in found)
  try:
    questions = score.questions(benchmark, folder)
  except DataError as e:
    if labelled and not any(state == MISSING and 'questions' in what for what, state, _ in found):
      found.append(('questions', f'unreadable: {e}', 'get the file again'))
    return found
  expected = benchmark.expected_questions
  state = OK if expected in (None, len(questions)) else f'{len(questions):,}, expected {expected:,}'
  found.append((f'{len(questions):,} questions', state, '' if state == OK else 'another version, or cut off'))
  files = {q.image for q in questions if isinstance(q.image, pathlib.Path)}
  absent = sorted(f for f in files if not os.path.isfile(f))  # of a name that is too long too
  if files:
    state = OK if not absent else f'{len(absent):,} missing'
    found.append((f'{len(files):,} images', state, f'e.g. {absent[0]}' if absent else ''))
  return found + (_labels(benchmark, folder) if benchmark.scored and labelled else [])


def _labels(benchmark: Benchmark, folder: Folder) -> list[tuple[str, str, str]]:
  problems = Problems()
  try:
    golds = score.labels(benchmark, folder, problems).golds
  except DataError as e:
    return [('labels', f'unreadable: {e}', 'get the file again')]
  for gold in golds:
    if gold.label is None:
      problems.add('questions without a label', gold.key)
  state = ', '.join(f'{count:,} {kind}' for kind, count in problems.counts().items()) or (OK if golds else MISSING)
  return [(f'{len(golds):,} labels', state, '' if state == OK else benchmark.hint)]


def run(root: pathlib.Path, cfg: EvalConfig | None) -> int:
  """Prints the state of the benchmark of a config, of all that need files if there is none; 1 if something is missing, else 0.

  Raises:
    DataError: `root` is no folder. ConfigError: unknown benchmark.
  """
  if not root.is_dir():
    raise DataError(f'--data={root}: no such folder; expected one laid out as playground/data/eval of LLaVA')
  table = Table(title=f'benchmark data in {root}')
  for column in ('benchmark', 'what', 'state', 'where to get it'):
    table.add_column(column, overflow='fold')
  complete = 0
  chosen = [suite.get(cfg.benchmark).configured(cfg)] if cfg else [b for b in suite.BENCHMARKS.values() if b.needed]
  for benchmark in chosen:
    rows = inspect(benchmark, score.folder_of(cfg, benchmark, root) if cfg else Folder(root, benchmark.folders))
    complete += all(state == OK for _, state, _ in rows)
    for i, (what, state, source) in enumerate(rows):
      colour = 'green' if state == OK else 'red'
      table.add_row('' if i else benchmark.name, what, Text(state, colour), source, end_section=i == len(rows) - 1)
  console = Terminal(width=None if sys.stdout.isatty() else WIDTH, soft_wrap=False)
  console.print(table)
  console.print(f'{complete} of {len(chosen)} benchmarks are complete')
  return int(complete < len(chosen))
