"""Answers a benchmark's questions with one stage list: sharded over devices and hosts, resumable."""

import concurrent.futures
import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from dynllava_jax import checkpoint, sharding
from dynllava_jax.checkpoint import CheckpointError, CheckpointInfo
from dynllava_jax.config import (
  IMAGE_ID,
  TOKENIZER_FILES,
  ConfigError,
  EvalConfig,
  EvalRun,
  ModelConfig,
  Stage,
  check_stages,
  to_dict,
)
from dynllava_jax.data import conversation, images
from dynllava_jax.data.pipeline import to_mesh
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.tokenizer import Tokenizer, load_tokenizer
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
  files = checkpoint.read_tokenizer(path)
  if files is None:
    raise CheckpointError(f'{path}: has no tokenizer; this evaluation needs the one it was trained with')
  return Loaded(name, path, info, model, stages, load_tokenizer(files))


def load_weights(loaded: Loaded, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Parameters on the mesh, position embeddings scaled to the run's image size."""
  params = checkpoint.load_params(loaded.path, mesh)
  return resize_tower(params, loaded.info.model.vision, loaded.model.vision)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """A batch on its way to the device; `pixels` uint8[B, R, R, 3], zeros for questions without image."""

  prompt: Prompt
  pixels: np.ndarray


def first_turn(question: Question) -> tuple[dict[str, str], ...]:
  """The conversation up to the first question, the image in front of it."""
  text = question.text[0]
  return ({'from': 'human', 'value': text if question.image is None else f'{conversation.IMAGE_TOKEN}\n{text}'},)


class Layout:
  """Questions to rows of batches, for one model."""

  def __init__(self, loaded: Loaded, questions: Sequence[Question], buckets: Sequence[int]):
    """Encodes all prompts, exactly as LLaVA's inference does; DataError for one that fits no bucket."""
    self.loaded, self.questions = loaded, questions
    style = conversation.template(loaded.info.conversation)
    self.rendered: list[str] = []
    self.ids: list[np.ndarray] = []
    self.text_tokens: list[int] = []
    self.bucket: list[int] = []
    for question in questions:
      turns = first_turn(question)
      text, _ = conversation.render(turns, style, str(question.id))
      conversation.check_special(turns, loaded.tokenizer, str(question.id))
      ids = conversation.encode(text, [], loaded.tokenizer).ids
      images_named = int((ids == IMAGE_ID).sum())
      if images_named != (question.image is not None):
        raise DataError(f'question {question.id}: the text names {conversation.IMAGE_TOKEN} itself')
      tokens = len(ids) - images_named
      fitting = [b for b in buckets if b >= tokens]
      if not fitting:
        raise DataError(f'question {question.id}: {tokens} text tokens, the largest of config.text_lengths is {max(buckets)}')
      self.rendered.append(text)
      self.ids.append(ids)
      self.text_tokens.append(tokens)
      self.bucket.append(fitting[0])

  def batches(self, todo: Sequence[int], size: int) -> list[list[int]]:
    """Question numbers in groups of at most `size`, of one text bucket and one expected length each."""
    groups: dict[tuple, list[int]] = {}
    for i in todo:
      groups.setdefault((self.bucket[i], self.questions[i].long), []).append(i)
    return [g[i : i + size] for _, g in sorted(groups.items()) for i in range(0, len(g), size)]

  def rows(self, chunk: Sequence[int], size: int) -> Rows:
    """This host's part of a batch, filled up with copies of its last question to one shape for all batches."""
    chunk = list(chunk) + [chunk[-1]] * (size - len(chunk))
    own = share(chunk, jax.process_count(), jax.process_index())
    made = {i: self._row(i) for i in dict.fromkeys(own)}
    return jax.tree.map(lambda *xs: np.stack(xs), *(made[i] for i in own))

  def _row(self, i: int) -> Rows:
    vision, ids = self.loaded.model.vision, self.ids[i]
    (where,) = np.nonzero(ids == IMAGE_ID)
    start = int(where[0]) if len(where) else -1
    pad = self.loaded.tokenizer.pad_id
    if len(where):
      ids = np.concatenate([ids[:start], np.full(vision.num_patches, pad, np.int32), ids[start + 1 :]])
    tokens = np.full(self.bucket[i] + vision.num_patches, pad, np.int32)
    tokens[: len(ids)] = ids
    image = load_image(self.questions[i])
    size = vision.image_size
    pixels = np.zeros((size, size, 3), np.uint8) if image is None else images.preprocess(image, vision)
    return Rows(Prompt(tokens, np.int32(len(ids)), np.int32(start), np.uint32(i)), pixels)


def load_image(question: Question) -> Any:
  """The question's picture as RGB; DataError naming question and file if it is missing or no picture."""
  image = question.image
  if isinstance(image, pathlib.Path):
    try:
      return images.decode(image.read_bytes(), f'question {question.id}: {image}')
    except OSError as e:
      raise DataError(f'question {question.id}: {image} cannot be read ({e.strerror})', 'missing_image') from None
  return images.decode(image, f'question {question.id}') if isinstance(image, bytes) else image


def provenance(cfg: EvalConfig, loaded: Loaded, questions: Sequence[Question]) -> dict[str, Any]:
  """All that the answers depend on."""
  directory, step = checkpoint.locate(loaded.path)
  names = (checkpoint.MODEL_FILE, *TOKENIZER_FILES, f'{step}/params')
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


def generate(generator: Generator, rows: Rows, mesh: jax.sharding.Mesh) -> Generated:
  """Answers of the whole batch, on every host."""
  rows = to_mesh(rows, sharding.batch_sharding(mesh))
  generated = generator(rows.prompt, rows.pixels)
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
