"""ScienceQA, test split: multiple choice; the reported number is that of the questions with an image."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks.base import (
  LETTER,
  LLAVA_EVAL,
  Benchmark,
  Gold,
  Needed,
  Problems,
  Question,
  add_counts,
  canonical,
  image_folder,
  rates,
)
from dynllava_jax.evals.folders import Folder, fields, read_json

OPTIONS = 'ABCDE'
FAILED = 'FAILED'
QUESTIONS, PROBLEMS, SPLITS = 'llava_test_CQM-A.json', 'problems.json', 'pid_splits.json'
SITE = 'https://github.com/lupantech/ScienceQA'


def parse(text: str) -> str:
  """The letter of an answer: alone, as `A. ...`, or in exactly one `The answer is A.`; FAILED otherwise."""
  if text in tuple(OPTIONS):
    return text
  if len(text) >= 3 and text[0] in OPTIONS and text[1:3] == '. ':
    return text[0]
  found = re.findall(r'The answer is ([A-Z]).', text)  # the last dot matches any character, as officially
  return found[0] if len(found) == 1 else FAILED


def choice(letter: str, count: int) -> int:
  """Index of a letter among `count` choices, -1 for FAILED and for a letter beyond them."""
  return OPTIONS[:count].index(letter) if letter in tuple(OPTIONS[:count]) else -1


class ScienceQa(Benchmark):
  """Questions with and without image; right letters from the question file's own answers."""

  name = 'scienceqa'
  metric = 'accuracy in % on questions with an image'
  headline = 'image'
  shown = ('accuracy',)
  folders = ('scienceqa',)
  images = ('images/test', 'images')
  expected_questions = 4241
  max_new_tokens = 1024
  needed = (
    Needed((QUESTIONS,), f'{LLAVA_EVAL}; holds the right letters too'),
    Needed(('images/test', 'images'), SITE, 'images'),
  )

  def _rows(self, path: pathlib.Path) -> list[tuple[str, str, str, str | None]]:
    """(id, question, right letter, image) of every question."""
    rows = []
    for i, row in enumerate(read_json(path), 1):
      id_, turns = fields(row, ('id', 'conversations'), f'{path}, question {i}')
      letter = re.search(r'([A-E])\.?\s*$', turns[1]['value'])
      if not letter:
        raise DataError(f'{path}, question {id_}: the answer {turns[1]["value"]!r} names no letter')
      rows.append((str(id_), turns[0]['value'].replace('<image>', '').strip(), letter.group(1), row.get('image')))
    return rows

  def questions(self, folder: Folder) -> list[Question]:
    base = image_folder(folder, self.images)
    result = []
    for id_, text, _, image in self._rows(folder.need(QUESTIONS)):
      text = f'{text}\n{LETTER}'
      result.append(Question(id_, (text,), f'<image>\n{text}' if image else text, base / image if image else None))
    return result

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    del problems
    path = folder.need_labels(QUESTIONS, PROBLEMS)
    if path.name == PROBLEMS:
      return self._from_problems(path, folder.need(SPLITS))
    return [Gold(id_, (['image' if image else 'text'], letter), canonical(text)) for id_, text, letter, image in self._rows(path)]

  def _from_problems(self, path: pathlib.Path, splits: pathlib.Path) -> list[Gold]:
    """The labels as ScienceQA publishes them."""
    problems, golds = read_json(path), []
    for id_ in fields(read_json(splits), ('test',), str(splits))[0]:
      answer, question = fields(problems.get(id_, {}), ('answer', 'question'), f'{path}, problem {id_}')
      kind = 'image' if problems[id_].get('image') else 'text'
      golds.append(Gold(str(id_), ([kind], OPTIONS[answer]), canonical(question)))
    return golds

  def tally(self, answers: Sequence[tuple[Any, str]]) -> dict[str, float]:
    ((groups, letter), text), *_ = answers
    return add_counts({'n': 1, 'correct': float(parse(text) == letter)}, groups)

  def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
    result = rates(sums)
    return {'image': result.pop('image')} | result if 'image' in result else result
