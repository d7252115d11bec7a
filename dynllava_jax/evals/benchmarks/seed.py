"""SEED-Bench: multiple choice over images and video frames."""

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks.base import LLAVA_EVAL, Gold, Lines, Needed, Problems, add_counts, canonical, rates
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.reading import ID, fields, optional, read_objects

LABELS = 'SEED-Bench.json'
LETTERS = list('ABCD')
SITE = 'https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md'


def number(question_id: str | int) -> str:
  """The id as the official scorer compares it: a number where Python reads it as one."""
  try:
    return str(int(question_id))
  except ValueError:
    return str(question_id)


class Seed(Lines):
  """Exact match of the letter, per question type and medium."""

  name = 'seed'
  metric = 'accuracy in % over images and videos'
  media = ('image', 'video')
  folders = ('seed_bench',)
  shown = ('image', 'video')
  question_file = 'llava-seed-bench.jsonl'
  images = ('.',)
  expected_questions = 19242
  last_answer_wins = True
  needed = (
    Needed((question_file,), LLAVA_EVAL),
    Needed((LABELS,), SITE, 'labels'),
    Needed(('SEED-Bench-image',), SITE, 'images'),
    Needed(('SEED-Bench-video-image',), f'{SITE}, then the middle frame of every video', 'images'),
  )

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    del problems
    path = folder.need_labels(LABELS)
    types, rows = fields(read_objects(path), {'question_type': dict, 'questions': list}, str(path))
    fields(types, dict.fromkeys(types, int), f'{path}, question_type')
    names = {number: name for name, number in types.items()}
    golds = []
    for i, row in enumerate(rows, 1):
      where = f'{path}, question {i}'
      id_, kind, medium, answer = fields(row, {'question_id': ID, 'question_type_id': int, 'data_type': str, 'answer': str}, where)
      if kind not in names or answer not in LETTERS:
        what = f'question_type_id is {kind!r} and answer {answer!r}'
        raise DataError(f'{where}: {what}, expected one of {list(names)} and one of {LETTERS}; get the file again')
      golds.append(
        Gold(
          number(id_),
          ([medium, names[kind]], answer),
          canonical(optional(row, 'question', str, where) or ''),
          unit=optional(row, 'data_id', ID, where),
        )
      )
    return golds

  def key(self, row: Mapping[str, Any]) -> Hashable:
    return number(row['question_id'])

  def metric_of(self, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]] = ()) -> str:
    if not rows:
      return self.metric
    found = [f'{medium}s' for medium in self.media if medium in figures]
    return f'accuracy in % over {" and ".join(found)}' + (' alone' if len(found) == 1 else '')

  def tally(self, answers: Sequence[tuple[Any, str]]) -> dict[str, float]:
    ((groups, gold), text), *_ = answers
    return add_counts({'n': 1, 'correct': float(text == gold)}, groups)

  def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
    return rates(sums)

  def submission(self, folder: Folder, rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, bytes]:
    lines = [json.dumps({'question_id': str(r['question_id']), 'prediction': r['text']}) + '\n' for r in rows]
    return {f'answers_upload/{name}.jsonl': ''.join(lines).encode()}
