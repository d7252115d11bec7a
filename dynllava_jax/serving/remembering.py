"""A chat's memory at work: it is told what is fed to the cache, and makes room when a turn no longer fits."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.compaction import Survivors, why_not
from dynllava_jax.config import judges_instructions
from dynllava_jax.conversation import FIXED, FRAME, IMPORTANCE, REROTATE, Compaction, History, Memory, Token, choose, sentences
from dynllava_jax.data.conversation import Template
from dynllava_jax.data.tokenizer import Tokenizer
from dynllava_jax.evals.layout import Rows
from dynllava_jax.generated import Turn
from dynllava_jax.serving.stepping import Running, Stepper


class Remembering:
  """What a conversation of one row holds, and what it gave up: `compactions`."""

  def __init__(self, stepper: Stepper, history: History, tokenizer: Tokenizer, style: Template):
    self.history, self.compactions = history, list[Compaction]()
    self._stepper, self._tokenizer, self._style = stepper, tokenizer, style
    self._exchange = 0

  @property
  def held(self) -> int:
    """Text tokens of earlier turns in the cache."""
    return self.memory.held

  def began(self, rows: Rows, turn: Turn) -> None:
    """A first prompt was run."""
    prompt = rows.prompt
    length, start = int(prompt.length[0]), int(prompt.image_start[0])
    image = self._stepper.generator.model.num_image if start >= 0 else 0
    ids = np.asarray(prompt.tokens[0, :length])
    fixed = start + image if image else self._written(ids.tolist(), self._style.first)
    said = self._tokens(ids[fixed:].tolist(), fixed, answer=False, before='')
    before = [Token(-1 if start <= i < start + image else int(ids[i]), FIXED, FRAME, False, i) for i in range(fixed)]
    self.memory = Memory(len(turn.cache.stages))
    self._rows, self._image, self._start = rows, image, start
    self._note_prompt([*before, *said], turn)

  def asked(self, ids: Sequence[int], ends: int, logits: jax.Array) -> None:
    """A later turn was appended.

    Args:
      ids: of the chunk; the first `ends` of them end the answer before it.
      logits: float32[1, T, V] of its positions.
    """
    chosen = jax.nn.log_softmax(logits[0, : len(ids) - 1], -1)[jnp.arange(len(ids) - 1), jnp.asarray(ids[1:])]
    surprise = [float('nan'), *(-np.asarray(chosen)).tolist()]
    position = self._next_position()
    old = [Token(i, self._exchange, FRAME, True, position + n, surprise[n]) for n, i in enumerate(ids[:ends])]
    self._exchange += 1
    new = self._tokens(list(ids[ends:]), position + ends, False, self._style.next, surprise[ends:])
    self._add([*old, *new])

  def answered(self, ids: Sequence[int], log_probs: Sequence[float], kept: Sequence[bool], fed: bool, turn: Turn) -> None:
    """An answer was generated; `fed`: whether its last token was, too."""
    count = len(ids) - (not fed)
    new = self._tokens(list(ids[:count]), self._next_position(), True, '', [-p for p in log_probs[:count]])
    flags = [list(kept[:count]) if stage.gated else [True] * count for stage in turn.cache.stages]
    self.memory.add(new, flags)

  def left(self, running: Running) -> int:
    """Text tokens of later turns that the cache has room for as it is."""
    return min(int(s.later_room[0]) for s in running.turn.cache.stages)

  def room(self, running: Running) -> int:
    """Text tokens that the cache has room for besides what is fixed and what will be generated, if all others leave."""
    sizes = []
    for stage, slots in zip(running.turn.cache.stages, self.memory.slots):
      fixed = sum(self.memory.tokens[i].turn == FIXED for i in slots)
      sizes.append(stage.given_room - fixed)
    return min(sizes)

  def make_room(self, running: Running, budget: int, only: int | None = None, summary: str = '') -> Running:
    """Leaves at most `budget` text tokens of earlier turns in the cache, by importance; or exchange `only` alone."""
    memory, before = self.memory, self.memory.held
    if only is None:
      stays = choose(memory, min(budget, before), IMPORTANCE[self.history.importance])
    else:
      stays = {i for i, t in enumerate(memory.tokens) if t.turn == only}
    gone: dict[tuple[int, bool, int], list[int]] = {}
    for i, t in enumerate(memory.tokens):
      if t.turn != FIXED and t.sentence != FRAME and i not in stays:
        gone.setdefault((t.turn, t.answer, t.sentence), []).append(t.id)
    left_out = tuple(self._tokenizer.decode(ids).strip() for ids in gone.values())
    running = self._reduced(running, stays)
    if left_out:
      self.compactions.append(Compaction(self._exchange + 1, self.history.mode, before, self.memory.held, left_out, summary))
    return running

  @property
  def exchange(self) -> int:
    """Number of the exchange that was added last."""
    return self._exchange

  def _reduced(self, running: Running, stays: set[int]) -> Running:
    cache, stages = running.turn.cache, self._stepper.generator.model.stages
    again = self.history.recompute or bool(why_not(cache)) or judges_instructions(stages)
    where, moved, position = self.memory.compact(stays, REROTATE if again else self.history.positions)
    if again:
      return self._run_again(running)
    pad = lambda row, stage: jnp.asarray([row + [0] * (stage.slots - len(row))], jnp.int32)
    survivors = Survivors(
      slots=tuple(map(pad, where, cache.stages)),
      length=tuple(jnp.asarray([len(row)], jnp.int32) for row in where),
      moved=tuple(map(pad, moved, cache.stages)),
      position=jnp.asarray([position], jnp.int32),
    )
    return self._stepper.compact(running, survivors)

  def _run_again(self, running: Running) -> Running:
    """What stays, as a prompt."""
    ids = [max(t.id, 0) for t in self.memory.tokens]
    prompt = self._rows.prompt
    tokens = np.full_like(prompt.tokens, self._tokenizer.pad_id)
    size = len(ids)
    if size > tokens.shape[1]:
      tokens = np.full((1, -(-size // 64) * 64 + self._image), self._tokenizer.pad_id, np.int32)
    tokens[0, :size] = ids
    full = lambda value: np.full(1, value, np.int32)
    again = dataclasses.replace(prompt, tokens=tokens, length=full(size), instruct_start=full(size))
    turn, _ = self._stepper.generator.start(again, self._rows.pixels)
    held, self.memory.tokens = self.memory.tokens, []
    self._note_prompt(held, turn)
    return dataclasses.replace(running, turn=turn)

  def _note_prompt(self, tokens: list[Token], turn: Turn) -> None:
    """All tokens of a prompt; of an image each stage holds as many as its length leaves over, and which of them does not matter."""
    text = len(tokens) - self._image
    self.memory.slots = [[] for _ in turn.cache.stages]
    flags = []
    for stage in turn.cache.stages:
      held = max(0, int(stage.length[0]) - text)
      flags.append([not self._start <= i < self._start + self._image or i < self._start + held for i in range(len(tokens))])
    self.memory.add(tokens, flags)

  def _add(self, tokens: list[Token]) -> None:
    self.memory.add(tokens, [[True] * len(tokens)] * len(self.memory.slots))

  def _next_position(self) -> int:
    return self.memory.tokens[-1].position + 1

  def _written(self, ids: Sequence[int], text: str) -> int:
    """How many of the first tokens write a text of the template; 0 if none do."""
    sizes = (n for n in range(1, len(ids) + 1) if self._tokenizer.decode(ids[:n]).strip() == text.strip())
    return next(sizes, 0) if text.strip() else 0

  def _closed(self, ids: Sequence[int]) -> int:
    """How many of the last tokens write what stands between a question and its answer."""
    sizes = (n for n in range(1, len(ids) + 1) if self._tokenizer.decode(ids[-n:]).strip() == self._style.close.strip())
    return next(sizes, 0)

  def _tokens(self, ids, position, answer, before, surprise=None) -> list[Token]:
    """Tokens of one side of the present exchange; those that write `before`, and what follows a question, only say who speaks."""
    leading, trailing = self._written(ids, before), 0 if answer else self._closed(ids)
    numbers = [FRAME] * leading + sentences([self._tokenizer.decode([i]) for i in ids[leading : len(ids) - trailing]])
    numbers += [FRAME] * (len(ids) - len(numbers))
    surprise = surprise or [float('nan')] * len(ids)
    return [Token(i, self._exchange, s, answer, position + n, v) for n, (i, s, v) in enumerate(zip(ids, numbers, surprise))]
