"""A server in this process whose engine has no model: what it answers is a function of the question's length, at a pace."""

import asyncio
import base64
import contextlib
import io
import threading
import time
import types

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

for library in ('uvicorn', 'fastapi'):
  pytest.importorskip(library, reason='requirements-serve.txt is not installed')
import uvicorn  # noqa: E402

from dynllava_jax.server import offers, running  # noqa: E402
from dynllava_jax.server.app import Limits, Server  # noqa: E402
from dynllava_jax.server.driver import Driver  # noqa: E402
from dynllava_jax.server.metrics import Metrics  # noqa: E402
from dynllava_jax.serving import request as req  # noqa: E402
from dynllava_jax.serving.ticket import Ticket  # noqa: E402
from dynllava_jax.serving.waiting import FullError  # noqa: E402

SIZES = offers.Sizes(slots=2, steps=4, max_new_tokens=12, text_lengths=(32, 64), queue=4)
KEY = 'a-key'
ANSWER = 9  # tokens
KEPT = [3, 10, 11]  # patches


def png(width=98, height=98):
  content = io.BytesIO()
  Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(content, 'PNG')
  return content.getvalue()


def data_url(content):
  return 'data:image/png;base64,' + base64.b64encode(content).decode()


class Paced:
  """An engine without model. `pace`: seconds per token; `broken`: what a round raises."""

  prefill_rows = 1

  def __init__(self, loaded):
    model = types.SimpleNamespace(cfg=loaded.model, stages=loaded.stages, num_image=loaded.num_image)
    self.generator, self.pools = types.SimpleNamespace(model=model), types.SimpleNamespace(present=types.SimpleNamespace(rung=''))
    self.tokenizer = loaded.tokenizer
    self.slots, self.pace, self.broken = SIZES.slots, 0.0, None
    self.tickets, self.cancelled = [], []

  def submit(self, request):
    if len(self.tickets) >= SIZES.queue:
      raise FullError('4 requests are waiting, which is the limit; try again later')
    self.tickets.append(Ticket(request, self.tokenizer))
    return self.tickets[-1]

  def cancel(self, ticket):
    if not ticket.finish and not ticket.wanted:
      ticket.wanted = req.CANCELLED
      self.cancelled.append(ticket)

  def step(self):
    if self.broken is not None:
      raise self.broken
    time.sleep(self.pace)
    for ticket in self.tickets[: self.slots]:
      ticket.begun = ticket.begun or time.monotonic()
      ticket.first = ticket.first or time.monotonic()
      ticket.kept_image = lambda: np.asarray(KEPT)
      most = min(ticket.request.options.max_tokens or ANSWER, ANSWER)
      token = 260 + (int(ticket.request.rows.prompt.length[0]) + len(ticket.output.tokens)) % 100
      ticket.log_probs.append(-0.5)
      ticket.kept.append(len(ticket.output.tokens) % 2 == 0)
      stopped = ticket.output.push(token)
      ended = req.STOP if stopped else req.LENGTH if len(ticket.output.tokens) == most else ''
      if finish := ticket.wanted or ended or (req.TIMED_OUT if ticket.late else ''):
        ticket.ended, ticket.finish = time.monotonic(), finish
    self.tickets = [t for t in self.tickets if not t.finish]

  def compilations(self):
    return 0


class Served:
  """A running server. `url`: where; `engine`: of the model 'digits'."""

  def __init__(self, keys=(), timeout=30.0, drain=5.0, also=('dense',)):
    made = offers.offers(str(ROOT / 'examples/digits'), 'digits', None, also)
    metrics = Metrics(made, SIZES)
    engines = {name: Paced(offer.loaded) for name, offer in made.items()}
    self.engine = engines['digits']
    self.driver = Driver(engines, metrics.over)
    metrics.watch([self.driver])
    limits = Limits(keys, 2**20, 10**6, timeout, receive=2.0)
    self.server = Server(made, [self.driver], SIZES, limits, metrics)
    config = uvicorn.Config(self.server.app, port=0, log_config=None, lifespan='off', timeout_graceful_shutdown=8)
    listening = threading.Event()

    def ready(address):
      self.port = address[1]
      listening.set()

    self.http = running.Http(config, [self.driver], drain, ready)
    self.driver.start()
    self.thread = threading.Thread(target=lambda: asyncio.run(self.http.serve()))
    self.thread.start()
    assert listening.wait(10)
    self.url = f'http://127.0.0.1:{self.port}'

  def terminate(self):
    """As SIGTERM."""
    self.http.handle_exit(15, None)

  def close(self):
    self.http.should_exit = True
    self.thread.join(20)
    self.driver.stop()


@contextlib.contextmanager
def serving(**options):
  served = Served(**options)
  try:
    yield served
  finally:
    served.close()
