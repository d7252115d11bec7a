"""A checkpoint that answers questions, from Python: what `import dynllava_jax` offers.

import dynllava_jax as dl

model = dl.load('runs/digits/dynamic/checkpoints')
print(model.answer('scene.png', 'How many digits are there?'))
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from dynllava_jax import arguments, checkpoint, costs, hub, paths
from dynllava_jax.buckets import bucket
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import DENSE, QUANTIZATIONS, ConfigError, EvalRun, Stage, from_config_dict
from dynllava_jax.controller.ladder import Ladder
from dynllava_jax.controller.rules import DECODE, Rules
from dynllava_jax.controller.rungs import by_rules, rungs
from dynllava_jax.conversation import KEEP, History
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals import budgets
from dynllava_jax.evals.layout import Loaded, load_model, load_weights
from dynllava_jax.generate import Generator
from dynllava_jax.serving import questions
from dynllava_jax.serving.chat import Chat
from dynllava_jax.serving.engine import Engine
from dynllava_jax.serving.pools import Pools
from dynllava_jax.serving.request import Options, Reply, Request
from dynllava_jax.serving.stepping import Stepper

TEXT_LENGTHS = (32, 64, 128, 256, 512, 1024)
PART = 0.2  # of the image tokens, that a method named without a number keeps
Stages = str | Sequence[Stage] | Sequence[Mapping[str, Any]] | None


def load(
  path: str | os.PathLike,
  *,
  stages: Stages = None,
  dtype: str | None = None,
  quantization: str | None = None,
  mesh: Mesh | None = None,
  max_new_tokens: int = 256,
  batch_size: int = 8,
  text_lengths: Sequence[int] = TEXT_LENGTHS,
) -> 'Model':
  """Loads a checkpoint; nothing is compiled before the first question.

  Args:
    path: DIR or DIR/STEP, on this machine or in an object store; or hf:ORG/NAME[@REVISION], converted into the user's cache.
    stages: how it is run: 'dense', 'dynamic' or a method by name, both with or without a number of image tokens ('dynamic_64',
      'fastv'), or a stage list as in configs; None is what the checkpoint was made for.
    dtype: of the computation, 'float32' or 'bfloat16'; None is bfloat16 on accelerators.
    quantization: 'int8' holds the decoder's matrices as int8, 'int8_cache' the cache's keys and values, 'int8_all' both; None is
      what the checkpoint holds.
    mesh: devices that the weights are spread over; the first device if None.
    max_new_tokens: room for answers.
    batch_size: questions that are answered at once.
    text_lengths: text buckets, in tokens besides the image's.

  Raises:
    CheckpointError, ConfigError: no checkpoint, or it cannot be run so.
    ValueError: a number that is out of range.
  """
  arguments.integer('max_new_tokens', max_new_tokens, 1, arguments.MOST_TOKENS)
  arguments.integer('batch_size', batch_size, 1, arguments.MOST_TOKENS)
  if not isinstance(text_lengths, (list, tuple)) or not text_lengths:
    raise arguments.ArgumentError(f'text_lengths: {text_lengths!r}, expected some lengths')
  if mesh is not None and not isinstance(mesh, Mesh):
    raise arguments.ArgumentError(f'mesh: {mesh!r}, expected a jax.sharding.Mesh, or None')
  for length in text_lengths:
    arguments.integer('text_lengths', length, 1, arguments.MOST_TOKENS)
  dtype = dtype_of(dtype)
  loaded, _ = describe(path, stages, quantization)
  sizes = dict(max_new_tokens=max_new_tokens, batch_size=batch_size, text_lengths=tuple(sorted(text_lengths)))
  return Model(loaded, load_weights(loaded, mesh), dtype=dtype, mesh=mesh, **sizes)


def describe(path: str | os.PathLike, stages: Stages, quantization: str | None = None) -> tuple[Loaded, EvalRun]:
  """A checkpoint without its weights, and the run that `stages` means; raises as `load` does."""
  path = converted(str(path)) if hub.is_hub(str(path)) else str(path)
  if quantization is not None and quantization not in QUANTIZATIONS:
    raise arguments.ArgumentError(f'quantization: {quantization!r}, expected {", ".join(filter(None, QUANTIZATIONS))}, or None')
  run = dataclasses.replace(run_of(checkpoint.read_info(path), stages), quantization=quantization or '')
  return load_model(stages if isinstance(stages, str) else 'model', run, path, where='stages'), run


def converted(text: str) -> str:
  """The checkpoint that a repository of the hub becomes, in the user's cache; HubError, ConversionError."""
  from dynllava_jax.convert import convert
  from dynllava_jax.convert.source import Request

  src = hub.fetched(text, 'path')
  name, _ = hub.split(text, 'path')
  dst = paths.cache() / 'converted' / name / src.name  # a folder has its name once it is whole
  if not dst.exists():
    convert.convert(Request(src=src), dst)
  return str(dst)


