"""Which rung a request gets: a few stage lists over one set of weights, chosen by what is there while the model serves.

The first rung is dense. With nothing held and nobody waiting a request gets it, whatever was before. Otherwise the least sparse
rung at which all that wait fit into the room for keys and values; a queue, a slow step or a full memory ask for a sparser one
still. Down is taken at once, up only when a less sparse rung would do with a margin, for a while (`Rules`). A conversation begun on
a rung can only go down, when a turn begins: what a cache has dropped cannot come back.

Pure logic: it computes nothing on arrays and reads no clock but the one that it is given.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from dynllava_jax.config import ConfigError, Stage
from dynllava_jax.controller.rules import Rules
from dynllava_jax.display import printable

REMEMBERED = 10_000  # decisions
MIB = 2**20
DEFAULTS = Rules()


@dataclasses.dataclass(frozen=True)
class Need:
  """What a request asks room for: text tokens of its prompt's bucket, and the most tokens of its own answer."""

  text: int
  new: int


@dataclasses.dataclass(frozen=True)
class Rung:
  """One way to run the weights.

  Attributes:
    name: of the rung; stages: its stage list.
    bytes: of keys and values that a request takes up.
  """

  name: str
  stages: tuple[Stage, ...]
  bytes: Callable[[Need], int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """What is there when a request is to begin, itself not counted.

  Attributes:
    room: bytes for keys and values; held: of them, by requests that are being answered.
    waiting: how many wait, by what they need.
    step_seconds: of a decoding step lately; None if not known.
    memory: share of the device's memory in use, or of the machine's; None if not known.
  """

  room: int
  held: int = 0
  waiting: Mapping[Need, int] = dataclasses.field(default_factory=dict)
  step_seconds: float | None = None
  memory: float | None = None


@dataclasses.dataclass(frozen=True)
class Decision:
  """For `request`, at `at` seconds: the rung with this number `index` instead of number `before`, and why."""

  at: float
  request: str
  index: int
  rung: str
  before: int
  why: str

  @property
  def line(self) -> str:
    """All of it, for people."""
    way = {-1: 'up to ', 0: '', 1: 'down to '}[(self.index > self.before) - (self.index < self.before)]
    return printable(f'{self.at:.3f} s  {self.request}: {way}{self.rung}: {self.why}')


class Ladder:
  """Rungs, and which of them is in use. For any number of threads."""

  def __init__(self, rungs: Sequence[Rung], rules: Rules = DEFAULTS, clock: Callable[[], float] = time.monotonic):
    """`rungs`: from dense to sparsest; ConfigError unless there are some, each with its own name, none larger than the last."""
    names = [r.name for r in rungs]
    if not rungs or len(set(names)) < len(names):
      raise ConfigError(f'ladder: rungs {names}, expected one or more, each with a name of its own')
    probe = Need(64, 64)
    sizes = [r.bytes(probe) for r in rungs]
    for i in range(1, len(rungs)):
      if sizes[i] > sizes[i - 1]:
        raise ConfigError(
          f'ladder: {names[i]} takes {sizes[i]} bytes and stands behind {names[i - 1]} with {sizes[i - 1]}; swap them'
        )
    self.rungs, self.rules, self._clock = tuple(rungs), rules, clock
    self.decisions: collections.deque[Decision] = collections.deque(maxlen=REMEMBERED)
    self.counts = collections.Counter[str]()  # of requests, by rung
    self._present = 0
    self._calm_since: float | None = None
    self._calm_at = 0  # the sparsest rung that would have done since then
    self._lock = threading.Lock()

  @property
  def present(self) -> int:
    """Number of the rung in use."""
    return self._present

  def choose(self, request: str, need: Need, load: Load, begun_on: int = 0) -> Decision:
    """The rung for a request, not recorded yet: it may be asked for again before it begins.

    Args:
      request: what messages call it.
      need: what it asks room for; load: what is there besides.
      begun_on: of a conversation, the rung of its turns so far.
    """
    with self._lock:
      at, before = self._clock(), self._present
      self._present, why = self._next(at, need, load)
      index = self._present
      if index < begun_on:
        index, why = begun_on, f'the conversation has dropped what {self.rungs[index].name} would keep ({why})'
      return Decision(at, request, index, self.rungs[index].name, before, why)

  def record(self, decision: Decision) -> None:
    """Keeps a decision that was acted on."""
    with self._lock:
      self.decisions.append(decision)
      self.counts[decision.rung] += 1

  def _next(self, at: float, need: Need, load: Load) -> tuple[int, str]:
    """The rung to use from now on, and why."""
    wanted, why = self._wanted(need, load, relaxed=False)
    if wanted == 0 and not load.held and not sum(load.waiting.values()):
      self._calm_since = None
      return 0, 'nothing is held and nobody waits'
    if wanted >= self._present:
      self._calm_since = None
      return wanted, why
    easy, close = self._wanted(need, load, relaxed=True)
    if easy >= self._present:
      self._calm_since = None
      return self._present, f'{self.rungs[wanted].name} would do, but without a margin: {close}'
    self._calm_since, self._calm_at = (at, easy) if self._calm_since is None else (self._calm_since, max(easy, self._calm_at))
    calm = at - self._calm_since
    if calm < self.rules.calm_seconds:
      return self._present, f'{self.rungs[easy].name} would do, for {calm:.1f} s of the {self.rules.calm_seconds:g} s it must'
    self._calm_since = None
    return self._calm_at, f'{close}, and has for {calm:.1f} s'

  def _wanted(self, need: Need, load: Load, relaxed: bool) -> tuple[int, str]:
    """The sparsest of what room, queue, step time and memory each ask for; `relaxed`: with the margins for going back up."""
    return max(
      (ask(need, load, relaxed) for ask in (self._by_room, self._by_queue, self._by_step, self._by_memory)), key=lambda a: a[0]
    )

  def _by_room(self, need: Need, load: Load, relaxed: bool) -> tuple[int, str]:
    factor = self.rules.margin if relaxed else 1.0
    demands: list[float] = []
    for rung in self.rungs:
      demands.append(factor * (rung.bytes(need) + sum(n * rung.bytes(other) for other, n in load.waiting.items())))
      if load.held + demands[-1] <= load.room:
        break
    i = len(demands) - 1
    waiting, free = 1 + sum(load.waiting.values()), max(0, load.room - load.held)
    asked = f'{waiting} to begin need {demands[0] / MIB:.2f} MiB {self.rungs[0].name}'
    if i:
      asked += f', {demands[-1] / MIB:.2f} MiB {self.rungs[i].name}'
    return i, f'{asked}; {free / MIB:.2f} of {load.room / MIB:.2f} MiB are free'

  def _by_queue(self, need: Need, load: Load, relaxed: bool) -> tuple[int, str]:
    waiting = sum(load.waiting.values())
    seen = waiting * (self.rules.margin if relaxed else 1)
    return self._marked(seen, self.rules.queue_high, self.rules.queue_full), f'{waiting} wait behind it'

  def _by_step(self, need: Need, load: Load, relaxed: bool) -> tuple[int, str]:
    limit, seconds = self.rules.step_seconds, load.step_seconds
    if not limit or seconds is None:
      return 0, ''
    why = f'a step takes {1e3 * seconds:.1f} ms, the limit is {1e3 * limit:.1f} ms'
    if seconds > limit:
      return min(self._present + 1, len(self.rungs) - 1), why
    return (self._present if seconds * self.rules.margin > limit else 0), why

  def _by_memory(self, need: Need, load: Load, relaxed: bool) -> tuple[int, str]:
    if load.memory is None:
      return 0, ''
    seen = load.memory + (self.rules.memory_margin if relaxed else 0)
    return self._marked(seen, self.rules.memory_high, self.rules.memory_full), f'{load.memory:.0%} of the memory is in use'

  def _marked(self, seen: float, high: float, full: float) -> int:
    """Rung for a signal with two marks, those between in equal steps."""
    last = len(self.rungs) - 1
    if seen < high or not last:
      return 0
    return last if seen >= full else 1 + int((last - 1) * (seen - high) / (full - high))
