"""An engine with a fixed number of slots: requests join and leave a running batch, and nothing is compiled for it again.

Prompts wait in line (`waiting`), are run some at a time, 1, 4, 16, ... of one text bucket, and take free slots; one program decodes
all slots, some tokens per dispatch. A reply is that of `Generator` to the same prompt alone: rows do not see each other, and a row
does not see what is behind its length. With a ladder (`pools`) who begins is answered as sparsely as the load asks for.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dynllava_jax import arguments
from dynllava_jax.controller.ladder import Decision, Need
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.tokenizer import Tokenizer
from dynllava_jax.generate import Generator
from dynllava_jax.serving import request as req
from dynllava_jax.serving.pools import Pool, Pools
from dynllava_jax.serving.request import Options, Request
from dynllava_jax.serving.stepping import wishes
from dynllava_jax.serving.ticket import Ticket
from dynllava_jax.serving.waiting import Waiting

IDLE = 0.2  # seconds that a thread waits for another one's round before it looks again


class Engine:
  """Slots of one `Generator`. Any thread may submit, cancel and wait; whoever waits runs the engine."""

  def __init__(
    self,
    generator: Generator | Pools,
    tokenizer: Tokenizer,
    *,
    text_length: int,
    slots: int = 8,
    steps: int = 8,
    prefill_rows: int = 16,
    limit: int = 4096,
  ):
    """Compiles nothing yet.

    Args:
      generator: the model and how it is run, or `Pools.on` a ladder; their `sampling` is not used.
      tokenizer: of the model.
      text_length: the largest text bucket; the slots have room for it.
      slots: requests that are answered at once; pools have numbers of their own.
      steps: tokens per dispatch; more make the host's part smaller, and waits for a free slot longer.
      prefill_rows: most prompts that are run at once.
      limit: most requests that may wait.

    Raises:
      ValueError: a size that is none.
    """
    sizes = dict(text_length=text_length, steps=steps, prefill_rows=prefill_rows, limit=limit)
    for name, value in sizes.items():
      arguments.integer(name, value, 1, arguments.MOST_TOKENS)
    self.tokenizer = tokenizer
    self.text_length, self.steps, self.prefill_rows = text_length, steps, prefill_rows
    self.pools = generator if isinstance(generator, Pools) else Pools([Pool(generator, slots)])
    self._waiting: Waiting[Ticket] = Waiting(limit)
    self._empty()
    self._line = threading.Lock()  # around what waits
    self._turn = threading.Lock()  # held by who runs a round

  @property
  def generator(self) -> Generator:
    """That of the pool in use."""
    return self.pools.present.generator

  @property
  def slots(self) -> int:
    """Of the pool in use."""
    return self.pools.present.slots

  def submit(self, request: Request) -> Ticket:
    """Puts a request in line.

    Raises:
      FullError: as many are waiting as may.
      DataError: its prompt is longer than `text_length`.
    """
    text = request.rows.prompt.tokens.shape[1] - self.generator.model.num_image
    if text > self.text_length:
      raise DataError(f'{request.name}: a text bucket of {text}, and the slots have room for {self.text_length}', 'too_long')
    ticket = Ticket(request, self.tokenizer)
    with self._line:
      self._waiting.put(request.client, ticket)
    return ticket

  def cancel(self, ticket: Ticket) -> None:
    """Ends a request at the next round; what there is of its reply stays."""
    ticket.wanted = ticket.wanted or req.CANCELLED

  def run(self, tickets: Sequence[Ticket]) -> None:
    """Returns when all of these are over."""
    while not all(t.finish for t in tickets):
      self._round()

  def stream(self, ticket: Ticket) -> Iterator[str]:
    """The text of a reply as it comes, in pieces. A reader that stops listening cancels it."""
    try:
      while not ticket.finish:
        self._round()
        if not ticket.finish and (piece := ticket.output.piece()):
          yield piece
      ticket.reply()  # raises what went wrong
      if piece := ticket.output.piece(last=True):
        yield piece
    finally:
      self.cancel(ticket)

  def compilations(self) -> int:
    """Programs compiled so far."""
    return sum(pool.stepper.compilations() for pool in self.pools.pools)

  def warm(self, requests: Sequence[Request]) -> None:
    """Compiles all programs, of all rungs, that prompts as long as these can need, before anybody asks. Nobody may be asking yet.

    `requests`: one for each text bucket.
    """
    ladder, self.pools.ladder = self.pools.ladder, None
    try:
      for index in range(len(self.pools.pools)):
        self.pools.change(index)
        self._empty()
        for request in requests:
          size = 1
          while size <= min(self.slots, self.prefill_rows):
            alone = dataclasses.replace(request, options=Options(max_tokens=2))
            self.run([self.submit(alone) for _ in range(size)])
            size *= 4
      self.pools.change(0)
      self._empty()
    finally:
      self.pools.ladder = ladder

  def step(self) -> bool:
    """One round: who is over leaves, who waits joins, all slots get some tokens. Whether there was anything to do."""
    with self._turn:
      self._leave()
      self._join()
      if not any(self._tickets):
        return False
      halted, self._halted = self._halted, np.zeros(self.slots, bool)
      pool, begun = self.pools.present, time.monotonic()
      pool.running, out = pool.stepper.advance(pool.running, halted, self.steps)
      out = jax.device_get(out)
      self.pools.took((time.monotonic() - begun) / max(1, int(out.count.max())))
      self._hand_out(out)
      return True

  def _round(self) -> None:
    """A round, or a wait for the one that another thread is at."""
    if self._turn.acquire(timeout=IDLE):
      self._turn.release()
      self.step()

  def _empty(self) -> None:
    """Slots without anybody in them, for the pool in use."""
    self._tickets: list[Ticket | None] = [None] * self.slots
    self._halted = np.zeros(self.slots, bool)

  def _over(self, ticket: Ticket, finish: str) -> None:
    ticket.ended = time.monotonic()
    ticket.finish = finish

  def _leave(self) -> None:
    """Ends what was cancelled or is late."""
    with self._line:
      gone = [t for t in self._waiting if t.wanted or t.late]
      self._waiting.remove(gone)
    for ticket in gone:
      self._over(ticket, ticket.wanted or req.TIMED_OUT)
    for slot, ticket in enumerate(self._tickets):
      if ticket is not None and (ticket.wanted or ticket.late):
        self._free(slot, ticket.wanted or req.TIMED_OUT)

  def _free(self, slot: int, finish: str) -> None:
    ticket, self._tickets[slot] = self._tickets[slot], None
    self._halted[slot] = True
    self._over(ticket, finish)

  def _join(self) -> None:
    """Runs the prompts of who is next, as long as there are free slots."""
    while (decision := self._rung()) is not None and (group := self._next_group()):
      pool = self.pools.present
      free = [slot for slot, ticket in enumerate(self._tickets) if ticket is None][: len(group)]
      rows = jax.tree.map(lambda *xs: np.concatenate(xs), *(t.request.rows for t in group))
      if pool.running is None:
        pool.running = pool.stepper.empty(*self._largest(group[0]), pool.slots)
      for ticket in group:
        ticket.begun, ticket.rung = time.monotonic(), pool.rung
        if self.pools.ladder is not None:
          self.pools.ladder.record(dataclasses.replace(decision, request=ticket.request.name))
      turn, (*_, kept_image) = pool.generator.start(rows.prompt, rows.pixels)
      room = [pool.generator.max_new_tokens] * len(group)
      wanted = wishes([t.request.options for t in group], room)
      pool.running = pool.stepper.join(pool.running, turn, rows.prompt, wanted, np.asarray(free, np.int32))
      for row, (slot, ticket) in enumerate(zip(free, group)):
        self._tickets[slot] = ticket
        self._halted[slot] = False
        ticket.judged_later = pool.generator.judged_later
        if rows.prompt.image_start[row] >= 0:
          ticket.kept_image = lambda kept=kept_image, row=row: np.asarray(kept)[row]

  def _rung(self) -> Decision | bool | None:
    """Lets the ladder say how who is next is answered; None if nobody can begin yet. True without a ladder.

    Another rung than the one in use waits for the last one on it.
    """
    if self.pools.ladder is None:
      return True
    with self._line:
      line = list(self._waiting.in_turn())
    if not line or None not in self._tickets:
      return None
    waiting = collections.Counter(self._need(t) for t in line[1:])
    held = self.slots - self._tickets.count(None)
    decision = self.pools.choose(line[0].request.name, self._need(line[0]), held, waiting)
    if self.pools.pools[decision.index] is not self.pools.present:
      if held:
        return None
      self.pools.change(decision.index)
      self._empty()
    return decision

  def _need(self, ticket: Ticket) -> Need:
    most = self.generator.max_new_tokens
    text = ticket.request.rows.prompt.tokens.shape[1] - self.generator.model.num_image
    return Need(text, min(ticket.request.options.max_tokens or most, most))

  def _next_group(self) -> list[Ticket]:
    """Requests next in line that share a text bucket: 1, 4, 16, ... of them, as many as there is room for."""
    most = min(self._tickets.count(None), self.prefill_rows)
    shapes = lambda ticket: jax.tree.map(np.shape, ticket.request.rows.prompt)
    with self._line:
      group: list[Ticket] = []
      for ticket in self._waiting.in_turn():
        if len(group) == most or (group and shapes(ticket) != shapes(group[0])):
          break
        group.append(ticket)
      size = 1 << (len(group).bit_length() - 1) // 2 * 2 if group else 0
      return [self._waiting.take() for _ in range(size)]

  def _largest(self, ticket: Ticket) -> tuple[Any, np.ndarray]:
    """A prompt of the largest bucket and its picture, of which only the shapes count."""
    prompt = ticket.request.rows.prompt
    tokens = np.zeros((1, self.text_length + self.generator.model.num_image), np.int32)
    return dataclasses.replace(prompt, tokens=tokens), ticket.request.rows.pixels

  def _hand_out(self, out: Any) -> None:
    """Gives every request its tokens, and ends those that are over."""
    now = time.monotonic()
    for slot, ticket in enumerate(self._tickets):
      if ticket is None:
        continue
      if not out.finite[slot]:
        name = ticket.request.name
        ticket.error = FloatingPointError(f'{name}: the logits are not finite; look at the weights, or compute in float32')
        self._free(slot, req.CANCELLED)
        continue
      ticket.first = ticket.first or now
      stopped = False
      for i in range(out.count[slot]):
        ticket.log_probs.append(float(out.log_prob[slot, i]))
        ticket.kept.append(bool(out.kept[slot, i]))
        ticket.evicted = int(out.evicted[slot, i])
        if stopped := ticket.output.push(int(out.tokens[slot, i])):
          break
      if stopped or not out.active[slot]:
        ended = ticket.output.tokens[-1] == self.generator.eos_id
        self._free(slot, req.END if ended else req.STOP if stopped else req.LENGTH)
