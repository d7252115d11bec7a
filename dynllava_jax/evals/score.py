"""Scores answer files: one JSON-ready result, with bootstrap intervals."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from dynllava_jax import paths
from dynllava_jax.config import ConfigError, EvalConfig
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.answers import OTHER_WORDS, Joined, Labels, join, labels_of, read_answers
from dynllava_jax.evals.benchmarks import suite
from dynllava_jax.evals.benchmarks.base import Benchmark, Problems, Question
from dynllava_jax.evals.benchmarks.kinds import check_words
from dynllava_jax.evals.folders import Folder
from dynllava_jax.files import write_atomically

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Tallies:
  """What every cluster of answers adds.

  `columns`: C names; `counts`: float64[K, C]; `units`: int[K], the unit that each cluster is drawn with, numbered from 0.
  """

  columns: tuple[str, ...]
  counts: np.ndarray
  units: np.ndarray


def tally(benchmark: Benchmark, joined: Joined) -> Tallies:
  """Counts of a joined answer file, cluster by cluster."""
  groups: dict[Hashable, list] = {}
  unit_of: dict[Hashable, Hashable] = {}
  for i, (gold, row) in enumerate(joined.pairs):
    cluster = (gold.key, i) if gold.cluster is None else gold.cluster
    groups.setdefault(cluster, []).append((gold.label, row))
    unit_of.setdefault(cluster, cluster if gold.unit is None else gold.unit)
  number = {unit: i for i, unit in enumerate(dict.fromkeys(unit_of.values()))}
  try:
    counted = [benchmark.tally([(label, benchmark.seen(row)) for label, row in group]) for group in groups.values()]
  except ValueError as e:
    raise DataError(f'{benchmark.name}: {e}') from None
  except (KeyError, TypeError, AttributeError, OverflowError) as e:
    raise DataError(f'{benchmark.name}: an answer or label is not laid out as expected; docs/evaluation.md says how') from e
  for one, (cluster, group) in zip(counted, groups.items()):
    if len(group) < joined.sizes.get(cluster, 1):
      for column in [c for c in one if c.rpartition('/')[2] in benchmark.of_whole_clusters]:
        del one[column]
  columns = tuple(dict.fromkeys(c for counts in counted for c in counts))
  place = {c: i for i, c in enumerate(columns)}
  counts = np.zeros((len(counted), len(columns)))
  for i, one in enumerate(counted):
    for column, value in one.items():
      counts[i, place[column]] = value
  return Tallies(columns, counts, np.array([number[unit] for unit in unit_of.values()]))


def figures(benchmark: Benchmark, tallies: Tallies, weights: np.ndarray | None = None) -> dict[str, float]:
  """The benchmark's results; `weights` int[K] counts each cluster several times.

  Raises:
    DataError: not defined for these answers, such as a precision without any 'yes'.
  """
  sums = tallies.counts.sum(0) if weights is None else weights @ tallies.counts
  try:
    found = benchmark.figures(dict(zip(tallies.columns, map(float, sums))))
  except (ZeroDivisionError, KeyError):
    raise DataError(
      f'{benchmark.name}: the score is not defined for these answers (a rate over nothing); look at what they say'
    ) from None
  wrong = next((name for name, value in found.items() if not math.isfinite(value)), None)
  if wrong:
    raise DataError(f'{benchmark.name}: {wrong} is {found[wrong]}; look for numbers in the answers that are none')
  return found


def headline(benchmark: Benchmark, found: Mapping[str, float]) -> str:
  """Name of the figure that is the score; DataError if no answered question counts for it."""
  name = benchmark.headline_of(found)
  if name not in found:
    raise DataError(
      f'{benchmark.name} reports {name!r}, and no answered question counts for it; answer such questions too, or look at the labels'
    )
  return name


def bootstrap(benchmark: Benchmark, tallies: Tallies, reference: Tallies | None = None) -> list[float]:
  """95 % percentile interval of the headline score, or of its difference to `reference` on the same clusters.

  Units are drawn with replacement; both runs are given the same draws (paired). A draw that misses a category which the score sums
  is of another score and does not count; where that is most of them, there is no interval.
  """
  rng = np.random.default_rng(0)
  whole = figures(benchmark, tallies)
  name, parts = headline(benchmark, whole), benchmark.parts_of(whole)
  count = tallies.units.max() + 1
  values = []
  for _ in range(RESAMPLES):
    weights = np.bincount(rng.integers(count, size=count), minlength=count)[tallies.units]
    try:
      drawn = [figures(benchmark, run, weights) for run in (tallies, reference) if run]
      if all(benchmark.parts_of(one) == parts for one in drawn):
        values.append(drawn[0][name] - (drawn[1][name] if reference else 0))
    except (DataError, KeyError):
      continue  # a draw for which the score is not defined, possible only with a handful of questions
  if len(values) < RESAMPLES / 2:
    return []
  return [float(v) for v in np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])]


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
  """What malformed files raise becomes a DataError about `what`."""
  try:
    yield
  except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as e:
    if isinstance(e, ConfigError):
      raise
    raise DataError(f'{what} are not laid out as expected; docs/evaluation.md names the files, get them again') from e


@contextlib.contextmanager
def told_of(path: pathlib.Path) -> Iterator[None]:
  """A DataError about answers tells the file that they are in."""
  try:
    yield
  except DataError as e:
    if str(path) in str(e):
      raise
    raise DataError(f'{path}: {e}', e.reason) from None


def questions(benchmark: Benchmark, folder: Folder) -> list[Question]:
  """The benchmark's questions; DataError if they are missing, laid out in another way, or none."""
  with readable(f'{benchmark.name}: its questions'):
    found = benchmark.questions(folder)
  path = folder.find(*benchmark.needed[0].paths) if benchmark.needed else None  # of its questions
  named = f' ({path})' if path and path.is_file() else ''
  if not found:
    raise DataError(f'{benchmark.name}: there is no question in its files{named}; get them again')
  for question in found:
    for text in question.text:
      check_words(text, f'{benchmark.name}{named}, question {question.id}')
  return found