def name_of(path: paths.Given) -> str:
  """What a checkpoint is called by its folder: that above `checkpoints`, and above a step."""
  parts = [p for p in path.parts if not p.isdecimal() and p != 'checkpoints']
  return parts[-1] if parts else 'model'


def dtype_of(name: str | None) -> str:
  """The dtype to compute in; None is bfloat16 on accelerators. ValueError for another name."""
  if name is None:
    return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  if name not in ('float32', 'bfloat16'):
    raise arguments.ArgumentError(f'dtype: {name!r}, expected float32 or bfloat16')
  return name


def run_of(info: CheckpointInfo, stages: Stages) -> EvalRun:
  """The run of a checkpoint that `stages` means, see `load`; ConfigError for one that is unknown."""
  if stages is None:
    return EvalRun()
  if not isinstance(stages, str):
    if not isinstance(stages, (list, tuple)):
      raise ConfigError(f'stages: {stages!r}, expected a name, or a list of stages')
    if not stages:
      raise ConfigError('stages: an empty list, expected at least one stage')
    return EvalRun(stages=tuple(s if isinstance(s, Stage) else _stage(s, i) for i, s in enumerate(stages)))
  if stages == 'dense':
    return EvalRun(stages=DENSE)
  if stages == 'dynamic':
    return EvalRun(stages=dynamic_stages(info))
  name, _, number = stages.rpartition('_')
  if not number.isdecimal():
    name, number = stages, ''
  if name == 'dynamic':
    patches = info.model.num_image_tokens
    if not 0 < int(number) <= patches:
      raise ConfigError(f'stages: {stages!r} keeps {int(number)} image tokens, and the model has {patches}')
    fewer = lambda s: dataclasses.replace(s, image_tokens=int(number), image_keep_rate=1.0) if s.selector == 'dynamic' else s
    return EvalRun(stages=tuple(map(fewer, dynamic_stages(info))))
  if name not in budgets.RECIPES:
    known = ', '.join(('dense', *sorted(('dynamic', *budgets.RECIPES))))
    raise ConfigError(f'stages: {stages!r} is unknown; expected a stage list, or one of {known}, these with _N for N image tokens')
  cut = next((s.start for s in info.stages if s.start), min(2, info.model.llama.num_layers - 1))
  setting = budgets.Setting(model=info.model, cut=cut, average=False)
  budget = int(number) if number else max(1, int(setting.patches * PART))
  if not 0 < budget <= setting.patches:
    raise ConfigError(f'stages: {stages!r} keeps {budget} image tokens, and the model has {setting.patches}')
  return from_config_dict(EvalRun, ConfigDict(budgets.RECIPES[name](setting, budget)), 'stages')


def share_of(info: CheckpointInfo, share: float) -> str:
  """The `stages` that keep this share of the image tokens: by predictors if a checkpoint was trained with them, else by FastV."""
  trained = any(s.selector == 'dynamic' for s in info.stages)
  return f'{"dynamic" if trained else "fastv"}_{max(1, int(info.model.num_image_tokens * share))}'


def dynamic_stages(info: CheckpointInfo) -> tuple[Stage, ...]:
  """The stage list that a checkpoint's predictors were trained for; ConfigError if they were not."""
  if not any(s.selector == 'dynamic' for s in info.stages):
    raise ConfigError(
      "stages: 'dynamic', but this checkpoint was not made dynamic; give a stage list, or train it with a config such as "
      'configs/digits.py:dynamic'
    )
  return info.stages


def _stage(value: Mapping[str, Any], index: int) -> Stage:
  if not isinstance(value, Mapping):
    raise ConfigError(f'stages[{index}]: {value!r}, expected a Stage, or a group of its settings')
  return from_config_dict(Stage, dict(value), f'stages[{index}]')


