"""What a model is asked while it is trained: a benchmark of the suite to be answered, or answers of prepared data to be read.

A task knows its questions and how to score answers; `batches` are numbers of questions, `rows_of` what the model makes of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynllava_jax import paths, remote
from dynllava_jax.config import ConfigError, DataConfig, LoraConfig, TrainEval
from dynllava_jax.data.batches import Batch
from dynllava_jax.data.pipeline import LayOut
from dynllava_jax.data.samples import DataError, Sample
from dynllava_jax.data.store import Store
from dynllava_jax.display import Terminal
from dynllava_jax.evals import forced, runner, score
from dynllava_jax.evals.answers import join
from dynllava_jax.evals.benchmarks import suite
from dynllava_jax.evals.benchmarks.base import Problems, Question
from dynllava_jax.evals.hosts import own_part
from dynllava_jax.evals.layout import Layout, Loaded, Rows, pad_rows, row_seed
from dynllava_jax.generate import Generator
from dynllava_jax.models.dynllava import Prompt

PICTURED = 4  # samples of a reading that pictures show


@dataclasses.dataclass(frozen=True)
class Setting:
  """What all tasks of a run share: the name in the config, settings, model, dtype of the computation, mesh."""

  name: str
  task: TrainEval
  loaded: Loaded
  dtype: str
  mesh: Mesh
  lora: LoraConfig | None = None

  def generator(self, params: dict[str, Any], **room: int | None) -> Generator:
    """Compiled generation with the groups of a training run. `room`: further arguments of `Generator`."""
    loaded = self.loaded
    how = dict(dtype=jnp.dtype(self.dtype), reducer=loaded.reducer, lora=self.lora)
    return Generator(loaded.model, loaded.stages, params, **room, **how)


class Answering:
  """A benchmark of the suite."""

  def __init__(self, setting: Setting):
    """Finds questions and labels.

    Raises:
      ConfigError, DataError: they are not there, cannot be used, or the benchmark has no public labels.
    """
    task, self.setting = setting.task, setting
    where = f'config.evals.{setting.name}'
    self.cfg = task.as_config(setting.dtype)
    self.benchmark = suite.get(task.benchmark).configured(self.cfg)
    if self.benchmark.needed and not task.data:
      raise ConfigError(f'{where}.data: is empty; name the folder of {self.benchmark.name}, as eval.py takes it by --data')
    root = remote.opened(paths.given(task.data, f'{where}.data')) if task.data else None
    folder = score.folder_of(self.cfg, self.benchmark, root)
    self.questions = score.questions(self.benchmark, folder)[: task.questions or None]
    console = Terminal(quiet=True)
    self.labels = score.scorable(self.cfg, self.benchmark, folder, self.questions, console)
    if self.labels is None or self.questions[0].reference:
      raise ConfigError(
        f'{where}: {self.benchmark.name} cannot be scored here: its labels are not there, or it is judged by others; evaluate '
        'checkpoints with eval.py'
      )
    self.layout = Layout(setting.loaded, self.questions, task.text_lengths, task.seed)
    self.batches = self.layout.batches(range(len(self.questions)), task.batch_size)

  def generator(self, params: dict[str, Any]) -> Generator:
    """For `rows_of`."""
    room = dict(max_new_tokens=self.setting.task.max_new_tokens, later_tokens=self.layout.later_tokens())
    return self.setting.generator(params, eos_id=self.setting.loaded.tokenizer.eos_id, **room)

  def rows_of(self, generator: Generator, chunk: Sequence[int]) -> list[dict[str, Any]]:
    """Answer rows of some questions; FloatingPointError if the model computes no numbers."""
    setting = self.setting
    rows = self.layout.rows(own_part(chunk, setting.task.batch_size, setting.mesh))
    rounds = runner.generate(generator, rows, setting.mesh)
    runner.check_numbers([g.finite for g in rounds], [self.questions[i].id for i in chunk], setting.loaded)
    return [runner.answer_row(setting.loaded, self.layout, i, rounds, row) for row, i in enumerate(chunk)]

  def figures(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The benchmark's figures and, as `score`, the one that counts; none where it is not defined for these answers."""
    joined = join(self.benchmark, self.labels, rows, Problems())
    try:
      found = score.figures(self.benchmark, score.tally(self.benchmark, joined))
      return {'score': found[score.headline(self.benchmark, found)], **found}
    except DataError:  # such as an F1 without any 'yes', early in training
      return {}


