"""What every benchmark of the suite provides, and the pieces that they share."""

import dataclasses
import functools
import operator
import pathlib
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from dynllava_jax.config import EvalConfig
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks.kinds import needed_picture
from dynllava_jax.evals.folders import Folder
from dynllava_jax.evals.reading import ID, fields, read_lines

WORD = 'Answer the question using a single word or phrase.'
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = '请直接回答选项字母。'
YES_NO = 'Please answer yes or no.'
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
LLAVA_EVAL = 'eval.zip of LLaVA (https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md)'


def added(values: Iterable[float]) -> float:
  """The sum as the official scorers make it, one float after the other: `sum` compensates rounding from Python 3.12 on."""
  return functools.reduce(operator.add, values, 0.0)


@dataclasses.dataclass(frozen=True)
class Question:
  """One question as LLaVA puts it.

  Attributes:
    id: as in the question file; not always unique.
    text: the user's words after `<image>`; several for a conversation of several rounds.
    prompt: what the answer file stores as `prompt`.
    image: file, encoded bytes, decoded uint8[H, W, 3] array, or None.
    extra: further fields of an answer row.
    reference: answer(s) that perplexity is computed for, one per round; empty for none.
    long: a long answer is expected; such questions share batches.
    before: the conversation up to it, in LLaVA's form; one of its questions begins with `<image>` if the picture came with that.
  """

  id: str | int
  text: tuple[str, ...]
  prompt: str
  image: Any = None
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  reference: tuple[str, ...] = ()
  long: bool = False
  before: tuple[Mapping[str, str], ...] = ()


def unreadable(question: Question, error: OSError) -> DataError:
  """The error about a picture that is not there, or is no file."""
  return DataError(f'question {question.id}: {question.image} cannot be read ({error.strerror}); get it again', 'missing_image')


@dataclasses.dataclass(frozen=True)
class Gold:
  """What one question is scored against.

  Attributes:
    key: joins it with its answer.
    label: in the benchmark's own form; None if there is none.
    expected: text that the answer's prompt must hold (see `canonical`); '' is not checked.
    cluster: questions that are scored together; None for each on its own.
    unit: what intervals draw, the image: questions about one picture err together; None for each cluster on its own.
  """

  key: Hashable
  label: Any
  expected: str = ''
  cluster: Hashable = None
  unit: Hashable = None


@dataclasses.dataclass(frozen=True)
class Needed:
  """A file or folder of a benchmark, for `--check_data`: the first of `paths` that exists counts."""

  paths: tuple[str, ...]
  source: str
  what: str = 'questions'


class Problems:
  """What does not fit, by kind, in the order in which it was met."""

  def __init__(self):
    self.kinds: dict[str, list[str]] = {}

  def add(self, kind: str, example: Any) -> None:
    self.kinds.setdefault(kind, []).append(str(example))

  def __bool__(self) -> bool:
    return bool(self.kinds)

  def __str__(self) -> str:
    lines = []
    for kind, found in self.kinds.items():
      examples = '; '.join(f if len(f) < 160 else f[:157] + '...' for f in found[:3])
      lines.append(f'  {len(found)} {kind}, e.g. {examples}')
    return '\n'.join(lines)

  def counts(self) -> dict[str, int]:
    return {kind: len(found) for kind, found in self.kinds.items()}