class Model:
  """A loaded checkpoint and how it is run. Made by `load`.

  Attributes:
    loaded: its description, stage list and tokenizer.
    generator: what runs prompts, on arrays.
  """

  def __init__(
    self,
    loaded: Loaded,
    params: dict[str, Any],
    *,
    dtype: str,
    mesh: Mesh | None,
    max_new_tokens: int,
    batch_size: int,
    text_lengths: tuple[int, ...],
  ):
    self.loaded, self._params, self._dtype, self._mesh = loaded, params, jnp.dtype(dtype), mesh
    self._max_new_tokens, self._batch_size, self._text_lengths = max_new_tokens, batch_size, text_lengths
    self.generator = self._make_generator(max_new_tokens, 0)
    self._engines: dict[tuple[int, int], Engine] = {}
    self._chats: dict[tuple[int, int, bool], Stepper] = {}

  def on(self, mesh: Mesh) -> 'Model':
    """The same model with a copy of the weights on other devices; nothing is read again. `load` must have been given a mesh too."""
    params = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), self._params)
    return self._with(self.loaded, params, mesh)

  def run_as(self, stages: Stages) -> 'Model':
    """The same checkpoint run in another way, see `load`; on the same weights where both ways cut the decoder alike.

    Dense ones are cut as this one is. Raises as `load` does.
    """
    loaded, _ = describe(self.loaded.path, stages, self.loaded.quantization)
    starts = [s.start for s in self.loaded.stages]
    if loaded.stages == DENSE and loaded.reducer is None:
      loaded = dataclasses.replace(loaded, stages=tuple(Stage(start=start) for start in starts))
    shared = starts == [s.start for s in loaded.stages] and (loaded.reducer is None) == (self.loaded.reducer is None)
    return self._with(loaded, self._params if shared else load_weights(loaded, self._mesh), self._mesh)

  def _with(self, loaded: Loaded, params: dict[str, Any], mesh: Mesh | None) -> 'Model':
    sizes = dict(max_new_tokens=self._max_new_tokens, batch_size=self._batch_size, text_lengths=self._text_lengths)
    return Model(loaded, params, dtype=self._dtype, mesh=mesh, **sizes)

  def answer(self, image: Any, question: Any, **options: Any) -> Any:
    """The answer to a question about a picture, or those to a list of questions in their order.

    Args:
      image: a path, the bytes of a file, a Pillow image, uint8[H, W, 3], or None for a question without picture; a list goes with
        a list of questions.
      question: the user's words, or a list of such.
      **options: see `dynllava_jax.Options`; `seed` may be a list, one for each question.

    Raises:
      DataError: a question that cannot be asked, such as one with several pictures, or a prompt longer than all `text_lengths`.
      ValueError: an option that cannot be.
      FloatingPointError: the model does not compute numbers.
    """
    replies = self.reply(image, question, **options)
    return [r.text for r in replies] if isinstance(replies, list) else replies.text

  def reply(self, image: Any, question: Any, **options: Any) -> Any:
    """As `answer`, with all that was counted: a `Reply`, or a list of them."""
    asked, many = questions.pairs(image, question)
    seeds = options.pop('seed', 0)
    seeds = list(seeds) if isinstance(seeds, (list, tuple)) else [seeds] * len(asked)
    if len(seeds) != len(asked):
      raise arguments.ArgumentError(f'seed: {len(seeds)} seeds for {len(asked)} questions; give one for each, or one for all')
    each = [Options(**options, seed=seed) for seed in seeds]
    self._check_room(each[0].max_tokens if each else None, self._max_new_tokens)
    rows = questions.lay_out(
      self.loaded, [questions.question(i, *pair) for i, pair in enumerate(asked, 1)], self._text_lengths, seeds
    )
    requests = [Request(f'question {i}', row, option) for i, (row, option) in enumerate(zip(rows, each), 1)]
    replies = self._run(requests)
    return replies if many else replies[0]

  def chat(
    self,
    image: Any = None,
    *,
    max_new_tokens: int = 512,
    later_tokens: int = 512,
    before: Sequence[Mapping[str, str]] = (),
    history: str | History = KEEP,
    **options: Any,
  ) -> Chat:
    """Begins a conversation about a picture, or none.

    Args:
      image: as in `answer`.
      max_new_tokens, later_tokens: room of its cache for answers and for later questions, of all turns; of those since room was
        made where `history` makes some.
      before: what was said so far, as `Chat.turns` has it; the model reads it anew.
      history: 'keep' all turns and refuse one that does not fit; 'extract' the most important sentences of earlier ones, or
        'summarise' them in the model's words, when they do not fit or are longer than a budget; or a `History`.
      **options: of `History`, such as `budget=96`.

    Raises:
      DataError: no picture.
      ValueError: an option that cannot be.
    """
    history = history if isinstance(history, History) else History(mode=history, **options)
    keeps = history.mode == KEEP
    sizes = max_new_tokens, later_tokens, keeps
    if sizes not in self._chats:
      # What the gate keeps is not given up where it is to be known which token lies in which slot.
      stages = None if keeps else tuple(dataclasses.replace(s, text_keep_budget=1.0) for s in self.loaded.stages)
      self._chats[sizes] = Stepper(self._make_generator(max_new_tokens, later_tokens, stages))
    return Chat(
      self._chats[sizes], self.loaded, image, self._text_lengths, steps=8, before=before, history=None if keeps else history
    )

  def adaptive(
    self,
    room: int,
    *,
    lists: Mapping[str, tuple[Stage, ...]] | None = None,
    rules: Rules | None = None,
    phase: str = DECODE,
    text_length: int | None = None,
    **engine: Any,
  ) -> Engine:
    """An engine that answers as sparsely as its load asks for, densely when idle; see `controller.ladder`.

    Args:
      room: bytes for keys and values of all that is answered at once.
      lists: stage lists by name, from dense to sparsest, cut where the model is cut; those of the rules if None.
      rules: the controller's numbers; phase: what most of the work is, `PREFILL` or `DECODE`.
      text_length: the largest text bucket; the largest of the model if None.
      **engine: see `Engine`.

    Raises:
      ConfigError: a list that the model cannot be run with, or a room that holds nobody.
    """
    model, rules = self.loaded.model, rules or Rules()
    lists = lists or by_rules(self.loaded.stages, model, rules, phase)
    width = costs.number_bytes(model, self._dtype.itemsize, self.loaded.int8_cache)
    ladder = Ladder(rungs(model, lists, width, self.loaded.reducer), rules)
    generators = {r.name: self._make_generator(self._max_new_tokens, 0, r.stages) for r in ladder.rungs}
    text_length = text_length or max(self._text_lengths)
    return Engine(Pools.on(ladder, generators, room, text_length), self.loaded.tokenizer, text_length=text_length, **engine)

  def _run(self, requests: Sequence[Request]) -> list[Reply]:
    """Answers requests through an engine that has room for the longest prompt, those of one bucket after each other."""
    if not requests:
      return []
    lengths = [r.rows.prompt.tokens.shape[1] - self.loaded.num_image for r in requests]
    engine = self._engine(max(lengths), min(self._batch_size, bucket(len(requests), 1)))
    order = sorted(range(len(requests)), key=lambda i: lengths[i])
    tickets = {}
    for i in order:
      tickets[i] = engine.submit(requests[i])
    try:
      engine.run(list(tickets.values()))
    except BaseException:
      for ticket in tickets.values():
        engine.cancel(ticket)
      raise
    return [tickets[i].reply() for i in range(len(requests))]

  def _engine(self, text_length: int, slots: int) -> Engine:
    if (text_length, slots) not in self._engines:
      while len(self._engines) > 1:  # each holds a cache
        self._engines.pop(next(iter(self._engines)))
      limit = arguments.MOST_TOKENS
      self._engines[text_length, slots] = Engine(
        self.generator, self.loaded.tokenizer, text_length=text_length, slots=slots, limit=limit
      )
    return self._engines[text_length, slots]

  def _make_generator(self, max_new_tokens: int, later_tokens: int, stages: tuple[Stage, ...] | None = None) -> Generator:
    return Generator(
      self.loaded.model,
      stages or self.loaded.stages,
      self._params,
      max_new_tokens=max_new_tokens,
      eos_id=self.loaded.tokenizer.eos_id,
      later_tokens=later_tokens,
      dtype=self._dtype,
      reducer=self.loaded.reducer,
      int8_cache=self.loaded.int8_cache,
    )

  def _check_room(self, wanted: int | None, room: int) -> None:
    if wanted is not None and wanted > room:
      raise DataError(f'max_tokens: {wanted}, and there is room for {room}; raise max_new_tokens of load', 'too_long')