class Reading:
  """The last answer of each sample of a prepared folder, token by token after all that comes before it."""

  def __init__(self, setting: Setting, data: DataConfig, layout: LayOut):
    """Reads all samples once.

    Args:
      setting: what is asked.
      data: of the run; bad samples are refused or passed over as there.
      layout: how the run lays out its samples.

    Raises:
      ConfigError, DataError: no such data, or samples that cannot be used.
    """
    task, self.setting = setting.task, setting
    self._layout, self._bucket = layout, data.text_length
    self._store = Store(task.data, task.images, data.rotate_images, data.allow_outside)
    self._numbers, self._answers, self.questions = [], [], []
    for number in range(min(task.questions or len(self._store), len(self._store))):
      try:
        sample = self._store[number]
        row = layout(sample, number, self._bucket)
      except DataError:
        if data.on_bad_sample == 'error':
          raise
        continue
      self._answers.append(row.tokens[row.answer_start : row.length])
      self.questions += [_as_question(sample)] if len(self._numbers) < PICTURED else []
      self._numbers.append(number)
    if not self._numbers:
      raise DataError(f'config.evals.{setting.name}.data: no sample of {task.data} can be used')
    self._answer_length = -(-max(map(len, self._answers)) // forced.LENGTHS) * forced.LENGTHS
    whole = range(len(self._numbers))
    self.batches = [list(whole[i : i + task.batch_size]) for i in whole[:: task.batch_size]]

  def generator(self, params: dict[str, Any]) -> Generator:
    """For `rows_of`."""
    return self.setting.generator(params, max_new_tokens=self._answer_length, eos_id=None)

  def rows_of(self, generator: Generator, chunk: Sequence[int]) -> list[dict[str, Any]]:
    """What the model makes of some answers, like rows of an answer file."""
    mesh, loaded = self.setting.mesh, self.setting.loaded
    own = own_part(chunk, self.setting.task.batch_size, mesh)
    made = {i: self._layout(self._store[self._numbers[i]], self._numbers[i], self._bucket) for i in dict.fromkeys(own)}
    prompts = [self._prompt(made[i], i) for i in own]
    prompt = jax.tree.map(lambda *xs: np.stack(xs), *prompts)
    none = np.zeros((len(own), 0), np.int32)
    rows = Rows(prompt, np.stack([made[i].pixels for i in own]), none[..., None], none)
    given = pad_rows([self._answers[i] for i in own], self._answer_length, 0)[:, None]
    lengths = np.asarray([[len(self._answers[i])] for i in own], np.int32)
    (read,), kept_image = forced.force(generator, (rows, given, lengths), mesh)
    runner.check_numbers([np.isfinite(read.log_prob).all(-1)], [self._numbers[i] for i in chunk], loaded)
    out = []
    for row, i in enumerate(chunk):
      length = len(self._answers[i])
      metadata = {
        'row': i,
        'tokens': self._answers[i].tolist(),
        'kept': _bits(read.kept[row, : length - 1]),
        'kept_image': kept_image[-1][row].tolist() if i < PICTURED and self.questions[i].image is not None else [],
        'evicted': int(read.evicted[row]),
        'given_up': [],
      }
      log_probs = [round(float(x), 6) for x in read.log_prob[row, :length]]
      out.append({'log_probs': [log_probs], 'best': [_bits(read.best[row, :length])], 'metadata': metadata})
    return out

  def _prompt(self, row: Batch, i: int) -> Prompt:
    start, pad = row.answer_start, self.setting.loaded.tokenizer.pad_id
    tokens = np.where(np.arange(len(row.tokens)) < start, row.tokens, pad).astype(np.int32)
    instruct = np.minimum(row.instruct_start, start)
    return Prompt(tokens, start, row.image_start, row_seed(self.setting.task.seed, i), instruct)

  def figures(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Perplexity over all tokens, as `score` too, and the share in % that greedy decoding would have chosen."""
    found = forced.agreement(rows)
    value = found['answer_perplexity']
    return {'score': value, 'perplexity': value, 'token_accuracy': found['token_agreement']}


def _as_question(sample: Sample) -> Question:
  """The sample for a picture: its last question."""
  text = sample.conversations[-2]['value'].replace('<image>', '').strip()
  return Question(sample.id, (text,), text, sample.image)


def _bits(values: np.ndarray) -> str:
  return ''.join('01'[int(v)] for v in values)
