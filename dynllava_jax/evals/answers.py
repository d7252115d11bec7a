"""Answer files, joined with labels by key; whatever does not fit is refused."""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks.base import Benchmark, Gold, Problems, canonical
from dynllava_jax.evals.reading import ID, fields, read_lines

DIGEST = 'row_sha256'  # in a row's metadata
OTHER_WORDS = 'answers whose prompt is worded differently, scored by id'


@dataclasses.dataclass(frozen=True)
class Labels:
  """What is scored against.

  `golds`: labels of the questions asked; `sizes`: questions in each cluster, those that are not asked included.
  """

  golds: tuple[Gold, ...]
  sizes: Mapping[Hashable, int]

  def of(self, keys: Iterable[Hashable]) -> 'Labels':
    """The labels of these questions only, of a key that stands for several as many as there are in `keys`."""
    left = collections.Counter(keys)
    golds = []
    for gold in self.golds:
      if left[gold.key]:
        left[gold.key] -= 1
        golds.append(gold)
    return Labels(tuple(golds), self.sizes)


def labels_of(golds: Sequence[Gold]) -> Labels:
  """All labels of a benchmark."""
  return Labels(tuple(golds), collections.Counter(g.cluster for g in golds if g.cluster is not None))


@dataclasses.dataclass(frozen=True)
class Joined:
  """(gold, answer row) pairs in the order of the labels.

  `total` is the number of labels, `sizes` as in `Labels`.
  """

  pairs: tuple[tuple[Gold, dict[str, Any]], ...]
  total: int
  sizes: Mapping[Hashable, int]


def read_answers(benchmark: Benchmark, path: pathlib.Path, problems: Problems) -> list[dict[str, Any]]:
  """Rows of a LLaVA answer file; unreadable ones go to `problems`.

  Raises:
    DataError: no such file, or a row that `check_row` refuses.
  """
  rows = read_lines(path, lambda message: problems.add('unreadable lines', message))
  return [check_row(row, f'{path}, answer {i}', benchmark.several_rounds) for i, row in enumerate(rows, 1)]


def check_row(row: dict[str, Any], where: str, several_rounds: bool = True) -> dict[str, Any]:
  """A row of an answer file without what is null in it.

  Raises:
    DataError: no `question_id` or `text`, fields of other types, or a digest that is not that of the row.
  """
  _, text = fields(row, {'question_id': ID, 'text': (str, list)}, where)
  rounds = several_rounds and isinstance(text, list) and all(isinstance(t, str) for t in text)
  if not isinstance(text, str) and not rounds:
    wanted = 'a string, or one for each round' if several_rounds else 'a string'
    raise DataError(f'{where}: text is {text!r}, expected {wanted}; write the answer as LLaVA does')
  for name, kind in (('prompt', str), ('metadata', dict)):
    if row.get(name) is not None and not isinstance(row[name], kind):
      raise DataError(f'{where}: {name} is {row[name]!r}, expected {kind.__name__}; leave it out, or write it as LLaVA does')
  given = (row.get('metadata') or {}).get(DIGEST)
  if given is not None and given != digest(row):
    raise DataError(
      f'{where}: was changed since it was made, its {DIGEST} is of another row; get the file again, or take '
      f'metadata.{DIGEST} out if the change is meant'
    )
  return {name: value for name, value in row.items() if value is not None}


def digest(row: Mapping[str, Any]) -> str:
  """SHA-256 of an answer row with everything in it but the digest itself."""
  metadata = {name: value for name, value in row.get('metadata', {}).items() if name != DIGEST}
  return hashlib.sha256(json.dumps(dict(row) | {'metadata': metadata}, sort_keys=True).encode()).hexdigest()


def sealed(row: Mapping[str, Any]) -> dict[str, Any]:
  """The row with its digest."""
  return dict(row) | {'metadata': row['metadata'] | {DIGEST: digest(row)}}


def join(benchmark: Benchmark, labels: Labels, rows: Sequence[dict[str, Any]], problems: Problems, by_id: bool = False) -> Joined:
  """Pairs labels with answers by the benchmark's key; what has no partner goes to `problems`.

  Where the key is an id, the prompt tells whether the answer is to the question of that id. With `by_id` the id alone decides, as
  in the official scorers, and answers to other words are counted.

  A key may stand for several questions (it does in SEED and TextVQA); then it needs as many answers. Of surplus
  copies of an answer the last counts, as in the official scorers.
  """
  asked: dict[Hashable, list[Gold]] = {}
  given: dict[Hashable, list[dict[str, Any]]] = {}
  for gold in labels.golds:
    asked.setdefault(gold.key, []).append(gold)
  for row in rows:
    given.setdefault(benchmark.key(row), []).append(row)
  for key in (k for k in given if k not in asked):
    for _ in given[key]:
      problems.add('answers to questions that were not asked', _show(key))
  pairs = []
  for key, questions in asked.items():
    answers = given.get(key, [])
    for _ in range(len(questions) - len(answers)):
      problems.add('questions without an answer', _show(key))
    for _ in range(len(answers) - len(questions)):
      problems.add('answers given more than once', _show(key))
    answers = answers[-len(questions) :]
    if benchmark.last_answer_wins:
      answers = answers[-1:] * len(answers)
    for gold, row in zip(questions, answers):
      if gold.label is None and benchmark.scored:
        problems.add('questions without a label', f'{_show(key)}: {gold.expected!r}')
      elif len(questions) == 1 and 'prompt' in row and gold.expected not in canonical(row['prompt']):
        kind = OTHER_WORDS if by_id else 'answers to another question'
        problems.add(kind, f'{_show(key)}: asked {gold.expected!r}, answered {canonical(row["prompt"])!r}')
        if by_id:
          pairs.append((gold, row))
      else:
        pairs.append((gold, row))
  return Joined(tuple(pairs), len(labels.golds), labels.sizes)


def _show(key: Hashable) -> str:
  return ' '.join(map(str, key)) if isinstance(key, tuple) else str(key)