def labels(benchmark: Benchmark, folder: Folder, problems: Problems) -> Labels:
  """The benchmark's labels; DataError if they are missing or laid out in another way."""
  with readable(f'{benchmark.name}: its labels'):
    golds = benchmark.golds(folder, problems)
  if not golds:
    raise DataError(f'{benchmark.name}: there is no label in its files; get them again')
  return labels_of(golds)


def submission(benchmark: Benchmark, folder: Folder, rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, bytes]:
  """`Benchmark.submission`; DataError if a file that it needs is missing or laid out in another way."""
  with readable(f'{benchmark.name}: the files of its submission'):
    return benchmark.submission(folder, rows, name)


def join_file(benchmark: Benchmark, folder: Folder, path: pathlib.Path, allow_partial: bool) -> tuple[Joined, Problems]:
  """An answer file with its labels.

  Raises:
    DataError: something does not fit and `allow_partial` is off, or nothing fits.
  """
  problems = Problems()
  expected = labels(benchmark, folder, problems)
  with told_of(path):
    rows = read_answers(benchmark, path, problems)
    joined = join(benchmark, expected, rows, problems, by_id=allow_partial)
  if problems and not allow_partial:
    raise DataError(
      f'{path}: these answers and the labels of {benchmark.name} do not fit together ({len(joined.pairs)} of {joined.total} do):\n'
      f'{problems}\n{benchmark.hint}; --allow_partial scores what fits'
    )
  if not joined.pairs:
    raise DataError(f'{path}: no answer fits a label of {benchmark.name}:\n{problems}\n{benchmark.hint}')
  return joined, problems


