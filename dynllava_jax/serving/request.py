"""What is asked and what comes back: one question with its options, and the reply to it."""

import dataclasses
import math

from dynllava_jax import arguments
from dynllava_jax.evals.layout import Rows
from dynllava_jax.sampling import Sampling

END, LENGTH, STOP, CANCELLED, TIMED_OUT = 'end', 'length', 'stop', 'cancelled', 'timed out'  # why a reply is over


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How one question is answered.

  Attributes:
    max_tokens: most tokens of the answer; None for as many as there is room for.
    temperature, top_k, top_p: as in `Sampling`; greedy by default.
    repetition_penalty: tokens that prompt or answer hold already become less likely by this factor; 1.0: off.
    seed: of what is drawn by chance; a reply is a function of question, options and seed, whatever else is answered with it.
    stop: strings that end the answer, which is cut in front of them.
    timeout: seconds after which the answer is given up; None waits for ever.
  """

  max_tokens: int | None = None
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  repetition_penalty: float = 1.0
  seed: int = 0
  stop: tuple[str, ...] = ()
  timeout: float | None = None

  def __post_init__(self):
    Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
    arguments.number('repetition_penalty', self.repetition_penalty, 0, math.inf, above=True)
    arguments.integer('seed', self.seed, 0, 2**32 - 1)
    if self.max_tokens is not None:
      arguments.integer('max_tokens', self.max_tokens, 1, arguments.MOST_TOKENS)
    if self.timeout is not None:
      arguments.number('timeout', self.timeout, 0, math.inf, above=True)
    object.__setattr__(self, 'stop', (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
    if not all(isinstance(s, str) and s for s in self.stop):
      raise ValueError(f'stop: {self.stop!r}, expected strings that are not empty')


@dataclasses.dataclass(frozen=True)
class Request:
  """A question laid out for the model.

  Attributes:
    name: what messages call it.
    rows: its prompt and picture, a batch of one.
    options: how it is answered.
    client: who asks; clients take turns.
  """

  name: str
  rows: Rows
  options: Options = Options()
  client: str = ''


@dataclasses.dataclass(frozen=True)
class Timings:
  """Seconds from being asked until the prompt was run, to the first tokens, and to the end."""

  waited: float
  first: float
  total: float


@dataclasses.dataclass(frozen=True)
class Reply:
  """An answer, and what was counted while it was made.

  Attributes:
    text: the answer without special tokens, cut in front of a stop string.
    tokens: ids of all tokens that were generated, the end token included.
    log_probs: natural logarithms of the model's probability of each, before temperature, penalty and filters.
    kept_image: patches of the image tokens that the last stage holds, as in `Generated.kept_image`; empty without image.
    kept: whether the gate kept each token that was fed back, which the last one never is.
    evicted: kept tokens that were given up because a bounded cache was full; of layers that prune their context tokens of any kind,
      added up over the layers.
    finish: 'end', 'length', 'stop', 'cancelled' or 'timed out'.
    timings: seconds.
    rung: that a ladder chose, '' without one.
  """

  text: str
  tokens: tuple[int, ...]
  log_probs: tuple[float, ...]
  kept_image: tuple[int, ...]
  kept: tuple[bool, ...]
  evicted: int
  finish: str
  timings: Timings
  rung: str = ''

  @property
  def kept_generated(self) -> int:
    """Generated tokens whose keys and values the gated stages held at the end."""
    return max(0, sum(self.kept) - self.evicted)
