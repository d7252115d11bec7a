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
from dynllava_jax.evals.benchmarks.kinds import only_picture
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.reading import ID, fields, read_list, read_objects

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


def right_letter(choices: Any, index: Any, where: str) -> str:
  """The letter of the right one of `choices`; DataError if there is none."""
  if not isinstance(choices, list) or not 0 < len(choices) <= len(OPTIONS):
    raise DataError(f'{where}: choices are {choices!r}, expected a list of at most {len(OPTIONS)}; get {PROBLEMS} again')
  if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
    raise DataError(f'{where}: answer is {index!r}, expected the number of one of its {len(choices)} choices, from 0; get it again')
  return OPTIONS[index]


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
    for i, row in enumerate(read_list(path), 1):
      where = f'{path}, question {i}'
      id_, turns = fields(row, {'id': ID, 'conversations': list}, where)
      if len(turns) < 2:
        raise DataError(f'{where}: conversations has {len(turns)} turns, expected a question and its answer; get the file again')
      question, answer = (fields(turns[i], {'value': str}, f'{where}, turn {i}')[0] for i in range(2))
      # Explanations may follow, and may end with a letter that is part of a word.
      letter = re.search(r'The answer is ([A-E])\b', answer) or re.search(r'(?<![A-Za-z])([A-E])\.?\s*$', answer)
      if not letter:
        raise DataError(
          f'{where}, id {id_}: the answer {answer!r} names no letter; expected a file of LLaVA whose answers end with it'
        )
      rows.append((str(id_), question.replace('<image>', '').strip(), letter.group(1), only_picture(row, where)))
    return rows

  def questions(self, folder: Folder) -> list[Question]:
    base = image_folder(folder, self.images)
    result = []
    path = folder.need(QUESTIONS)
    for id_, text, _, image in self._rows(path):
      text = f'{text}\n{LETTER}'
      file = folder.image(base, image, f'{path}, question {id_}') if image else None
      result.append(Question(id_, (text,), f'<image>\n{text}' if image else text, file))
    return result

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    del problems
    path = folder.need_labels(QUESTIONS, PROBLEMS)
    if path.name == PROBLEMS:
      return self._from_problems(path, folder.need(SPLITS))
    return [Gold(id_, (['image' if image else 'text'], letter), canonical(text)) for id_, text, letter, image in self._rows(path)]

  def _from_problems(self, path: pathlib.Path, splits: pathlib.Path) -> list[Gold]:
    """The labels as ScienceQA publishes them."""
    problems, golds = read_objects(path), []
    for id_ in map(str, fields(read_objects(splits), {'test': list}, str(splits))[0]):
      if id_ not in problems:
        raise DataError(f'{splits}: test names problem {id_}, which {path} lacks; get both files of one release')
      where = f'{path}, problem {id_}'
      answer, question, choices = fields(problems[id_], {'answer': int, 'question': str, 'choices': list}, where)
      kind = 'image' if problems[id_].get('image') else 'text'
      golds.append(Gold(id_, ([kind], right_letter(choices, answer, where)), canonical(question)))
    return golds

  def metric_of(self, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """Says so if the model was not shown the images: LLaVA's prompts name them."""
    prompts = [row['prompt'] for row in rows if row.get('prompt')]
    blind = bool(prompts) and not any('<image>' in p for p in prompts)
    return self.metric + (', asked without naming the image in the prompt' if blind else '')

  def tally(self, answers: Sequence[tuple[Any, str]]) -> dict[str, float]:
    ((groups, letter), text), *_ = answers
    return add_counts({'n': 1, 'correct': float(parse(text) == letter)}, groups)

  def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
    result = rates(sums)
    return {'image': result.pop('image')} | result if 'image' in result else result
