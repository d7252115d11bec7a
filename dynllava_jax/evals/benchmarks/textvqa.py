"""TextVQA, validation split, with the OCR tokens that LLaVA puts into the prompt."""

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks.base import LLAVA_EVAL, Gold, Lines, Needed, Problems
from dynllava_jax.evals.benchmarks.vqa import VqaAccuracy, check_annotators
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.reading import ID, fields, read_objects

LABELS = 'TextVQA_0.5.1_val.json'
OCR = 'Reference OCR token:'
# As LLaVA's prompts name them; the heading alone, of a picture without text, names none.
NAMED = re.compile(rf'{OCR}[ \t,.;:]*[^\s,.;:]|OCR tokens:[ ,.;:]*(?!Question:)[^\s,.;:]')


def question_of(prompt: str) -> str:
  """The question inside a prompt, lower case; ValueError if the prompt has none of LLaVA's forms."""
  lines = prompt.split('\n')
  if prompt.startswith('OCR tokens: '):
    match = re.search(r'Question: (.*?) Short answer:', prompt, re.DOTALL)
    if match:
      return match.group(1).lower()
  elif f'{OCR} ' in prompt and len(lines) == 3:
    return lines[prompt.startswith(OCR)].lower()
  elif len(lines) == 2:
    return lines[0].lower()
  raise ValueError(
    f'prompt {prompt!r}: expected the question, the OCR tokens and the instruction on lines of their own; write it as it was asked'
  )


class TextVqa(VqaAccuracy, Lines):
  """Joined by image and question, since image ids repeat."""

  name = 'textvqa'
  metric = 'VQA accuracy in %'
  folders = ('textvqa',)
  question_file = 'llava_textvqa_val_v051_ocr.jsonl'
  images = ('train_images',)
  expected_questions = 5000
  needed = (
    Needed((question_file,), LLAVA_EVAL),
    Needed((LABELS,), f'https://dl.fbaipublicfiles.com/textvqa/data/{LABELS}', 'labels'),
    Needed(('train_images',), 'https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip', 'images'),
  )

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    del problems
    path = folder.need_labels(LABELS)
    keys, labels = [], {}
    for i, row in enumerate(fields(read_objects(path), {'data': list}, str(path))[0], 1):
      image, question, answers = fields(row, {'image_id': ID, 'question': str, 'answers': list}, f'{path}, row {i}')
      keys.append((str(image), question.lower()))
      labels[keys[-1]] = (
        [],
        check_annotators(answers, f'{path}, row {i}'),
      )  # of two equal questions on one image the later labels count, as officially
    return [Gold(key, labels[key], unit=key[0]) for key in keys]

  def metric_of(self, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """Says whether the prompts have OCR tokens, which makes two benchmarks of it."""
    if not rows:
      return self.metric
    having = sum(bool(NAMED.search(row['prompt'])) for row in rows)
    where = 'in the prompt' if having == len(rows) else f'in {having:,} of {len(rows):,} prompts'
    return f'{self.metric}, {f"OCR tokens {where}" if having else "no OCR tokens in the prompt"}'

  def key(self, row: Mapping[str, Any]) -> Hashable:
    try:
      return str(row['question_id']), question_of(row['prompt'])
    except KeyError:
      raise DataError(
        f'answer {row["question_id"]!r}: has no prompt; image ids repeat, so write the prompt beside the text'
      ) from None
    except ValueError as e:
      raise DataError(f'answer {row["question_id"]!r}: {e}') from None
