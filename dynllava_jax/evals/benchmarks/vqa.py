"""VQAv2 and VizWiz: submissions for the test servers, VQA accuracy on the public validation sets."""

import json
import pathlib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks import vqa_text
from dynllava_jax.evals.benchmarks.base import (
  LLAVA_EVAL,
  UNANSWERABLE,
  WORD,
  Benchmark,
  Gold,
  Lines,
  Needed,
  Problems,
  Question,
  add_counts,
  canonical,
  image_folder,
  rates,
)
from dynllava_jax.evals.benchmarks.kinds import needed_picture, only_picture
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.reading import ID, check_label, fields, optional, read_lines, read_list, read_objects


class VqaAccuracy(Benchmark):
  """Scored by agreement with ten annotators; labels are (groups, answers)."""

  metric = 'VQA accuracy in %'
  form = staticmethod(vqa_text.normalize)  # of an annotator's answer

  def tally(self, answers: Sequence[tuple[Any, str]]) -> dict[str, float]:
    ((groups, given), text), *_ = answers
    return add_counts({'n': 1, 'correct': vqa_text.accuracy(text, given, self.form)}, groups)

  def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
    return rates(sums)


class Vqav2(Lines):
  """The test-dev questions; the server wants all of the test split."""

  name = 'vqav2'
  metric = 'none offline: submit to https://eval.ai/web/challenges/challenge-page/830'
  folders = ('vqav2',)
  question_file = 'llava_vqav2_mscoco_test-dev2015.jsonl'
  all_questions = 'llava_vqav2_mscoco_test2015.jsonl'
  images = ('test2015',)
  expected_questions = 107394
  scored = False
  needed = (
    Needed((question_file,), LLAVA_EVAL),
    Needed((all_questions,), LLAVA_EVAL, 'all questions of the test split, for the submission'),
    Needed(('test2015',), 'http://images.cocodataset.org/zips/test2015.zip', 'images'),
  )

  def submission(self, folder: Folder, rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, bytes]:
    answers = {str(r['question_id']): vqa_text.normalize(r['text']) for r in rows}
    path = folder.need(self.all_questions)
    split = [fields(q, {'question_id': ID}, f'{path}, row {i}')[0] for i, q in enumerate(read_lines(path), 1)]
    content = [{'question_id': i, 'answer': answers.get(str(i), '')} for i in split]
    return {f'answers_upload/llava_vqav2_mscoco_test-dev2015/{name}.json': json.dumps(content).encode()}


class Vizwiz(Lines):
  """The test questions."""

  name = 'vizwiz'
  metric = 'none offline: submit to https://eval.ai/web/challenges/challenge-page/2185'
  folders = ('vizwiz',)
  question_file = 'llava_test.jsonl'
  images = ('test',)
  expected_questions = 8000
  scored = False
  needed = (
    Needed(('llava_test.jsonl',), LLAVA_EVAL),
    Needed(('test',), 'https://vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip', 'images'),
  )

  def submission(self, folder: Folder, rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, bytes]:
    answers = {str(r['question_id']): vqa_text.normalize(r['text']) for r in rows}
    split = read_lines(folder.need(self.question_file))
    content = [{'image': q['image'], 'answer': answers[str(q['question_id'])]} for q in split if str(q['question_id']) in answers]
    return {f'answers_upload/{name}.json': json.dumps(content).encode()}


