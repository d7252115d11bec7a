"""A conversation about one picture, or none, whose cache is kept from turn to turn: only what is new is ever computed."""

import dataclasses
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.conversation import SUMMARISE, Compaction, History
from dynllava_jax.data import conversation
from dynllava_jax.data.batches import encode_turns
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks.kinds import check_words
from dynllava_jax.evals.layout import CHUNK, IMAGE_MARK, Loaded, first_turn
from dynllava_jax.generated import PAD
from dynllava_jax.serving import questions
from dynllava_jax.serving import request as req
from dynllava_jax.serving.remembering import Remembering
from dynllava_jax.serving.request import Options, Reply, Timings
from dynllava_jax.serving.stepping import Running, Stepper, of_tokens, wishes
from dynllava_jax.serving.text import Text


class Chat:
  """A conversation. Made by `Model.chat`; `turns`: what was said so far, in LLaVA's form."""

  def __init__(
    self,
    stepper: Stepper,
    loaded: Loaded,
    image: Any,
    text_lengths: tuple[int, ...],
    steps: int,
    before: Sequence[Mapping[str, str]] = (),
    history: History | None = None,
  ):
    """Computes nothing yet.

    Args:
      stepper: of a generator whose `max_new_tokens` and `later_tokens` are for the whole conversation, or until room is made.
      loaded: the model; image: the picture, or None; text_lengths: text buckets.
      steps: tokens per dispatch.
      before: `turns` of an earlier conversation about this picture, which this one goes on with.
      history: what becomes of turns that there is no room for; None keeps all and refuses more.
    """
    self._stepper, self._loaded, self._text_lengths, self._steps = stepper, loaded, text_lengths, steps
    self._image = questions.picture('chat', image)
    self._running: Running | None = None
    self._kept_image = np.zeros(0, np.int32)
    spec = stepper.generator.spec
    self._new_left, self._later_left = spec.max_new_tokens, spec.later_tokens
    self._memory = None if history is None else Remembering(stepper, history, loaded.tokenizer, self._style)
    self._unfed: list[int] = []  # what the last answer ended with, if that was not fed and is not its end
    self.turns: list[dict[str, str]] = [dict(turn) for turn in before]

  @property
  def compactions(self) -> tuple[Compaction, ...]:
    """What was left out so far, and when."""
    return () if self._memory is None else tuple(self._memory.compactions)

  def send(self, text: str, **options: Any) -> Reply:
    """Says something and waits for the whole answer.

    Args:
      text: the user's words.
      **options: see `Options`.

    Raises:
      DataError: no words, or no room left for them.
      FloatingPointError: the model does not compute numbers.
    """
    reply, pieces = None, self._say(text, Options(**options))
    while reply is None:
      try:
        next(pieces)
      except StopIteration as end:
        reply = end.value
    return reply

  def stream(self, text: str, **options: Any) -> Generator[str, None, Reply]:
    """As `send`, piece by piece; the generator returns the reply. A reader that stops listening ends the answer there."""
    return (yield from self._say(text, Options(**options), steps=1))

  @property
  def held(self) -> int:
    """Text tokens of what was said that the cache holds, where `history` looks after them; 0 where all are kept."""
    return 0 if self._memory is None or self._running is None else self._memory.held

  @property
  def cache_bytes(self) -> int:
    """Of the keys and values that the conversation holds, with all their room."""
    stages = self._running.turn.cache.stages if self._running else ()
    return sum(x.nbytes for x in jax.tree.leaves([s.arrays for s in stages]))

  def _say(self, text: str, options: Options, steps: int = 0) -> Generator[str, None, Reply]:
    """Pieces of the answer; returns the reply. One token per dispatch where an answer may end that the model would go on with."""
    check_words(text, f'turn {len(self.turns) // 2 + 1}')
    if self._memory is not None and self._running is not None:
      self._make_room(text, options)
    if self._new_left < 1:
      raise DataError(f'the conversation is full: all {self._stepper.generator.max_new_tokens} tokens of its answers are used; '
                      'begin a new one, or raise max_new_tokens of chat', 'too_long')  # fmt: skip
    asked = time.monotonic()
    wanted = wishes([options], [self._new_left])
    self._running = self._first(text, wanted, options.seed) if self._running is None else self._later(text, wanted)
    begun, first = time.monotonic(), 0.0
    output, parts = Text(self._loaded.tokenizer, options.stop), list[Any]()
    try:
      finish, first = yield from self._answer(output, parts, options, steps, asked)
    finally:
      self.turns += [{'from': 'human', 'value': text}, {'from': 'gpt', 'value': output.text}]
    log_probs, kept, evicted = self._joined(parts)
    timings = Timings(begun - asked, first - asked, time.monotonic() - asked)
    kept_image = tuple(self._kept_image.tolist())
    return Reply(output.text, tuple(output.tokens), tuple(log_probs), kept_image, tuple(kept[:-1]), evicted, finish, timings)

  def _answer(
    self, output: Text, parts: list[Any], options: Options, steps: int, asked: float
  ) -> Generator[str, None, tuple[str, float]]:
    """Pieces of an answer to what was just run, which goes to `output` and `parts`; returns why it is over and when it began."""
    finish, first, fed = '', 0.0, False
    steps = 1 if options.stop or options.timeout else steps or self._steps
    try:
      while not finish:
        self._running, out = self._stepper.advance(self._running, np.zeros(1, bool), steps)
        out = jax.device_get(out)
        if not out.finite[0]:
          raise FloatingPointError(f'the logits of {self._loaded.path} are not finite; look at the weights, or compute in float32')
        count = int(out.count[0])
        first = first or time.monotonic()
        parts.append((out.log_prob[0, :count], out.kept[0, :count], out.evicted[0, count - 1]))
        self._new_left -= count
        stopped, fed = False, bool(out.active[0])
        for token in out.tokens[0, :count].tolist():
          stopped = output.push(token)
        finish = self._finish(output.tokens[-1], stopped, fed, options, asked)
        if not finish and (piece := output.piece()):
          yield piece
      if piece := output.piece(last=True):
        yield piece
    finally:
      if parts:
        self._unfed = [] if fed or output.tokens[-1] == self._end else output.tokens[-1:]
        if self._memory is not None:
          log_probs, kept, _ = self._joined(parts)
          self._memory.answered(output.tokens, log_probs, kept, fed, self._running.turn)
    return finish, first

  def _joined(self, parts: list[Any]) -> tuple[list[float], list[bool], int]:
    log_probs, kept, evicted = zip(*parts)
    of_each = of_tokens(np.concatenate(kept).tolist(), self._stepper.generator.judged_later)
    return np.concatenate(log_probs).tolist(), of_each, int(evicted[-1])

  def _make_room(self, text: str, options: Options) -> None:
    """Before a later turn: leaves out of earlier ones what it has no room for, or more than the budget."""
    memory, history, most = self._memory, self._memory.history, self._stepper.generator.max_new_tokens
    chunk, answer = len(self._chunk(text)), min(options.max_tokens or most, most)
    question = len(self._chunk(history.prompt)) if history.mode == SUMMARISE else 0
    summary = min(most, max(1, history.budget - question)) if question else 0
    if max(chunk, question) > memory.room(self._running):
      raise DataError(
        f'this turn has {max(chunk, question)} tokens, and a conversation without its earlier turns has room for '
        f'{memory.room(self._running)}; shorten it, or raise later_tokens of chat', 'too_long')  # fmt: skip
    short = lambda: self._later_left < chunk or self._new_left < answer or memory.held > history.budget
    if not short():
      return
    fits = min(history.budget, memory.room(self._running) - chunk)  # together, what is held may fit as it is
    if question and memory.held > fits:
      if self._later_left < question or self._new_left < summary:
        self._left(memory.make_room(self._running, min(history.budget, memory.room(self._running) - question)))
      self._running = self._later(history.prompt, wishes([Options()], [summary]))
      output = Text(self._loaded.tokenizer, ())
      for _ in self._answer(output, [], Options(), 0, time.monotonic()):
        pass
      self._left(memory.make_room(self._running, history.budget, memory.exchange, output.text))
    if short():
      self._left(memory.make_room(self._running, fits))

  def _left(self, running: Running) -> None:
    """Room was made: the cache has that of later turns which nothing holds, and that of answers anew."""
    self._running = running
    self._later_left, self._new_left = self._memory.left(running), self._stepper.generator.max_new_tokens

  def _finish(self, last: int, stopped: bool, active: bool, options: Options, asked: float) -> str:
    if last == self._stepper.generator.eos_id:
      return req.END
    if stopped:
      return req.STOP
    if not active:
      return req.LENGTH
    return req.TIMED_OUT if options.timeout and time.monotonic() - asked > options.timeout else ''

  def _first(self, text: str, wanted: Any, seed: int) -> Running:
    before = [dict(turn) for turn in self.turns]
    if before and self._image is not None:
      before[0]['value'] = IMAGE_MARK + before[0]['value']
    asked = dataclasses.replace(questions.question(1, None, text), image=self._image, before=tuple(before))
    (rows,) = questions.lay_out(self._loaded, [asked], self._text_lengths, [seed])
    turn, kept_image = self._stepper.generator.start(rows.prompt, rows.pixels)
    if self._image is not None:
      self._kept_image = np.asarray(kept_image[-1])[0]
    if self._memory is not None:
      self._memory.began(rows, turn)
    return self._stepper.begin(turn, rows.prompt, wanted)

  def _chunk(self, text: str) -> list[int]:
    """What stands between the last token that was fed and the next answer, as training writes it."""
    # Only what follows an answer's end is taken of it, so any answer will do.
    said = [self.turns[0], {'from': 'gpt', 'value': '.'}, {'from': 'human', 'value': text}]
    said[0] = first_turn(dataclasses.replace(questions.question(1, None, said[0]['value']), image=self._image))[0]
    style, tokenizer = self._style, self._loaded.tokenizer
    ids = encode_turns('chat', said, self._image is not None, style=style, tokenizer=tokenizer).ids
    ends = np.flatnonzero(ids == self._end)
    return [*self._unfed, *ids[ends[-1] :].tolist()]

  def _later(self, text: str, wanted: Any) -> Running:
    """Runs a later question."""
    chunk = self._chunk(text)
    if len(chunk) > self._later_left:
      raise DataError(
        f'the conversation is full: this turn has {len(chunk)} tokens, and there is room for {self._later_left} of later turns; '
        'begin a new one, or raise later_tokens of chat',
        'too_long',
      )
    tokens = np.full((1, min(-(-len(chunk) // CHUNK) * CHUNK, self._later_left)), PAD, np.int32)
    tokens[0, : len(chunk)] = chunk
    self._later_left -= len(chunk)
    turn, logits = self._stepper.generator.append(self._running.turn, tokens, np.asarray([len(chunk)], np.int32))
    if self._memory is not None:
      self._memory.asked(chunk, len(self._unfed) + 1, logits)
    seen = self._running.seen.at[0, jnp.asarray(chunk)].set(True)
    return Running(turn, wanted, jnp.ones(1, bool), seen)

  @property
  def _style(self) -> conversation.Template:
    return conversation.template(self._loaded.info.conversation)

  @property
  def _end(self) -> int:
    """The token that ends an answer in this template."""
    ((token, _),) = self._loaded.tokenizer.encode(self._style.end.strip())
    return token
