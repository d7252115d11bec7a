"""A thread that runs engines, and tells those who wait for answers, on event loops of their own, what came."""

import asyncio
import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from dynllava_jax.serving.engine import Engine
from dynllava_jax.serving.request import Reply, Request
from dynllava_jax.serving.ticket import Ticket

LATELY = 10.0  # seconds over which speed is measured


class StoppingError(RuntimeError):
  """The server takes no more requests, or has given up this one."""


@dataclasses.dataclass(frozen=True)
class News:
  """What came since the last time: tokens with log-probabilities, a piece of text, and at the end the reply or what went wrong."""

  tokens: Sequence[int] = ()
  log_probs: Sequence[float] = ()
  piece: str = ''
  reply: Reply | None = None
  error: BaseException | None = None


class Job:
  """A request on its way. `news` has what came; `streamed`: whether anybody wants it before the end."""

  def __init__(self, engine: Engine, ticket: Ticket, streamed: bool, loop: asyncio.AbstractEventLoop):
    self.engine, self.ticket, self.streamed, self.loop = engine, ticket, streamed, loop
    self.news: asyncio.Queue[News] = asyncio.Queue()
    self.counted = 0  # tokens that the speed knows of
    self._told = 0

  def look(self) -> News | None:
    """What is new of the ticket; None if nobody needs to know."""
    ticket = self.ticket
    if ticket.finish:
      try:
        reply = ticket.reply()
      except Exception as e:
        return News(error=e)
      begun, self._told = self._told, len(reply.tokens)
      piece = ticket.output.piece(last=True) if self.streamed else ''
      return News(reply.tokens[begun:], reply.log_probs[begun:], piece, reply)
    count = len(ticket.output.tokens)
    if not self.streamed or count == self._told:
      return None
    begun, self._told = self._told, count
    return News(ticket.output.tokens[begun:count], ticket.log_probs[begun:count], ticket.output.piece())


class Driver:
  """Engines on one group of devices, by name, and the thread that runs them in turn.

  Attributes:
    engines: by name.
    failed: what ended the thread, if something did; nobody waits any more then.
  """

  def __init__(self, engines: Mapping[str, Engine], over: Callable[[str, Ticket], None] = lambda name, ticket: None):
    """`over` is told, on the thread, of every request that is over."""
    self.engines = dict(engines)
    self.failed: BaseException | None = None
    self._over = over
    self._jobs: dict[str, list[Job]] = {name: [] for name in engines}
    self._speed: collections.deque[tuple[float, int]] = collections.deque()
    self._stop, self._deadline = False, None
    self._condition = threading.Condition()
    self._thread = threading.Thread(target=self._run, name='engines', daemon=True)

  def start(self) -> None:
    """Begins to answer."""
    self._thread.start()

  def submit(self, name: str, request: Request, streamed: bool) -> Job:
    """Puts a request in line; from an event loop. FullError or DataError as `Engine.submit`, StoppingError at the end."""
    engine = self.engines[name]
    with self._condition:
      if self.failed is not None or self._stop or self._deadline is not None:
        raise StoppingError('the server is stopping; try again later, or another one')
      job = Job(engine, engine.submit(request), streamed, asyncio.get_running_loop())
      self._jobs[name].append(job)
      self._condition.notify()
    return job

  def drain(self, seconds: float) -> None:
    """Takes no more requests; those that are there have so long to be over. May be called in a signal handler."""
    self._deadline = time.monotonic() + seconds

  def stop(self) -> None:
    """Ends the thread; who is still there is told."""
    with self._condition:
      self._stop = True
      self._condition.notify()
    if self._thread.is_alive():
      self._thread.join()

  @property
  def state(self) -> str:
    """'ready', 'stopping' or 'failed'."""
    return 'failed' if self.failed is not None else 'stopping' if self._stop or self._deadline is not None else 'ready'

  def tickets(self, name: str) -> list[Ticket]:
    """Who is there, waiting or in a slot."""
    return [job.ticket for job in tuple(self._jobs[name])]

  def count(self) -> int:
    """How many are there."""
    return sum(map(len, self._jobs.values()))

  def tokens_per_second(self) -> float:
    """Of all answers, lately."""
    now = time.monotonic()
    return sum(n for at, n in tuple(self._speed) if now - at <= LATELY) / LATELY

  def _run(self) -> None:
    try:
      while not self._stop:
        if not self._round():
          with self._condition:
            if not self._stop and not self.count():
              self._condition.wait()
    except BaseException as e:  # a fault that nobody foresaw: whoever waits is told, and the server ends
      self.failed = e
    finally:
      with self._condition:
        self._stop = True
        left = [job for jobs in self._jobs.values() for job in jobs]
        self._jobs = {name: [] for name in self.engines}
      why = self.failed or StoppingError('the server stopped before the answer was finished; ask again')
      self._tell([(job, News(error=why)) for job in left])

  def _round(self) -> bool:
    """Some tokens for everybody; whether anybody was there."""
    busy = False
    for name, engine in self.engines.items():
      if not self._jobs[name]:
        continue
      busy = True
      if self._deadline is not None and time.monotonic() > self._deadline:
        self._stop = True
        return True
      engine.step()
      self._look(name)
    return busy

  def _look(self, name: str) -> None:
    now, came, news = time.monotonic(), 0, []
    for job in tuple(self._jobs[name]):
      count = len(job.ticket.output.tokens)
      came, job.counted = came + count - job.counted, count
      if (found := job.look()) is not None:
        news.append((job, found))
    gone = [job for job, found in news if found.reply is not None or found.error is not None]
    if gone:
      with self._condition:
        over = set(map(id, gone))
        self._jobs[name] = [job for job in self._jobs[name] if id(job) not in over]
      for job in gone:
        self._over(name, job.ticket)
    self._speed.append((now, came))
    while now - self._speed[0][0] > LATELY:
      self._speed.popleft()
    self._tell(news)

  @staticmethod
  def _tell(news: Sequence[tuple[Job, News]]) -> None:
    """Wakes each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, News]]] = collections.defaultdict(list)
    for job, found in news:
      by_loop[job.loop].append((job, found))

    def put(pairs):
      for job, found in pairs:
        job.news.put_nowait(found)

    for loop, pairs in by_loop.items():
      with contextlib.suppress(RuntimeError):  # a loop that is closed: nobody is there
        loop.call_soon_threadsafe(put, pairs)
