"""The long-answer evaluations of Dynamic-LLaVA: LVIS-VQA in one and in several rounds, ShareGPT4V-VQA.

The authors' files are a JSON list of `id, image, question, answer`, the last two lists in several rounds.
Perplexity is that of the reference answer, METEOR that of the generated one (arXiv 2412.00876, section 4.3).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks import meteor
from dynllava_jax.evals.benchmarks.base import Benchmark, Gold, Needed, Problems, Question, added, canonical, image_folder
from dynllava_jax.evals.benchmarks.kinds import needed_picture
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.reading import ID, check_label, fields, read_list

PAPER = 'https://github.com/Osilly/dynamic_llava (LVIS-Instruct4V and ShareGPT4V subsets of 1,000)'
WITHOUT = 'without_'
# The score is the first of these that the answers tell; an answer file does not tell how the model reads the references.
METRICS = {
  'perplexity': 'perplexity of the reference answers, mean over samples (lower is better)',
  **{name: f'{words} in %, mean over samples' for name, words in meteor.NAMES.items()},
}


class LongAnswers(Benchmark):
  """Base of the three; a label is the list of reference answers."""

  metric = METRICS['perplexity']
  headline = 'perplexity'
  shown = (*meteor.NAMES, 'reference_kept')
  question_file: ClassVar[str]
  images = ('images', '.')
  max_new_tokens = 1024
  several_rounds = True

  def questions(self, folder: Folder) -> list[Question]:
    path, images = folder.need_labels(self.question_file), image_folder(folder, self.images)
    result = []
    for i, row in enumerate(read_list(path), 1):
      where = f'{path}, sample {i}'
      id_, question, answer = fields(row, {'id': ID, 'question': (str, list), 'answer': (str, list)}, where)
      asked, answers = ([v] if isinstance(v, str) else v[:] for v in (question, answer))
      if not asked or len(asked) != len(answers):
        raise DataError(
          f'{path}, sample {id_}: {len(asked)} questions and {len(answers)} answers, expected one answer each; mend the sample'
        )
      if not all(isinstance(text, str) for text in (*asked, *answers)):
        raise DataError(f'{where}: questions and answers are {asked} and {answers}, expected texts; is it the right file?')
      asked[0] = asked[0].replace('<image>', '').strip()
      answers[0] = answers[0].strip()  # the authors' scripts strip the first answer only
      for answer in answers:
        check_label(answer, where)
      image = needed_picture(folder, images, row, where)
      result.append(Question(id_, tuple(asked), asked[0], image, reference=tuple(answers), long=True))
    return result

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    return [Gold(str(q.id), q.reference, canonical(q.prompt), unit=str(q.image)) for q in self.questions(folder)]

  def seen(self, row: Mapping[str, Any]) -> Any:
    return row

  def tally(self, answers: Sequence[tuple[Any, Any]]) -> dict[str, float]:
    ((references, row), *_) = answers
    texts = [row['text']] if isinstance(row['text'], str) else row['text']
    if len(texts) != len(references):
      raise ValueError(f'answer {row["question_id"]}: {len(texts)} rounds, expected {len(references)}')
    words = meteor.wordnet()
    scores = [meteor.score(r, t, words) for r, t in zip(references, texts)]
    counts = {'n': 1, 'meteor': added(scores) / len(scores)}
    if not words:
      counts[WITHOUT + 'synonyms'] = 1
    if any(meteor.is_guess(text) for text in (*(r.strip().lower() for r in references), *map(str.strip, texts))):
      counts[WITHOUT + 'punkt'] = 1
    meta = row.get('metadata', {})
    if 'perplexity' in meta:
      values, fed, kept = (_numbers(row, name, len(references)) for name in ('perplexity', 'reference_fed', 'reference_kept'))
      if min(values) < 1 or any(not 0 <= k <= f for k, f in zip(kept, fed)):
        raise ValueError(
          f'answer {row["question_id"]}: perplexities are {values}, tokens fed {fed} and kept {kept}; '
          'expected at least 1, and 0 <= kept <= fed'
        )
      counts |= {'with_perplexity': 1, 'perplexity': added(values) / len(values), 'reference_fed': sum(fed)}
      counts['reference_kept'] = sum(kept) - _evicted(row, 'reference_evicted', sum(kept))
    if 'kept' in meta:
      if not isinstance(meta['kept'], str) or set(meta['kept']) - set('01'):
        raise ValueError(f'answer {row["question_id"]}: metadata.kept is {meta["kept"]!r}, expected a 0 or 1 for each token fed')
      counts |= {
        'with_kept': 1,
        'fed': len(meta['kept']),
        'kept': meta['kept'].count('1') - _evicted(row, 'evicted', meta['kept'].count('1')),
      }
    return counts

  def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
    n = sums['n']
    for name in ('perplexity', 'kept'):
      having = sums.get(f'with_{name}', 0)
      if having not in (0, n):
        raise DataError(f'{self.name}: {having:.0f} of {n:.0f} answers have metadata.{name}, expected all or none')
    result = {'perplexity': sums['perplexity'] / n} if 'perplexity' in sums else {}
    absent = [what for what in ('synonyms', 'punkt') if WITHOUT + what in sums]  # of one answer at least, drawn or not
    result['meteor' + (f'_{WITHOUT}{"_and_".join(absent)}' if absent else '')] = 100 * sums['meteor'] / n
    for fed, kept in (('fed', 'kept'), ('reference_fed', 'reference_kept')):
      if sums.get(fed):
        result |= {f'{fed}_tokens': sums[fed] / n, f'{kept}_tokens': sums[kept] / n, kept: 100 * sums[kept] / sums[fed]}
    return result

  def headline_of(self, figures: Mapping[str, float]) -> str:
    return next(k for k in METRICS if k in figures)

  def metric_of(self, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]] = ()) -> str:
    del rows
    return METRICS[self.headline_of(figures)]

  def remarks(self) -> list[str]:
    return [*self.notes, *(f'METEOR: NLTK data missing: {m}' for m in meteor.missing_data())]


def _evicted(row: Mapping[str, Any], name: str, most: float) -> int:
  """`metadata.NAME` of an answer, tokens that left; 0 if it is not told. ValueError if it is no number of them."""
  value = row['metadata'].get(name, 0)
  if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
    raise ValueError(f'answer {row["question_id"]}: metadata.{name} is {value!r}, expected a whole number from 0 to {most:.0f}')
  return value


def _numbers(row: Mapping[str, Any], name: str, rounds: int) -> list[float]:
  """`metadata.NAME` of an answer, one number per round; ValueError if it is something else."""
  values = row['metadata'].get(name)
  number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
  if not isinstance(values, list) or len(values) != rounds or not all(map(number, values)):
    raise ValueError(f'answer {row["question_id"]}: metadata.{name} is {values!r}, expected a list of {rounds}, a number per round')
  return values


class LvisSingle(LongAnswers):
  """One question, one long answer."""

  name = 'lvis_single'
  folders = ('lvis_vqa',)
  question_file = 'lvis_vqa_single_round.json'
  needed = (Needed((question_file,), PAPER, 'questions and labels'), Needed(('images', '.'), PAPER, 'images'))


class LvisMulti(LongAnswers):
  """Several rounds about one picture; a round sees the rounds before it."""

  name = 'lvis_multi'
  folders = ('lvis_vqa',)
  question_file = 'lvis_vqa_multi_round.json'
  needed = (Needed((question_file,), PAPER, 'questions and labels'), Needed(('images', '.'), PAPER, 'images'))


class ShareGpt4v(LongAnswers):
  """Captions of more than 300 words."""

  name = 'sharegpt4v'
  folders = ('sharegpt4v_vqa',)
  question_file = 'sharegpt4v_vqa_single_round.json'
  needed = (Needed((question_file,), PAPER, 'questions and labels'), Needed(('images', '.'), PAPER, 'images'))
