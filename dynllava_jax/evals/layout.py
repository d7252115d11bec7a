"""Questions to batches: prompts exactly as LLaVA's inference makes them, laid out for fixed shapes."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import checkpoint, methods
from dynllava_jax.checkpoint import CheckpointError, CheckpointInfo
from dynllava_jax.config import IGNORE, IMAGE_ID, QUANTIZATIONS, ConfigError, EvalRun, ModelConfig, Piece, Stage
from dynllava_jax.data import conversation, images
from dynllava_jax.data.question_words import QuestionWords
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.tokenizer import Tokenizer, load_tokenizer
from dynllava_jax.evals.benchmarks.base import WORD, Question, unreadable
from dynllava_jax.evals.exit_thresholds import with_thresholds
from dynllava_jax.evals.resize import resize_tower
from dynllava_jax.files import read_regular
from dynllava_jax.models.batch import question_segments
from dynllava_jax.models.dynllava import Prompt

IMAGE_MARK = f'{conversation.IMAGE_TOKEN}\n'  # in front of the words that come with the picture
CHUNK = 16  # questions of later rounds are padded to a multiple of this
GOLDEN_RATIO = 0x9E3779B9  # of 2^32: multiples lie far apart, so the rows of two seeds hardly meet


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What a run needs besides its weights."""

  name: str
  path: str
  info: CheckpointInfo
  model: ModelConfig  # with the run's image size
  stages: tuple[Stage, ...]
  reducer: Piece | None
  tokenizer: Tokenizer
  words: QuestionWords | None = None  # if its reducer goes by the question
  quantization: str = ''  # as in `EvalRun`

  @property
  def num_image(self) -> int:
    """Image tokens that the language model sees."""
    return methods.num_image_tokens(self.model, self.reducer)

  @property
  def int8_weights(self) -> bool:
    """Whether the decoder's matrices are made int8; those of an int8 checkpoint are."""
    return 'weights' in QUANTIZATIONS[self.quantization]

  @property
  def int8_cache(self) -> bool:
    """Whether keys and values are held as int8."""
    return 'cache' in QUANTIZATIONS[self.quantization]


def load_model(name: str, run: EvalRun, default: str, where: str = '', calibrated: bool = True) -> Loaded:
  """Description and tokenizer of a run's checkpoint, `default` if the run names none.

  Args:
    name, run, default: see above; where: what messages call the run.
    calibrated: with the stored thresholds where exits name a ratio.

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
    if calibrated:
      stages = with_thresholds(stages, path, model.llama.num_layers)
    reducer = run.reducer or (None if run.stages else info.reducer)
    methods.check_run(model, stages, reducer)
    methods.check_tail(model, reducer, info.unused_vision_layers)
  except ConfigError as e:
    raise ConfigError(f'{where or f"config.runs.{name}"}: {e}') from None
  files = checkpoint.read_tokenizer(path)
  if files is None:
    raise CheckpointError(f'{path}: has no tokenizer; questions need the one it was trained with')
  words = None
  if methods.tower_needs(model, reducer).question:
    try:
      words = QuestionWords(checkpoint.read_assets(path), model.clip_text)
    except ConfigError as e:
      raise ConfigError(f'{path}: reducer {reducer.name}: {e}') from None
  return Loaded(name, path, info, model, stages, reducer, load_tokenizer(files), words, run.quantization)


def load_weights(loaded: Loaded, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Parameters on the mesh, cut for the run's stages, position embeddings scaled to its image size.

  Raises:
    CheckpointError: they hold what is no number, or `checkpoint.load_params` says why.
  """
  tail = methods.needs_tail(loaded.model, loaded.reducer)
  params = checkpoint.load_params(loaded.path, mesh, stages=loaded.stages, tail=tail, int8=loaded.int8_weights)
  finite = jax.jit(lambda tree: [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])(params)
  for (path, _), whole in zip(jax.tree_util.tree_leaves_with_path(params), jax.device_get(finite)):
    if not whole:
      name = re.sub(r'/stage_\d+(_\d+)?/', '/layers/', jax.tree_util.keystr(path, simple=True, separator='/'))
      name = re.sub('^scales/', 'llama/', name).replace('/qkv', '/q, k or v')  # scales are made of the weights
      raise CheckpointError(f'{loaded.path}: {name} holds numbers that are not finite; convert or train it again')
  return resize_tower(params, loaded.info.model.vision, loaded.model.vision)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """A batch on its way to the device.

  Attributes:
    prompt: the first questions.
    pixels: uint8[B, R, R, 3], zeros for questions without image.
    later: int32[B, L, C], the questions of the L later rounds, right-padded.
    counts: int32[B, L], their lengths.
  """

  prompt: Prompt
  pixels: np.ndarray
  later: np.ndarray
  counts: np.ndarray

  def seeded(self, seed: int) -> 'Rows':
    """The same rows, all with this seed."""
    return dataclasses.replace(self, prompt=dataclasses.replace(self.prompt, seed=np.full_like(self.prompt.seed, seed)))


