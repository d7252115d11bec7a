"""Questions of one's own: a file in LLaVA's format, and a folder of pictures.

    {"question_id": 1, "image": "dog.jpg", "text": "What is it?"}
    {"question_id": 2, "text": "What is 1 + 1?", "answer": "2"}

One object per line, or a JSON list of them. `config.labels` names the file and `--data` the folder. The text is asked as it stands,
without image if the row names none. Where all rows have an `answer`, answers are scored by exact match.
"""

import collections
import pathlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from dynllava_jax import paths, remote
from dynllava_jax.config import ConfigError, EvalConfig
from dynllava_jax.data.conversation import IMAGE_TOKEN
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks.base import Benchmark, Gold, Needed, Problems, Question, add_counts, canonical, rates
from dynllava_jax.evals.benchmarks.kinds import only_picture, picture_below
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.reading import ID, check_label, fields, read_lines, read_list

UNSCORED = 'none: the questions have no answers to compare with'


class OwnQuestions(Benchmark):
  """The questions of a file; what they are scored by depends on what its rows have."""

  name = 'questions'
  metric = 'accuracy in %, exact match'
  folders = ('.',)
  needed = ()
  images = ('.',)
  max_new_tokens = 1024
  hint = 'use the answers to this question file'

  def __init__(self, path: str = ''):
    self._rows = _read(remote.fetched(paths.given(path, 'config.labels'))) if path else []
    self._repeated = any(n > 1 for n in collections.Counter(str(row['question_id']) for row in self._rows).values())
    self.scored = bool(self._rows) and 'answer' in self._rows[0]
    if not self.scored:
      self.metric = UNSCORED
    if any(only_picture(row, path) for row in self._rows):
      self.needed = (Needed(self.images, 'the folder of the pictures', 'images'),)

  def configured(self, cfg: EvalConfig) -> 'OwnQuestions':
    if not cfg.labels:
      raise ConfigError('config.labels: is empty; name the question file with --config.labels=FILE')
    return OwnQuestions(cfg.labels)

  def questions(self, folder: Folder) -> list[Question]:
    result = []
    for i, row in enumerate(self._rows, 1):
      image = picture_below(folder, folder.root, row, f'{folder.labels}, question {i}')
      text = row['text']
      if image and text.count(IMAGE_TOKEN) == 1:  # as in training data; it is put in front anyhow
        text = text.replace(IMAGE_TOKEN, '').strip()
      result.append(Question(row['question_id'], (text,), text, image, long=not self.scored))
    return result

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    del problems
    golds = []
    for q, row in zip(self.questions(folder), self._rows):
      groups = [row['category']] if isinstance(row.get('category'), str) and row['category'] else []
      label = (groups, row['answer']) if self.scored else None
      unit = str(q.image) if q.image else None
      golds.append(Gold(self.key({'question_id': q.id, 'prompt': q.prompt}), label, canonical(q.prompt), unit=unit))
    return golds

  def key(self, row: Mapping[str, Any]) -> Hashable:
    """The id; with the question where ids repeat, as in TextVQA's file."""
    if not self._repeated:
      return str(row['question_id'])
    if 'prompt' not in row:
      raise DataError(
        f'answer {row["question_id"]!r}: has no prompt; ids repeat in the question file, so write the prompt beside the text'
      )
    return str(row['question_id']), canonical(row['prompt'])

  def tally(self, answers: Sequence[tuple[Any, str]]) -> dict[str, float]:
    ((groups, expected), text), *_ = answers
    return add_counts({'n': 1, 'correct': float(text.strip() == expected.strip())}, groups)

  def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
    return rates(sums)


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows, checked, without what is null; DataError for one that cannot be asked, or if only some have an answer."""
  rows = []
  for i, row in enumerate(read_list(path) if path.suffix == '.json' else read_lines(path), 1):
    where = f'{path}, question {i}'
    fields(row, {'question_id': ID, 'text': str}, where)
    row = {name: value for name, value in row.items() if value is not None}
    if isinstance(row.get('answer'), (int, float)) and not isinstance(row['answer'], bool):
      row['answer'] = str(row['answer'])
    if not isinstance(row.get('answer', ''), str):
      raise DataError(f'{where}: answer is {row["answer"]!r}, expected a text; write the one answer that is right, or none')
    if 'answer' in row:
      check_label(row['answer'], where)
    rows.append(row)
  having = sum('answer' in row for row in rows)
  if having not in (0, len(rows)):
    raise DataError(f'{path}: {having} of {len(rows)} questions have an answer; give one to all of them, or to none')
  return rows
