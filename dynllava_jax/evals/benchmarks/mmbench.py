"""MMBench, dev split, English and Chinese: multiple choice, images inside the table."""

import base64
import csv
import hashlib
import io
import pathlib
import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks.base import LETTER, LETTER_CN, Benchmark, Gold, Needed, Problems, Question, canonical, letter
from dynllava_jax.evals.benchmarks.kinds import only_picture
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.reading import read_text

OPTIONS = 'ABCD'
DIGITS = 18  # of an index, at most
CIRCLE = 1_000_000  # rotations of question i have the indices i + k * CIRCLE
# Cells that pandas, which LLaVA reads the table with, takes for empty; 'none' and 'nan' in any case are LLaVA's own.
EMPTY = {
  '',
  '#N/A',
  '#N/A N/A',
  '#NA',
  '-1.#IND',
  '-1.#QNAN',
  '1.#IND',
  '1.#QNAN',
  '<NA>',
  'N/A',
  'NA',
  'NULL',
  'n/a',
  'null',
  '-nan',
}
NOT_SUBMITTED = ('hint', 'category', 'source', 'image', 'comment', 'l2-category')
COLUMNS = ('index', 'question', *OPTIONS, 'answer', *NOT_SUBMITTED, 'split')
PREDICTION_COLUMN = 6
DOWNLOAD = 'https://download.openmmlab.com/mmclassification/datasets/mmbench/'


def is_empty(cell: str | None) -> bool:
  """Whether a cell of the table counts as absent."""
  return cell is None or cell in EMPTY or cell.lower() in ('nan', 'none', '-nan')


def _picture(row: Mapping[str, str], path: pathlib.Path) -> bytes:
  """The file of a picture; DataError if the cell holds none. Lines may be broken, as base64 tools do."""
  try:
    return base64.b64decode(''.join(row['image'].split()), validate=True)
  except ValueError as e:
    raise DataError(f'{path}, index {row["index"]}: the image is not base64 ({e}); get the table again') from None


class MmBench(Benchmark):
  """The English dev split."""

  name = 'mmbench'
  metric = 'plain accuracy in % on dev, by letter (not the CircularEval with ChatGPT of the leaderboard)'
  folders = ('mmbench',)
  shown = ('circular',)
  table = 'mmbench_dev_20230712.tsv'
  suffix = LETTER
  hint = 'labels are public for the dev split only'
  expected_questions = 4377
  max_new_tokens = 1024
  needed = (Needed((table,), DOWNLOAD + table, 'questions, images and labels'),)
  notes = (
    '`circular` counts a question only if all its rotations are right, as CircularEval does, but reads letters only.',
    '`accuracy` is over all rows of the table, rotations included.',
  )

  def _rows(self, folder: Folder, path) -> list[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # images are base64 in a cell
    try:
      rows = list(csv.DictReader(io.StringIO(read_text(path), newline=''), delimiter='\t'))
    except csv.Error as e:
      raise DataError(f'{path}: no table ({e}); get it again') from None
    if not rows:
      raise DataError(f'{path}: has no row below its header; the table may be cut off, get it again')
    for i, row in enumerate(rows, 1):
      if any(row.get(k) is None for k in ('index', 'question', 'image', 'A')):
        raise DataError(f'{path}, row {i}: lacks index, question, image or A; the table may be cut off, get it again')
      if None in row:
        raise DataError(f'{path}, row {i}: has more cells than the header; get the table again')
      only_picture({k: v for k, v in row.items() if k not in COLUMNS}, f'{path}, row {i}')
      if not row['index'].strip().isdecimal() or len(row['index']) > DIGITS:
        raise DataError(f'{path}, row {i}: index is {reprlib.repr(row["index"])}, expected a whole number; get the table again')
    return rows

  def questions(self, folder: Folder) -> list[Question]:
    path = folder.need(self.table)
    result = []
    for row in self._rows(folder, path):
      options = []
      for name in OPTIONS:
        if is_empty(row.get(name)):
          break
        options.append(row[name])
      stem = row['question'] if is_empty(row.get('hint')) else f'{row["hint"]}\n{row["question"]}'
      prompt = '\n'.join([stem, *(f'{name}. {option}' for name, option in zip(OPTIONS, options))])
      extra = {'round_id': 0, 'options': options, 'option_char': list(OPTIONS[: len(options)])}
      image = _picture(row, path)
      result.append(Question(int(row['index']), (f'{prompt}\n{self.suffix}',), prompt, image, extra))
    return result

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    del problems
    golds = []
    path = folder.need_labels(self.table)
    for row in self._rows(folder, path):
      label = None if is_empty(row.get('answer')) else row['answer'].strip()
      if label is not None and label not in tuple(OPTIONS):
        raise DataError(f'{path}, index {row["index"]}: answer is {label!r}, expected one of {OPTIONS}; get the table again')
      index, image = int(row['index']), hashlib.sha256(_picture(row, path)).digest()
      golds.append(Gold(str(index), label, canonical(row['question']), index % CIRCLE, unit=image))
    return golds

  of_whole_clusters = ('circles', 'all_right')

  def tally(self, answers: Sequence[tuple[Any, str]]) -> dict[str, float]:
    right = [letter(text, OPTIONS) == gold for gold, text in answers]
    return {'n': len(right), 'correct': sum(right), 'circles': 1, 'all_right': all(right)}

  def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
    accuracy = {'accuracy': 100 * sums['correct'] / sums['n']}
    return accuracy | ({'circular': 100 * sums['all_right'] / sums['circles']} if sums.get('circles') else {})

  def submission(self, folder: Folder, rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, bytes]:
    import openpyxl  # here, as scoring needs no spreadsheet

    answers = {str(r['question_id']): r['text'] for r in rows}
    table = self._rows(folder, folder.need(self.table))
    columns = [c for c in table[0] if c not in NOT_SUBMITTED]
    columns.insert(PREDICTION_COLUMN, 'prediction')
    book = openpyxl.Workbook()
    book.active.append(columns)
    for row in table:
      row = {k: None if v in EMPTY else v for k, v in row.items()} | {'index': int(row['index'])}
      text = answers.get(str(row['index']))
      row['prediction'] = text and openpyxl.cell.cell.ILLEGAL_CHARACTERS_RE.sub('', text)
      book.active.append([row[c] for c in columns])
      for cell in book.active[book.active.max_row]:
        cell.data_type = 's' if isinstance(cell.value, str) else cell.data_type  # '=1+1' is an answer, not a formula
    content = io.BytesIO()
    book.save(content)
    return {f'answers_upload/{self.table.removesuffix(".tsv")}/{name}.xlsx': content.getvalue()}


class MmBenchCn(MmBench):
  """The Chinese dev split."""

  name = 'mmbench_cn'
  folders = ('mmbench_cn', 'mmbench')
  table = 'mmbench_dev_cn_20231003.tsv'
  suffix = LETTER_CN
  expected_questions = 4329  # of the releases of 2023-10-03, in either language; the English file of July has 48 more
  needed = (Needed((table,), DOWNLOAD + table, 'questions, images and labels'),)