def score_file(benchmark: Benchmark, folder: Folder, path: pathlib.Path, allow_partial: bool) -> dict[str, Any]:
  """Scores an answer file made here or elsewhere; DataError as `join_file`.

  Returns:
    A JSON-ready dict; `score` is None where the labels are not public. `n` questions are scored, `answered` tells how many of all
    have an answer that is not empty.
  """
  joined, problems = join_file(benchmark, folder, path, allow_partial)
  result = {'benchmark': benchmark.name, 'score': None, 'metric': benchmark.metric}
  rows = [row for _, row in joined.pairs]
  answered = sum(bool(''.join(row['text']).strip()) for row in rows)
  counts = {'answered': f'{answered}/{joined.total}', 'n': len(rows), 'total': joined.total}
  if benchmark.scored:
    with told_of(path):
      tallies = tally(benchmark, joined)
      found = figures(benchmark, tallies)
      name = headline(benchmark, found)
    differing = problems.counts().get(OTHER_WORDS)
    result |= {
      'score': found[name],
      'metric': benchmark.metric_of(found, rows) + (f' ({differing:,} prompts worded differently)' if differing else ''),
      'headline': name,
      'interval': bootstrap(benchmark, tallies),
    }
    counts['figures'] = found
  notes = benchmark.remarks()
  if answered < len(rows):
    notes.append(f'{len(rows) - answered:,} answers are empty; they are scored by the same rule as the others.')
  return result | counts | {'problems': problems.counts(), 'answers': paths.named(path), 'notes': notes}


def folder_of(cfg: EvalConfig, benchmark: Benchmark, data: pathlib.Path | None) -> Folder:
  """Where the benchmark's files are; DataError if it has files and `data` is None."""
  if data is None and benchmark.needed:
    raise DataError(f'{benchmark.name}: --data=DIR is missing; `python eval.py --check_data --data=DIR` says what it must hold')
  return Folder(data or pathlib.Path(), benchmark.folders, cfg.labels, cfg.allow_outside)


def run(
  cfg: EvalConfig, path: pathlib.Path, data: pathlib.Path | None, allow_partial: bool, out: pathlib.Path | None
) -> dict[str, Any]:
  """`score_file` for a config; writes the submission files to `out` if that is given. `data` as for `folder_of`.

  Raises:
    ConfigError: unknown benchmark, or a number of questions, which is for runs.
    DataError: see `score_file`.
  """
  benchmark = suite.get(cfg.benchmark).configured(cfg)
  if cfg.questions and benchmark.needed:
    raise ConfigError('config.questions: an answer file is scored against all labels; to score a part of them give --allow_partial')
  folder = folder_of(cfg, benchmark, data)
  result = score_file(benchmark, folder, path, allow_partial)
  if out is None:
    return result
  return result | {'submission': write_submission(benchmark, folder, path, out, path.stem, allow_partial)}


def write_submission(
  benchmark: Benchmark, folder: Folder, path: pathlib.Path, out: pathlib.Path, name: str, allow_partial: bool
) -> list[str]:
  """Writes what the benchmark's server or official tool wants; the paths written."""
  joined, _ = join_file(benchmark, folder, path, allow_partial)
  with told_of(path):
    files = submission(benchmark, folder, [row for _, row in joined.pairs], name)
  for file, content in files.items():
    write_atomically(out / file, content)
  return [str(out / file) for file in files]


def scorable(
  cfg: EvalConfig, benchmark: Benchmark, folder: Folder, questions: Sequence[Question], console: Console
) -> Labels | None:
  """Labels of these questions; None, with a word on the console, where there are none.

  Raises:
    DataError: the labels are not those of the questions.
  """
  if not benchmark.scored:
    console.print(f'{benchmark.name}: {benchmark.metric}')
    return None
  problems = Problems()
  try:
    found = labels(benchmark, folder, problems)
  except DataError as e:
    console.print(f'will not be scored: {e}')
    return None
  asked = [{'question_id': q.id, 'prompt': q.prompt, 'text': ''} for q in questions]
  if cfg.questions:
    found, problems = found.of(benchmark.key(row) for row in asked), Problems()
  join(benchmark, found, asked, problems)
  if problems:
    raise DataError(f'{benchmark.name}: questions and labels do not fit together:\n{problems}\n{benchmark.hint}')
  return found