def first_turn(question: Question) -> tuple[dict[str, str], ...]:
  """The conversation up to the first question, the image in front of it if it did not come before."""
  here = question.image is not None and not any(IMAGE_MARK in turn['value'] for turn in question.before)
  return (*question.before, {'from': 'human', 'value': (IMAGE_MARK if here else '') + question.text[0]})


class Layout:
  """Questions to rows of batches, for one model."""

  def __init__(
    self, loaded: Loaded, questions: Sequence[Question], buckets: Sequence[int], seed: int, setting: str = 'config.text_lengths'
  ):
    """Encodes all prompts, exactly as LLaVA's inference does; DataError for one that fits none of the buckets, called `setting`."""
    self.loaded, self.questions, self.seed = loaded, questions, seed
    style = conversation.template(loaded.info.conversation)
    conversation.check_template(style, loaded.tokenizer)
    self._segments = None
    if loaded.words:
      self._segments = question_segments([self._asked(q) for q in questions], loaded.model.clip_text.num_positions)
    self.later: list[list[np.ndarray]] = []  # ids of the later rounds' questions
    self.rendered: list[str] = []
    self.ids: list[np.ndarray] = []
    self.text_tokens: list[int] = []
    self.bucket: list[int] = []
    self._answered: list[int] = []  # ids up to the end of the answer before the question
    for question in questions:
      turns = first_turn(question)
      text, spans = conversation.render(turns, style, str(question.id))
      conversation.check_special(turns, loaded.tokenizer.special, str(question.id))
      ids, labels = dataclasses.astuple(conversation.encode(text, spans, loaded.tokenizer))
      images_named = int((ids == IMAGE_ID).sum())
      if images_named != (question.image is not None):
        raise DataError(f'question {question.id}: the text names {conversation.IMAGE_TOKEN} itself')
      tokens = len(ids) - images_named
      fitting = [b for b in buckets if b >= tokens]
      if not fitting:
        raise DataError(f'question {question.id}: {tokens} text tokens, the largest of {setting} is {max(buckets)}')
      self.later.append([later_round(q, loaded.tokenizer) for q in question.text[1:]])
      self.rendered.append(text)
      self.ids.append(ids)
      self._answered.append(1 + int(np.flatnonzero(labels != IGNORE).max(initial=-1)))
      self.text_tokens.append(tokens)
      self.bucket.append(fitting[0])

  def _asked(self, question: Question) -> list[int] | None:
    """What the conversation began with, as CLIP's text tower reads it: the words alone; None without image."""
    words = first_turn(question)[0]['value'].replace(IMAGE_MARK, '').removesuffix(f'\n{WORD}')
    return None if question.image is None else self.loaded.words.ids(words)

  def batches(self, todo: Sequence[int], size: int) -> list[list[int]]:
    """Question numbers in groups of at most `size`, of one number of rounds, one text bucket and one expected length."""
    groups: dict[tuple, list[int]] = {}
    for i in todo:
      groups.setdefault((len(self.later[i]), self.bucket[i], self.questions[i].long), []).append(i)
    return [g[i : i + size] for _, g in sorted(groups.items()) for i in range(0, len(g), size)]

  def rows(self, own: Sequence[int]) -> Rows:
    """Rows of these questions."""
    made = {i: self._row(i) for i in dict.fromkeys(own)}
    return jax.tree.map(lambda *xs: np.stack(xs), *(made[i] for i in own))

  def chunk_length(self) -> int:
    """Length to which the questions of later rounds are padded; 0 if there is but one round."""
    longest = max((len(ids) for later in self.later for ids in later), default=0)
    return -(-longest // CHUNK) * CHUNK

  def later_tokens(self) -> int:
    """Room that a cache needs for later rounds."""
    return self.chunk_length() * max(map(len, self.later))

  def _row(self, i: int) -> Rows:
    vision, ids = self.loaded.model.vision, self.ids[i]
    (where,) = np.nonzero(ids == IMAGE_ID)
    start = int(where[0]) if len(where) else -1
    pad = self.loaded.tokenizer.pad_id
    if len(where):
      ids = np.concatenate([ids[:start], np.full(self.loaded.num_image, pad, np.int32), ids[start + 1 :]])
    tokens = np.full(self.bucket[i] + self.loaded.num_image, pad, np.int32)
    tokens[: len(ids)] = ids
    image, size = load_image(self.questions[i]), vision.image_size
    pixels = np.zeros((size, size, 3), np.uint8)
    if image is not None:
      pixels = images.preprocess(image, vision, self.loaded.info.image_aspect)
    later = pad_rows(self.later[i], self.chunk_length(), pad) if self.later[i] else np.zeros((0, 0), np.int32)
    counts = np.asarray([len(ids) for ids in self.later[i]], np.int32)
    answered = self._answered[i] + (self.loaded.num_image - 1 if self._answered[i] > start else 0)
    # The last question is the instruction, from the image on if that came with it.
    instruct = max(start + self.loaded.num_image, answered) if len(where) else len(ids)
    asked = None if self._segments is None else self._segments[i]
    prompt = Prompt(tokens, np.int32(len(ids)), np.int32(start), row_seed(self.seed, i), np.int32(instruct), asked)
    return Rows(prompt, pixels, later, counts)


def row_seed(seed: int, i: int) -> np.uint32:
  """Seed of question `i` of a run with `config.seed`; with 0 its number. Different for all questions of a run."""
  return np.uint32((i + seed * GOLDEN_RATIO) % 2**32)


def pad_rows(rows: Sequence[Sequence[int]], length: int, pad: int) -> np.ndarray:
  """int32[N, length] from N rows of at most `length` tokens."""
  out = np.full((len(rows), length), pad, np.int32)
  for i, row in enumerate(rows):
    out[i, : len(row)] = row
  return out


def later_round(question: str, tokenizer: Tokenizer) -> np.ndarray:
  """Ids of a question of the second or a later round, as the authors' long-answer scripts write it.

  Unlike in training there is neither a blank around the question nor the end token of the answer before it.
  """
  return np.asarray([i for i, _ in tokenizer.encode(f'USER:{question}ASSISTANT:')], np.int32)


def load_image(question: Question) -> Any:
  """The question's picture as RGB; DataError naming question and file if it is missing or no picture."""
  image = question.image
  if isinstance(image, pathlib.Path):
    try:
      return images.decode(read_regular(image, images.MAX_BYTES), f'question {question.id}: {image}')
    except OSError as e:
      raise unreadable(question, e) from None
  return images.decode(image, f'question {question.id}') if isinstance(image, bytes) else image
