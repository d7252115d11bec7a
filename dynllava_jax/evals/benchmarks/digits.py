"""The embedded data set as a benchmark: questions about digit scenes, of the test split."""

from collections.abc import Mapping, Sequence
from typing import Any

from dynllava_jax.config import ConfigError, EvalConfig
from dynllava_jax.config.evaluation import MOST_MADE
from dynllava_jax.data.conversation import IMAGE_TOKEN
from dynllava_jax.evals.benchmarks.base import Benchmark, Gold, Problems, Question, add_counts, added, canonical, rates
from dynllava_jax.evals.folders import Folder

LONG_TASKS = ('read',)


def score(task: str, expected: str, text: str) -> float:
  """Short answers: 1 if they match exactly. Long answers: digit accuracy.

  Digit accuracy is the number of digits named in their right place over the number there are, or over the
  number named if that is larger, so that inventing digits does not pay.
  """
  if task not in LONG_TASKS:
    return float(text == expected)
  from dynllava_jax.data.digits import read_scene  # as below

  truth, found = read_scene(expected), read_scene(text)
  return sum(found.get(place) == digit for place, digit in truth.items()) / max(len(truth), len(found))


class Digits(Benchmark):
  """Made from (seed, number), so there is no file; labels are (task, expected answer)."""

  name = 'digits'
  metric = 'accuracy in %, digit accuracy for long answers'
  folders = ('digits',)
  shown = ('short', 'long')
  needed = ()

  def __init__(self, cfg: EvalConfig | None = None, split: str = 'test', count: int | None = None):
    """`count` questions of a split, as many as the config says if None."""
    self._samples = []
    if cfg:
      from dynllava_jax.data.digits import Questions  # here, as it brings scikit-learn along, which other benchmarks do without

      source = Questions(split, cfg.seed, count or cfg.questions)
      self._samples = [source[i] for i in range(len(source))]

  def configured(self, cfg: EvalConfig) -> 'Digits':
    if cfg.questions == 0:
      raise ConfigError(
        'config.questions: is 0, but the questions of digits are made, as many as asked for; use configs/digits.py:eval'
      )
    if cfg.questions > MOST_MADE:
      raise ConfigError(f'config.questions: is {cfg.questions:,}, and they are made; ask for {MOST_MADE:,} at most')
    return Digits(cfg)

  def questions(self, folder: Folder) -> list[Question]:
    result = []
    for s in self._samples:
      text = s.conversations[0]['value'].replace(f'{IMAGE_TOKEN}\n', '')
      result.append(Question(s.id, (text,), text, s.image, long=s.task in LONG_TASKS))
    return result

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    return [
      Gold(s.id, (s.task, s.conversations[1]['value']), canonical(q.prompt)) for s, q in zip(self._samples, self.questions(folder))
    ]

  def tally(self, answers: Sequence[tuple[Any, str]]) -> dict[str, float]:
    ((task, expected), text), *_ = answers
    return add_counts({'n': 1, 'correct': score(task, expected, text)}, [task])

  def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
    result = rates(sums)
    for length, wanted in (('short', False), ('long', True)):
      tasks = [k.removesuffix('/n') for k in sums if k.endswith('/n') and (k.removesuffix('/n') in LONG_TASKS) == wanted]
      count = sum(sums[f'{t}/n'] for t in tasks)
      if count:
        result[length] = 100 * added(sums[f'{t}/correct'] for t in tasks) / count
    return result