class Vqav2Val(VqaAccuracy):
  """The validation questions of the VQA site with the suffix of LLaVA."""

  name = 'vqav2_val'
  folders = ('vqav2',)
  images = ('val2014',)
  expected_questions = 214354
  question_file = 'v2_OpenEnded_mscoco_val2014_questions.json'
  label_file = 'v2_mscoco_val2014_annotations.json'
  needed = (
    Needed((question_file,), 'https://visualqa.org/download.html'),
    Needed((label_file,), 'https://visualqa.org/download.html', 'labels'),
    Needed(('val2014',), 'http://images.cocodataset.org/zips/val2014.zip', 'images'),
  )
  notes = (
    'The 78.5 and 80.0 of the LLaVA table are test-dev; val2014 is in the training mixture of LLaVA-1.5.',
    'All answers are normalised alike; versions of vqaEval.py leave annotators who all agree, or their number words, as they are.',
  )

  def questions(self, folder: Folder) -> list[Question]:
    path, images = folder.need(self.question_file), image_folder(folder, self.images)
    result = []
    for i, row in enumerate(fields(read_objects(path), {'questions': list}, str(path))[0], 1):
      where = f'{path}, question {i}'
      id_, image, text = fields(row, {'question_id': ID, 'image_id': int, 'question': str}, where)
      prompt = f'{text}\n{WORD}'
      file = folder.image(images, f'COCO_val2014_{image:012}.jpg', where)
      if (given := only_picture(row, where)) and pathlib.PurePath(given).name != file.name:
        raise DataError(f'{where}: image is {given!r}, and image_id names {file.name}; get the file again')
      result.append(Question(id_, (prompt,), prompt, file))
    return result

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    del problems
    path = folder.need_labels(self.label_file)
    questions = folder.find(self.question_file)
    asked = fields(read_objects(questions), {'questions': list}, str(questions))[0] if questions else ()
    texts = dict(fields(q, {'question_id': ID, 'question': str}, f'{questions}, question {i}') for i, q in enumerate(asked, 1))
    golds = []
    for i, row in enumerate(fields(read_objects(path), {'annotations': list}, str(path))[0], 1):
      where = f'{path}, annotation {i}'
      id_, answers = fields(row, {'question_id': ID, 'answers': list}, where)
      golds.append(
        Gold(
          str(id_),
          (_kinds(row, where), _given(answers, where)),
          canonical(texts.get(id_, '')),
          unit=optional(row, 'image_id', ID, where),
        )
      )
    return golds


class VizwizVal(VqaAccuracy):
  """The validation questions of the VizWiz site with the suffixes of LLaVA.

  As VizWiz scores them: the answer is normalised, those of the annotators are not (vqaEval.py of its API).
  """

  name = 'vizwiz_val'
  folders = ('vizwiz',)
  images = ('val',)
  expected_questions = 4319
  needed = (
    Needed(('val.json', 'Annotations/val.json'), 'https://vizwiz.cs.colorado.edu/VizWiz_final/vqa_data/Annotations.zip', 'labels'),
    Needed(('val',), 'https://vizwiz.cs.colorado.edu/VizWiz_final/images/val.zip', 'images'),
  )
  form = staticmethod(str)  # as written
  notes = ('The 50.0 and 53.6 of the LLaVA table are on the test split.',)

  def _rows(self, folder: Folder) -> list[tuple]:
    path = folder.need_labels('val.json', 'Annotations/val.json')
    rows = []
    for i, row in enumerate(read_list(path), 1):
      where = f'{path}, row {i}'
      question, answers = fields(row, {'question': str, 'answers': list}, where)
      name = only_picture(row, where)
      if name is None:
        raise DataError(f'{where}: image is {row.get("image")!r}, expected the name of a file; is it the right file?')
      rows.append((name, question, answers, row, where))
    return rows

  def questions(self, folder: Folder) -> list[Question]:
    images, result = image_folder(folder, self.images), []
    for image, question, _, row, where in self._rows(folder):
      prompt = f'{question}\n{UNANSWERABLE}\n{WORD}'
      result.append(Question(image, (prompt,), prompt, needed_picture(folder, images, row, where)))
    return result

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    del problems
    return [
      Gold(image, (_kinds(row, where), _given(answers, where)), canonical(question))
      for image, question, answers, row, where in self._rows(folder)
    ]


def _kinds(row: Mapping[str, Any], where: str) -> list[str]:
  """The group of a question; none if its file does not tell."""
  kind = optional(row, 'answer_type', str, where)
  return [kind] if kind else []


def _given(answers: Sequence[Mapping[str, Any]], where: str) -> list[str]:
  """The annotators' answers."""
  given = [a.get('answer') if isinstance(a, dict) else a for i, a in enumerate(answers, 1)]
  check_label(''.join(check_annotators(given, where)), where)
  return given


def check_annotators(answers: list[Any], where: str) -> list[str]:
  """What annotators say; DataError unless it is a list of ten texts."""
  if len(answers) != vqa_text.ANNOTATORS:
    raise DataError(f'{where}: has answers of {len(answers)} annotators, expected {vqa_text.ANNOTATORS}; get the file again')
  for i, answer in enumerate(answers, 1):
    if not isinstance(answer, str):
      raise DataError(f'{where}: annotator {i} answers {reprlib.repr(answer)}, expected a text; get the file again')
  return answers