class Benchmark:
  """Base of all benchmarks; a subclass is one file.

  Scores are functions of sums: `tally` counts what one cluster of answers adds, `figures` turns the sums over
  all clusters into numbers. So a bootstrap resamples clusters, by the unit they belong to, whatever the metric.
  """

  name: ClassVar[str]
  metric: ClassVar[str]  # what `figures()[headline]` is, in words
  hint: ClassVar[str] = 'use answers and labels of one version'  # when they do not fit together
  headline: ClassVar[str] = 'accuracy'
  shown: ClassVar[tuple[str, ...]] = ()  # further figures that tables show
  folders: ClassVar[tuple[str, ...]]
  needed: ClassVar[tuple[Needed, ...]]
  images: ClassVar[tuple[str, ...]] = ()  # folders, the first that exists is used
  expected_questions: ClassVar[int | None] = None
  max_new_tokens: ClassVar[int] = 128
  scored: ClassVar[bool] = True  # False: labels are not public, only a submission is made
  last_answer_wins: ClassVar[bool] = False
  several_rounds: ClassVar[bool] = False  # an answer's text may be a list, one string per round
  of_whole_clusters: ClassVar[tuple[str, ...]] = ()  # counts that a cluster with an answer missing does not add to
  categories: ClassVar[tuple[str, ...]] = ()  # that the score sums, or is the mean of; names of figures begin with theirs
  notes: ClassVar[tuple[str, ...]] = ()

  def configured(self, cfg: EvalConfig) -> 'Benchmark':
    """The benchmark as a config wants it."""
    del cfg
    return self

  def questions(self, folder: Folder) -> list[Question]:
    """Questions in file order; DataError for what is missing or malformed."""
    raise NotImplementedError

  def golds(self, folder: Folder, problems: Problems) -> list[Gold]:
    """What must be answered, in file order; labels without a question go to `problems`."""
    del problems
    return [Gold(self.key({'question_id': q.id, 'prompt': q.prompt}), None, canonical(q.prompt)) for q in self.questions(folder)]

  def key(self, row: Mapping[str, Any]) -> Hashable:
    """Key of an answer row (`question_id`, `prompt`)."""
    return str(row['question_id'])

  def seen(self, row: Mapping[str, Any]) -> Any:
    """What `tally` is given of an answer row: its text."""
    return row['text']

  def headline_of(self, figures: Mapping[str, float]) -> str:
    """Name of the figure that is the score."""
    del figures
    return self.headline

  def parts_of(self, figures: Mapping[str, float]) -> set[str]:
    """The categories that the score is made of here."""
    return {name.partition('/')[0] for name in figures} & set(self.categories)

  def metric_of(self, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """What the score is, in words, and which of its categories are not in it; `rows`: the answers that it is of, if known."""
    del rows
    found = self.parts_of(figures)
    absent = [c for c in self.categories if c not in found]
    return self.metric + (f' (without {", ".join(absent)})' if absent else '')

  def remarks(self) -> list[str]:
    """What to know about the numbers, stored with them."""
    return list(self.notes)

  def tally(self, answers: Sequence[tuple[Any, str]]) -> dict[str, float]:
    """Counts that one cluster adds. `answers`: (label, what `seen` says) pairs."""
    raise NotImplementedError

  def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
    """Named results from the summed tallies; ZeroDivisionError if they are not defined."""
    raise NotImplementedError

  def submission(self, folder: Folder, rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, bytes]:
    """Files for the benchmark's server or official tool, by path; `rows` are answer rows, `name` the run's."""
    del folder, rows, name
    return {}


class Lines(Benchmark):
  """A benchmark whose questions are `question_id, image, text` in a JSON-lines file, suffix included."""

  question_file: ClassVar[str]

  def questions(self, folder: Folder) -> list[Question]:
    path, images = folder.need(self.question_file), image_folder(folder, self.images)
    result = []
    for i, row in enumerate(read_lines(path), 1):
      where = f'{path}, row {i}'
      id_, text = fields(row, {'question_id': ID, 'text': str}, where)
      result.append(Question(id_, (text,), text, needed_picture(folder, images, row, where)))
    return result


def image_folder(folder: Folder, places: tuple[str, ...]) -> pathlib.Path:
  """The first of the benchmark's image folders that exists, else where it should be."""
  return folder.find(*places) or folder.root / folder.names[0] / places[0]


def canonical(prompt: str) -> str:
  """A prompt without image token, suffix and differences of white space: what tells two questions apart."""
  for part in ('<image>', WORD, LETTER, LETTER_CN, YES_NO, UNANSWERABLE):
    prompt = prompt.replace(part, ' ')
  return ' '.join(prompt.split())


def add_counts(counts: Mapping[str, float], groups: Sequence[str]) -> dict[str, float]:
  """`counts` once for everything and once for each group, as `group/name`."""
  return dict(counts) | {f'{g}/{k}': v for g in groups for k, v in counts.items()}


def rates(sums: Mapping[str, float], right: str = 'correct') -> dict[str, float]:
  """Percentages `right / n`, overall as 'accuracy' and per group of `add_counts`."""
  result = {'accuracy': 100 * sums.get(right, 0) / sums['n']}
  for key in sums:
    group, _, kind = key.rpartition('/')
    if group and kind == 'n' and sums[key]:
      result[group if group != 'accuracy' else 'accuracy (category)'] = 100 * sums.get(f'{group}/{right}', 0) / sums[key]
  return result


def letter(text: str, options: str) -> str | None:
  """The option letter an answer names: the letter alone, or followed by a period or in the form `A. ...`."""
  match = re.fullmatch(r'\(?([A-Z])\)?(?:[.:)](?:\s.*)?)?', text.strip(), re.DOTALL)
  return match.group(1) if match and match.group(1) in options else None
