"""Answers a benchmark's questions with one stage list: sharded over devices and hosts, resumable."""

import concurrent.futures
import dataclasses
import hashlib
import io
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image
from rich.console import Console

from dynllava_jax import checkpoint, sharding
from dynllava_jax.checkpoint import CheckpointError, CheckpointInfo
from dynllava_jax.config import ConfigError, EvalConfig, EvalRun, ModelConfig, Stage, check_stages, to_dict
from dynllava_jax.data import conversation
from dynllava_jax.data.batches import Batch, make_row, stack
from dynllava_jax.data.pipeline import to_mesh
from dynllava_jax.data.samples import DataError, Sample
from dynllava_jax.data.tokenizer import Tokenizer
from dynllava_jax.evals.benchmark import Question
from dynllava_jax.evals.hosts import share
from dynllava_jax.evals.progress import progress
from dynllava_jax.evals.resize import resize_tower
from dynllava_jax.evals.store import AnswerStore, folder_sha256, questions_sha256, versions
from dynllava_jax.generate import Generated, Generator
from dynllava_jax.models.dynllava import Prompt

PICTURED = 100  # so many first questions keep the list of their image tokens, for pictures


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What a run needs besides its weights."""

  name: str
  path: str
  info: CheckpointInfo
  model: ModelConfig  # with the run's image size
  stages: tuple[Stage, ...]
  tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class RunResult:
  """A finished run: its answer rows in the order of the questions, and what making them took this time."""

  rows: list[dict[str, Any]]
  path: pathlib.Path
  seconds: float
  programs_compiled: int


def load_model(name: str, run: EvalRun, default: str) -> Loaded:
  """Description and tokenizer of a run's checkpoint, `default` if the run names none.

  Raises:
    CheckpointError, ConfigError: no checkpoint, no tokenizer, or a stage list that does not fit the model.
  """
  path = run.checkpoint or default
  info = checkpoint.read_info(path)
  model = info.model
  try:
    if run.image_size:
      model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, image_size=run.image_size))
    stages = run.stages or info.stages
    check_stages(stages, model)
  except ConfigError as e:
    raise ConfigError(f'config.runs.{name}: {e}') from None
  tokenizer = checkpoint.read_tokenizer(path)
  if tokenizer is None:
    raise CheckpointError(f'{path}: has no {checkpoint.TOKENIZER_FILE}; this evaluation needs the one it was trained with')
  return Loaded(name, path, info, model, stages, Tokenizer(tokenizer))


def load_weights(loaded: Loaded, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Parameters on the mesh, position embeddings scaled to the run's image size."""
  params = checkpoint.load_params(loaded.path, mesh)
  return resize_tower(params, loaded.info.model.vision, loaded.model.vision)


def turns_of(question: Question) -> tuple[dict[str, str], ...]:
  """The conversation up to the first question, the image in front of it."""
  text = question.text[0]
  return ({'from': 'human', 'value': text if question.image is None else f'{conversation.IMAGE_TOKEN}\n{text}'},)


class Layout:
  """Questions to rows of batches, for one model."""

  def __init__(self, loaded: Loaded, questions: Sequence[Question], buckets: Sequence[int]):
    """Encodes all prompts; DataError for one that fits no bucket."""
    self.loaded, self.questions = loaded, questions
    style = conversation.template(loaded.info.conversation)
    self.style = style
    self.rendered: list[str] = []
    self.text_tokens: list[int] = []
    self.bucket: list[int] = []
    for question in questions:
      text, spans = conversation.render(turns_of(question), style, str(question.id))
      tokens = len(conversation.encode(text, spans, loaded.tokenizer).ids) - (question.image is not None)
      fitting = [b for b in buckets if b >= tokens]
      if not fitting:
        raise DataError(f'question {question.id}: {tokens} text tokens, the largest of config.text_lengths is {max(buckets)}')
      self.rendered.append(text)
      self.text_tokens.append(tokens)
      self.bucket.append(fitting[0])

  def batches(self, todo: Sequence[int], size: int) -> list[list[int]]:
    """Question numbers in groups of at most `size`, of one text bucket and one expected length each."""
    groups: dict[tuple, list[int]] = {}
    for i in todo:
      groups.setdefault((self.bucket[i], self.questions[i].long), []).append(i)
    return [g[i : i + size] for _, g in sorted(groups.items()) for i in range(0, len(g), size)]

  def rows(self, chunk: Sequence[int], size: int) -> Batch:
    """This host's part of a batch, filled up with copies of its last question to one shape for all batches."""
    chunk = list(chunk) + [chunk[-1]] * (size - len(chunk))
    own = share(chunk, jax.process_count(), jax.process_index())
    made = {i: self._row(i) for i in dict.fromkeys(own)}
    return stack([made[i] for i in own])

  def _row(self, i: int) -> Batch:
    question = self.questions[i]
    sample = Sample(str(question.id), load_image(question), turns_of(question))
    return make_row(
      sample,
      i,
      style=self.style,
      tokenizer=self.loaded.tokenizer,
      vision=self.loaded.model.vision,
      text_length=self.bucket[i],
    )


def load_image(question: Question) -> Any:
  """The question's picture as uint8[H, W, 3] RGB; DataError naming question and file if it is missing or no picture."""
  image = question.image
  if image is None or isinstance(image, np.ndarray):
    return image
  name = f'question {question.id}' + (f': {image}' if isinstance(image, pathlib.Path) else '')
  try:
    with Image.open(image if isinstance(image, pathlib.Path) else io.BytesIO(image)) as picture:
      return np.asarray(picture.convert('RGB'))
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
    raise DataError(f'{name}: the image cannot be read ({e})') from None


