"""GQA, testdev balanced: exact match of the lower-cased answer."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dynllava_jax.evals.benchmarks.base import LLAVA_EVAL, Gold, Lines, Needed, Problems, add_counts, canonical, rates
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.reading import ID, check_label, fields, optional, read_objects

LABELS = tuple(f'{d}testdev_balanced_questions.json' for d in ('data/', 'data/questions/', 'data/questions1.2/', ''))
SITE = 'https://cs.stanford.edu/people/dorarad/gqa/download.html'


def prediction(text: str) -> str:
  """What LLaVA submits for an answer."""
  return text.rstrip('.').lower()


class Gqa(Lines):
  """Exact match on testdev balanced; `binary` and `open` questions apart."""

  name = 'gqa'
  metric = 'accuracy in %, exact match'
  folders = ('gqa',)
  shown = ('binary', 'open')
  question_file = 'llava_gqa_testdev_balanced.jsonl'
  images = ('data/images', 'images')
  expected_questions = 12578
  needed = (
    Needed(('llava_gqa_testdev_balanced.jsonl',), LLAVA_EVAL),
    Needed(LABELS, SITE, 'labels'),
    Needed(('data/images', 'images'), SITE, 'images'),
  )
  notes = ('Consistency, validity, plausibility and distribution need further files of GQA and are not computed.',)

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    del problems
    path = folder.need_labels(*LABELS)
    golds = []
    for id_, row in read_objects(path).items():
      where = f'{path}, question {id_}'
      answer, question = fields(row, {'answer': str, 'question': str}, where)
      types = optional(row, 'types', dict, where) or {}
      kind = 'open' if optional(types, 'structural', str, f'{where}, types') == 'query' else 'binary'
      golds.append(
        Gold(str(id_), (kind, check_label(answer, where)), canonical(question), unit=optional(row, 'imageId', ID, where))
      )
    return golds

  def tally(self, answers: Sequence[tuple[Any, str]]) -> dict[str, float]:
    ((kind, gold), text), *_ = answers
    return add_counts({'n': 1, 'correct': float(prediction(text) == gold)}, [kind])

  def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
    return rates(sums)

  def submission(self, folder: Folder, rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, bytes]:
    content = [{'questionId': r['question_id'], 'prediction': prediction(r['text'])} for r in rows]
    return {f'answers_upload/{name}/testdev_balanced_predictions.json': json.dumps(content).encode()}
