"""MME: yes/no questions in pairs, 14 categories."""

import pathlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks.base import LLAVA_EVAL, Gold, Lines, Needed, Problems, added, canonical
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.reading import read_text

PERCEPTION = ('existence', 'count', 'position', 'color', 'posters', 'celebrity', 'scene', 'landmark', 'artwork', 'OCR')
COGNITION = ('commonsense_reasoning', 'numerical_calculation', 'text_translation', 'code_reasoning')
CATEGORIES = PERCEPTION + COGNITION
SITE = 'https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation'
RELEASE = ('MME_Benchmark_release_version/MME_Benchmark', 'MME_Benchmark_release_version')
RESULTS = ('eval_tool/Your_Results', 'eval_tool/LaVIN', 'eval_tool/answers/llava-v1.5-13b', 'eval_tool')


def parse(text: str) -> str:
  """'yes', 'no' or 'other': the whole answer, else what its first four letters hold."""
  text = text.lower()
  if text in ('yes', 'no'):
    return text
  return 'yes' if 'yes' in text[:4] else 'no' if 'no' in text[:4] else 'other'


def read_labels(path: pathlib.Path) -> Iterator[tuple[str, str, str, str]]:
  """(category, image name without ending, question as released, yes or no) from one of the layouts in use.

  The release has a folder per category with a text file per image; the evaluation tool a text file per category
  with image, question and label (and perhaps an answer) between tabs.

  Raises:
    DataError: a category that is missing or has no labels, or a malformed line.
  """
  for category in CATEGORIES:
    folder, table = path / category, path / f'{category}.txt'
    if folder.is_dir():
      inner = folder / 'questions_answers_YN'
      files = sorted((inner if inner.is_dir() else folder).glob('*.txt'))
      rows = [(f, f.stem, *line) for f in files for line in _lines(f)]
    elif table.is_file():
      rows = [(table, line[0].rpartition('.')[0] or line[0], *line[1:]) for line in _lines(table)]
    else:
      raise DataError(
        f'{path}: has no category {category!r}; expected the folder {folder} or the file {table}; get the release again'
      )
    if not rows:
      raise DataError(
        f'{folder if folder.is_dir() else table}: has no labels; expected a text file per image, or a line per question'
      )
    for file, stem, *cells in rows:
      if len(cells) < 2 or cells[1].lower() not in ('yes', 'no'):
        raise DataError(f'{file}: {cells} has no yes-or-no label; expected question and label between tabs; get it again')
      yield category, stem, cells[0], cells[1].lower()


def _lines(path: pathlib.Path) -> list[list[str]]:
  return [[c.strip() for c in line.split('\t')] for line in read_text(path).split('\n') if line.strip()]


def find_labels(folder: Folder) -> pathlib.Path:
  """The first place that has labels of every category; the release may be there with its images alone."""
  if folder.labels:
    return folder.need_labels()
  for place in RELEASE + RESULTS:
    path = folder.find(place)
    if path and all((path / f'{c}.txt').is_file() or next((path / c).rglob('*.txt'), None) for c in CATEGORIES):
      return path
  return folder.need(*RELEASE, *RESULTS)


def _key(category: str, stem: str, question: str) -> Hashable:
  return category, stem, canonical(question)


class Mme(Lines):
  """Per category accuracy and accuracy+ (both questions of an image right)."""

  name = 'mme'
  metric = 'perception: sum over 10 categories of accuracy + accuracy+, of 2000'
  headline = 'perception'
  shown = ('cognition',)
  folders = ('MME',)
  question_file = 'llava_mme.jsonl'
  images = RELEASE
  expected_questions = 2374
  of_whole_clusters = ('images', 'both')
  categories = PERCEPTION  # that the reported score sums
  needed = (
    Needed((question_file,), LLAVA_EVAL),
    Needed(RELEASE + RESULTS, SITE, 'labels'),
    Needed(RELEASE, SITE, 'images'),
  )
  notes = ('Moves by up to 20 points between runs that differ in rounding only; look at the answers that differ.',)

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    del problems
    golds = {}
    for category, stem, question, label in read_labels(find_labels(folder)):
      key = _key(category, stem, question)
      golds[key] = Gold(key, (category, label), cluster=(category, stem))
    return list(golds.values())

  def key(self, row: Mapping[str, Any]) -> Hashable:
    if 'prompt' not in row:
      raise DataError(
        f'answer {row["question_id"]!r}: has no prompt; every image has two questions, so write the prompt beside the text'
      )
    category, _, file = str(row['question_id']).partition('/')
    return _key(category, file.rpartition('/')[2].rpartition('.')[0], row['prompt'])

  def tally(self, answers: Sequence[tuple[Any, str]]) -> dict[str, float]:
    category = answers[0][0][0]
    right = [parse(text) == label for (_, label), text in answers]
    return {f'{category}/n': len(right), f'{category}/correct': sum(right), f'{category}/images': 1, f'{category}/both': all(right)}

  def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
    scores = {
      c: 100 * sums[f'{c}/correct'] / sums[f'{c}/n'] + 100 * sums[f'{c}/both'] / sums[f'{c}/images']
      for c in CATEGORIES
      if sums.get(f'{c}/images')
    }
    groups = {'perception': PERCEPTION, 'cognition': COGNITION}
    return {g: added(scores[c] for c in names if c in scores) for g, names in groups.items() if scores.keys() & set(names)} | scores

  def submission(self, folder: Folder, rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, bytes]:
    labels = {_key(c, s, q): (c, s, q, a) for c, s, q, a in read_labels(find_labels(folder))}
    tables = {c: [] for c in CATEGORIES}
    for row in sorted(rows, key=lambda r: str(r['question_id'])):
      category, stem, question, label = labels[self.key(row)]
      answer = ' '.join(row['text'].split())
      tables[category].append('\t'.join((f'{stem}.txt', question, label.capitalize(), answer)) + '\n')
    return {f'eval_tool/answers/{name}/{c}.txt': ''.join(lines).encode() for c, lines in tables.items() if lines}
