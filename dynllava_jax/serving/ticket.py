"""A request on its way through the engine: what came of it so far, and when."""

import time
from collections.abc import Callable

import numpy as np

from dynllava_jax.data.tokenizer import Tokenizer
from dynllava_jax.serving.request import Reply, Request, Timings
from dynllava_jax.serving.stepping import of_tokens
from dynllava_jax.serving.text import Text


class Ticket:
  """A request, in line, in a slot, or over. `rung`: that a ladder chose, '' without one."""

  def __init__(self, request: Request, tokenizer: Tokenizer):
    self.request = request
    self.output = Text(tokenizer, request.options.stop)
    self.finish = ''  # why it is over; '' while it is not
    self.error: Exception | None = None
    self.asked = time.monotonic()
    self.begun = self.first = self.ended = 0.0
    self.kept_image: Callable[[], np.ndarray] = lambda: np.zeros(0, np.int32)
    self.log_probs: list[float] = []
    self.kept: list[bool] = []
    self.judged_later = 0  # as `Generator` has it
    self.evicted = 0
    self.rung = ''
    self.wanted: str = ''  # why somebody wants it to be over

  @property
  def late(self) -> bool:
    """Whether its time is over."""
    timeout = self.request.options.timeout
    return timeout is not None and time.monotonic() - self.asked > timeout

  def reply(self) -> Reply:
    """The reply so far; raises what went wrong."""
    if self.error is not None:
      raise self.error
    now = self.ended or time.monotonic()
    timings = Timings((self.begun or now) - self.asked, (self.first or now) - self.asked, now - self.asked)
    kept_image = tuple(self.kept_image().tolist())
    return Reply(
      self.output.text,
      tuple(self.output.tokens),
      tuple(self.log_probs),
      kept_image,
      tuple(of_tokens(self.kept, self.judged_later)[:-1]),
      self.evicted,
      self.finish,
      timings,
      self.rung,
    )
