"""POPE: is an object in the picture? Three sets of questions (adversarial, popular, random), F1 of 'yes'."""

from collections.abc import Mapping, Sequence
from typing import Any

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks.base import LLAVA_EVAL, Gold, Lines, Needed, Problems, added, canonical
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.reading import ID, fields, read_lines

CATEGORIES = ('adversarial', 'popular', 'random')
PINNED = 'https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco'
FILES = tuple(f'coco_pope_{c}.json' for c in CATEGORIES)
LABEL_FOLDERS = ('coco', 'output/coco', 'labels_e3e3926', '.')


def parse(text: str) -> str:
  """'yes' or 'no': no if the words before the first period, commas dropped, hold `No`, `no` or `not`."""
  words = text.split('.')[0].replace(',', '').split(' ')
  return 'no' if {'No', 'no', 'not'} & set(words) else 'yes'


def counts(texts: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
  """True and false positives and negatives of texts against labels; any label but 'no' means yes."""
  result = dict(TP=0, FP=0, TN=0, FN=0)
  for text, label in zip(texts, labels):
    right = parse(text) == ('no' if label == 'no' else 'yes')
    result[f'{"T" if right else "F"}{"P" if parse(text) == "yes" else "N"}'] += 1
  return result


def rates(c: Mapping[str, float]) -> dict[str, float]:
  """accuracy, precision, recall, f1_score and yes_ratio in [0, 1]; ZeroDivisionError where the official one has it."""
  total = c['TP'] + c['FP'] + c['TN'] + c['FN']
  precision, recall = c['TP'] / (c['TP'] + c['FP']), c['TP'] / (c['TP'] + c['FN'])
  return {
    'accuracy': (c['TP'] + c['TN']) / total,
    'precision': precision,
    'recall': recall,
    'f1_score': 2 * precision * recall / (precision + recall),
    'yes_ratio': (c['TP'] + c['FP']) / total,
  }


class Pope(Lines):
  """Questions and labels are joined by category, image and wording."""

  name = 'pope'
  metric = 'mean F1 of adversarial, popular and random, in %'
  headline = 'f1'
  categories = CATEGORIES
  shown = tuple(f'{c}/f1_score' for c in CATEGORIES)
  hint = f'the labels must be those of {PINNED}; later ones have other questions'
  folders = ('pope',)
  question_file = 'llava_pope_test.jsonl'
  images = ('val2014',)
  expected_questions = 8910
  needed = (
    Needed(('llava_pope_test.jsonl',), LLAVA_EVAL),
    *(Needed(tuple(f'{d}/{f}' for d in LABEL_FOLDERS), PINNED, 'labels') for f in FILES),
    Needed(('val2014',), 'http://images.cocodataset.org/zips/val2014.zip', 'images'),
  )

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    path = folder.need(self.question_file)
    labels, shown = {}, set()
    for category, file in zip(CATEGORIES, FILES):
      source = _label_file(folder, file)
      for i, row in enumerate(read_lines(source), 1):
        image, text, label = fields(row, {'image': str, 'text': str, 'label': str}, f'{source}, row {i}')
        if label not in ('yes', 'no'):  # officially whatever is not `no` means yes
          raise DataError(f'{source}, row {i}: label is {label!r}, expected yes or no; get the file of {PINNED}')
        labels[category, image, canonical(text)] = label
    golds = []
    for i, row in enumerate(read_lines(path), 1):
      id_, image, text, category = fields(row, {'question_id': ID, 'image': str, 'text': str, 'category': str}, f'{path}, row {i}')
      key = category, image, canonical(text)
      shown.add(key)
      golds.append(Gold(str(id_), (category, labels[key]) if key in labels else None, canonical(text), unit=image))
    for category, image, text in (k for k in labels if k not in shown):
      problems.add('labels without a question', f'{category}: {image} {text!r}')
    return golds

  def tally(self, answers: Sequence[tuple[Any, str]]) -> dict[str, float]:
    ((category, label), text), *_ = answers
    return {f'{category}/{k}': v for k, v in counts([text], [label]).items()}

  def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
    result = {}
    for category in CATEGORIES:
      own = {k.rpartition('/')[2]: v for k, v in sums.items() if k.startswith(f'{category}/')}
      if own:
        result |= {f'{category}/{k}': 100 * v for k, v in rates(own).items()}
    f1 = [v for k, v in result.items() if k.endswith('/f1_score')]
    return {'f1': added(f1) / len(f1)} | result


def _label_file(folder: Folder, file: str):
  if folder.labels:
    path = folder.need_labels() / file
    if not path.is_file():
      raise DataError(f'config.labels: {folder.labels} has no {file}; name the folder with {", ".join(FILES)}')
    return path
  return folder.need(*(f'{d}/{file}' for d in LABEL_FOLDERS))