def provenance(cfg: EvalConfig, loaded: Loaded, questions: Sequence[Question]) -> dict[str, Any]:
  """All that the answers depend on."""
  directory, step = checkpoint.locate(loaded.path)
  names = (checkpoint.MODEL_FILE, checkpoint.TOKENIZER_FILE, f'{step}/params')
  return {
    'benchmark': cfg.benchmark,
    'questions': len(questions),
    'questions_sha256': questions_sha256(questions),
    'checkpoint': str(loaded.path),
    'step': step,
    'checkpoint_sha256': folder_sha256(directory, names),
    'conversation': loaded.info.conversation,
    'model': to_dict(loaded.model),
    'stages': [to_dict(s) for s in loaded.stages],
    'decoding': 'greedy',
    'max_new_tokens': cfg.max_new_tokens,
    'text_lengths': list(cfg.buckets),
    'dtype': cfg.dtype,
    'batch_size': cfg.batch_size,
    'mesh': to_dict(cfg.mesh),
    'versions': versions(),
  }


def answer_all(
  cfg: EvalConfig, loaded: Loaded, questions: Sequence[Question], out: pathlib.Path, mesh: jax.sharding.Mesh, console: Console
) -> RunResult:
  """Answers what `out/answers/RUN.jsonl` does not hold yet. Host 0 writes; all hosts return the same rows but it alone a path.

  Raises:
    CheckpointError, DataError: the checkpoint or a question cannot be used; finished answers stay on disk.
  """
  start = time.monotonic()
  layout = Layout(loaded, questions, cfg.buckets)
  first_host = jax.process_index() == 0
  store = AnswerStore(out / 'answers', loaded.name, provenance(cfg, loaded, questions)) if first_host else None
  done = np.zeros(len(questions), bool)
  if store:
    done[list(store.rows)] = True
    if store.set_aside:
      console.print(f'{loaded.name}: answers of another checkpoint or config were moved to {store.set_aside}')
  if jax.process_count() > 1:
    done = multihost_utils.broadcast_one_to_all(done)
  compiled = 0
  if not done.all():
    generator = Generator(
      loaded.model,
      loaded.stages,
      load_weights(loaded, mesh),
      max_new_tokens=cfg.max_new_tokens,
      eos_id=loaded.tokenizer.eos_id,
      dtype=jnp.dtype(cfg.dtype),
    )
    if store and done.any():
      console.print(f'{loaded.name}: {done.sum()} of {len(questions)} answers are there already')
    batches = layout.batches(np.flatnonzero(~done).tolist(), cfg.batch_size)
    with progress(console, loaded.name, int((~done).sum())) as advance, concurrent.futures.ThreadPoolExecutor(1) as reader:
      ahead = reader.submit(layout.rows, batches[0], cfg.batch_size)
      for n, chunk in enumerate(batches):
        batch = ahead.result()
        if n + 1 < len(batches):
          ahead = reader.submit(layout.rows, batches[n + 1], cfg.batch_size)  # decoded while the device computes
        generated = generate(generator, batch, mesh)
        if store:
          store.add(answer_row(loaded, layout, i, generated, row) for row, i in enumerate(chunk))
        advance(len(chunk))
    compiled = generator.compilations()
  rows = store.finish() if store else []
  return RunResult(rows, store.path if store else out, time.monotonic() - start, compiled)


def generate(generator: Generator, batch: Batch, mesh: jax.sharding.Mesh) -> Generated:
  """Answers of the whole batch, on every host."""
  batch = to_mesh(batch, sharding.batch_sharding(mesh))
  prompt = Prompt(batch.tokens, batch.length, batch.image_start, batch.seed)
  generated = generator(prompt, batch.pixels)
  return multihost_utils.process_allgather(generated, tiled=True) if jax.process_count() > 1 else jax.device_get(generated)


def answer_row(loaded: Loaded, layout: Layout, i: int, generated: Generated, row: int) -> dict[str, Any]:
  """One line of the answer file: LLaVA's fields, and under `metadata` what was counted at run time.

  `metadata.kept` has a character per token fed back, 1 where the gate kept it; `tokens` ends with a token never fed.
  """
  question = layout.questions[i]
  tokens = generated.tokens[row, : generated.length[row]].tolist()
  kept_image = generated.kept_image[-1][row] if question.image is not None else np.zeros(0, int)
  metadata = {
    'row': i,
    'rendered_prompt': layout.rendered[i],
    'prompt_text_tokens': layout.text_tokens[i],
    'text_length': layout.bucket[i],
    'image_tokens': len(kept_image),
    'tokens': tokens,
    'kept': ''.join('01'[int(k)] for k in generated.kept[row, : len(tokens) - 1]),
    'evicted': int(generated.evicted[row]),
  }
  if i < PICTURED:
    metadata['kept_image'] = kept_image.tolist()
  identity = hashlib.sha256(f'{loaded.path} {loaded.name} {i} {layout.rendered[i]}'.encode()).hexdigest()
  return {
    'question_id': question.id,
    'prompt': question.prompt,
    'text': loaded.tokenizer.decode(tokens),
    **question.extra,
    'answer_id': identity[:22],
    'model_id': loaded.name,
    'metadata': metadata,
  }
