"""A server from its start to its end: engines made and warmed, HTTP, and on SIGTERM time for the requests that are there."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn

from dynllava_jax.config import ConfigError
from dynllava_jax.server import offers
from dynllava_jax.server.app import Limits, Server
from dynllava_jax.server.driver import Driver
from dynllava_jax.server.metrics import Metrics
from dynllava_jax.server.offers import Offer, Sizes

CLOSING = 5.0  # seconds for answers to be sent once the engines are done


class Http(uvicorn.Server):
  """uvicorn, whose signals also reach the drivers. `seconds`: for the requests that are there."""

  def __init__(self, config: uvicorn.Config, drivers: Sequence[Driver], seconds: float, ready: Callable[[Any], None]):
    super().__init__(config)
    self._drivers, self._seconds, self._ready = drivers, seconds, ready

  def handle_exit(self, sig: int, frame: Any) -> None:
    """SIGTERM and Ctrl-C: drains; a second Ctrl-C ends at once."""
    for driver in self._drivers:
      driver.drain(self._seconds)
    super().handle_exit(sig, frame)

  async def startup(self, sockets: Any = None) -> None:
    """Says where it listens once it does."""
    await super().startup(sockets)
    if self.started:
      self._ready(self.servers[0].sockets[0].getsockname())

  async def on_tick(self, counter: int) -> bool:
    """Ends if a driver has failed."""
    return await super().on_tick(counter) or any(d.failed for d in self._drivers)


def run(
  made: dict[str, Offer],
  *,
  dtype: str,
  tensor: int,
  sizes: Sizes,
  room: int | None,
  limits: Limits,
  host: str,
  port: int,
  drain: float,
  tell: Callable[[str], None],
) -> None:
  """Serves until it is told to end.

  Args:
    made: what is offered; dtype: of the computation; tensor: devices that hold the weights together.
    sizes, limits: of engines and requests; room: see `offers.engines`.
    host, port: where; 0 takes a free port.
    drain: seconds for the requests that are there when it is told to end.
    tell: told of progress.

  Raises:
    ConfigError: it cannot listen there.
    BaseException: what ended an engine.
  """
  metrics = Metrics(made, sizes)
  drivers = [Driver(offers.engines(made, mesh, dtype, sizes, room), metrics.over) for mesh in offers.meshes(tensor)]
  for driver in drivers:
    for name, engine in driver.engines.items():
      tell(f'{name}: compiling for {" or ".join(str(pool.slots) for pool in engine.pools.pools)} slots')
      offers.warm(made[name], engine, sizes)
  metrics.watch(drivers)
  server = Server(made, drivers, sizes, limits, metrics)
  logging.getLogger('uvicorn.error').setLevel(logging.WARNING)
  config = uvicorn.Config(
    server.app,
    host=host,
    port=port,
    log_config=None,
    access_log=False,
    server_header=False,
    timeout_graceful_shutdown=int(drain + CLOSING),
    lifespan='off',
  )
  for driver in drivers:
    driver.start()

  def ready(address):
    shown = f'[{address[0]}]' if ':' in address[0] else address[0]
    tell(f'{", ".join(made)}: http://{shown}:{address[1]}/ for browsers, http://{shown}:{address[1]}/v1 for OpenAI clients')

  http = Http(config, drivers, drain, ready)
  try:
    with contextlib.suppress(KeyboardInterrupt):
      http.run()
  except SystemExit:
    raise ConfigError(f'--host={host} --port={port}: cannot listen there; is another server running?') from None
  finally:
    for driver in drivers:
      driver.stop()
  if failed := next((d.failed for d in drivers if d.failed), None):
    raise failed
