"""The HTTP side of a server: routes, keys, limits; who goes away is forgotten, who cannot be served is told why."""

import asyncio
import contextlib
import functools
import hmac
import importlib.resources
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import anyio.to_thread
import fastapi
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dynllava_jax import methods
from dynllava_jax.data.samples import DataError
from dynllava_jax.server import answers
from dynllava_jax.server.driver import Driver, Job, News, StoppingError
from dynllava_jax.server.metrics import Metrics
from dynllava_jax.server.offers import Offer, Sizes
from dynllava_jax.server.protocol import Body, RefusedError, parse, short
from dynllava_jax.serving import request as req
from dynllava_jax.serving.request import Request
from dynllava_jax.serving.waiting import FullError

READERS = 2  # pictures that are decoded at once
UNSTORED = {'Cache-Control': 'no-store', 'X-Accel-Buffering': 'no'}
# The page loads nothing from elsewhere, and is shown in no frame.
POLICY = (
  "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
  "frame-ancestors 'none'"
)
LATER = {'Retry-After': '1'}
FAULT = 'the server failed; its log says how'


class Limits:
  """What a request may be. `keys`: of the clients, none for anybody; bytes of a body; pixels of a picture; seconds."""

  def __init__(self, keys: Sequence[str], body: int, pixels: int, timeout: float, receive: float = 60.0):
    self.keys, self.body, self.pixels, self.timeout, self.receive = tuple(keys), body, pixels, timeout, receive


class Server:
  """Answers requests by the drivers' engines."""

  def __init__(self, offers: dict[str, Offer], drivers: Sequence[Driver], sizes: Sizes, limits: Limits, metrics: Metrics):
    self.offers, self.drivers, self.sizes, self.limits, self.metrics = offers, drivers, sizes, limits, metrics
    self._started = int(time.time())
    self._readers: anyio.CapacityLimiter | None = None
    self._present = 0  # requests whose bodies are held
    self.app = self._app()

  def _app(self) -> fastapi.FastAPI:
    app = fastapi.FastAPI(title='dynllava_jax', docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route('/v1/chat/completions', self.complete, methods=['POST'], response_model=None)
    routes = {'/': page, '/v1/models': self.models, '/v1/models/{name:path}': self.model, '/health': self.health}
    for path, answer in (routes | {'/metrics': self.numbers}).items():
      app.add_api_route(path, answer, response_model=None)
    for error in (RefusedError, HTTPException, Exception):
      app.add_exception_handler(error, self._refused)
    return app

  async def complete(self, request: fastapi.Request) -> Response:
    """`/v1/chat/completions`."""
    client = self._client(request)
    if self._present >= 2 * self.sizes.queue:
      raise RefusedError(429, f'{self._present} requests are here, which is the limit; try again later', 'rate_limit_error')
    self._present += 1
    try:
      with contextlib.suppress(ConnectionError):
        return await self._complete(request, client)
      return Response(status_code=499)  # nobody reads it
    finally:
      self._present -= 1

  async def _complete(self, request: fastapi.Request, client: str) -> Response:
    body = await self._body(request)
    offer = self._offer(body.model)
    id_ = f'chatcmpl-{secrets.token_hex(12)}'
    job = await self._begin(body, offer, id_, client)
    prompt = job.ticket.request.rows.prompt
    image = offer.loaded.num_image if prompt.image_start[0] >= 0 else 0
    writer = answers.Writer(id_, offer.name, int(prompt.length[0]), image, offer.loaded.tokenizer)
    gone = asyncio.create_task(_gone(request))
    try:
      news = await self._next(job, gone)
    except BaseException:
      gone.cancel()
      raise
    if body.stream:  # whose beginning is awaited, because until then a status can be given
      return StreamingResponse(self._events(body, job, writer, news, gone), media_type='text/event-stream', headers=UNSTORED)
    gone.cancel()
    return JSONResponse(writer.whole(news.reply, bool(body.logprobs), body.details))

  async def _begin(self, body: Body, offer: Offer, id_: str, client: str) -> Job:
    """Puts it in line; RefusedError if that cannot be."""
    options = body.options(self.limits.timeout, self.sizes.max_new_tokens)
    if self._readers is None:
      self._readers = anyio.CapacityLimiter(READERS)

    def rows():
      return offer.rows(body.question(id_, self.limits.pixels), options.seed, self.sizes)

    try:
      laid = await anyio.to_thread.run_sync(rows, limiter=self._readers)
      driver = min(self.drivers, key=Driver.count)
      return driver.submit(offer.name, Request(id_, laid, options, client), body.stream)
    except DataError as e:
      raise RefusedError(400, short(str(e).replace(f'question {id_}: ', '').replace(f'sample {id_}, ', ''))) from None
    except FullError as e:
      raise RefusedError(429, str(e), 'rate_limit_error') from None
    except StoppingError as e:
      raise RefusedError(503, str(e), 'server_error') from None

  async def _next(self, job: Job, gone: asyncio.Task) -> News:
    """What comes next of a job; RefusedError if it went wrong, ConnectionError if the client has gone."""
    news = asyncio.ensure_future(job.news.get())
    try:
      await asyncio.wait({news, gone}, return_when=asyncio.FIRST_COMPLETED)
      if not news.done():
        raise ConnectionError('the client has gone')
      return self._checked(news.result())
    except BaseException:
      news.cancel()
      job.engine.cancel(job.ticket)
      raise

  def _checked(self, news: News) -> News:
    """The same; RefusedError for what is no answer."""
    if isinstance(news.error, StoppingError):
      raise RefusedError(503, str(news.error), 'server_error')
    if isinstance(news.error, FloatingPointError):
      raise RefusedError(500, short(news.error), 'server_error')
    if news.error is not None:
      raise RefusedError(500, FAULT, 'server_error')
    if news.reply is not None and news.reply.finish == req.TIMED_OUT:
      raise RefusedError(
        504, f'no answer within {self.limits.timeout:g} s, of which {news.reply.timings.waited:.1f} s in line', 'timeout'
      )
    return news

  async def _events(self, body: Body, job: Job, writer: answers.Writer, news: News, gone: asyncio.Task) -> AsyncIterator[bytes]:
    """The events of a stream. Whoever stops reading cancels it."""
    try:
      yield writer.chunk({'role': 'assistant', 'content': ''})
      while True:
        logprobs = writer.logprobs(news.tokens, news.log_probs) if body.logprobs else None
        if news.piece or (logprobs and logprobs['content']):
          yield writer.chunk({'content': news.piece}, logprobs=logprobs)
        if news.reply is not None:
          break
        news = await self._next(job, gone)
      yield writer.chunk({}, news.reply.finish, **({'details': writer.details(news.reply)} if body.details else {}))
      if body.stream_options and body.stream_options.include_usage:
        yield writer.usage_chunk(news.reply)
      yield answers.DONE
    except RefusedError as e:
      yield answers.event(e.body())
      yield answers.DONE
    except ConnectionError:
      pass  # nobody reads it
    finally:
      gone.cancel()
      job.engine.cancel(job.ticket)

  async def _body(self, request: fastapi.Request) -> Body:
    """The parsed body; RefusedError if it is too large, too slow, or wrong."""
    most = self.limits.body
    too_large = RefusedError(413, f'the body has more than {most:,} bytes, which is the limit; send a smaller picture')
    length = request.headers.get('content-length', '')
    if length.isdecimal() and int(length[:20]) > most:
      raise too_large
    content = bytearray()
    try:
      with anyio.fail_after(self.limits.receive):
        async for chunk in request.stream():
          content += chunk
          if len(content) > most:
            raise too_large
    except TimeoutError:
      raise RefusedError(408, f'the body did not come within {self.limits.receive:g} s') from None
    except ClientDisconnect:
      raise ConnectionError('the client has gone') from None
    return parse(bytes(content))

  def _offer(self, name: str) -> Offer:
    if name not in self.offers:
      known = ', '.join(self.offers)
      raise RefusedError(404, f'model: {short(name)!r} is not here, expected one of {known}', 'not_found_error', 'model')
    return self.offers[name]

  def _client(self, request: fastapi.Request) -> str:
    """Whose turn it takes: the key, or the address without keys; RefusedError without a right one."""
    if not self.limits.keys:
      return request.client.host if request.client else ''
    scheme, _, given = request.headers.get('authorization', '').partition(' ')
    for i, key in enumerate(self.limits.keys):
      if scheme.lower() == 'bearer' and hmac.compare_digest(given.encode(errors='replace'), key.encode()):
        return f'key {i}'
    raise RefusedError(401, 'Authorization: expected Bearer and a key of this server', 'authentication_error')

  async def _refused(self, request: fastapi.Request, e: Exception) -> Response:
    """The answer to a request that gets none. What is nobody's mistake is raised on, and so logged, by Starlette."""
    if isinstance(e, HTTPException):
      e = RefusedError(e.status_code, short(f'{request.method} {request.url.path}: {e.detail}'))
    elif not isinstance(e, RefusedError):
      e = RefusedError(500, FAULT, 'server_error')
    self.metrics.refused.labels(str(e.status)).inc()
    headers = LATER if e.status in (429, 503) else {'WWW-Authenticate': 'Bearer'} if e.status == 401 else None
    return JSONResponse(e.body(), e.status, headers)

  async def models(self, request: fastapi.Request) -> dict[str, Any]:
    """`/v1/models`."""
    self._client(request)
    return {'object': 'list', 'data': [self._described(offer) for offer in self.offers.values()]}

  async def model(self, request: fastapi.Request, name: str) -> dict[str, Any]:
    """`/v1/models/NAME`."""
    self._client(request)
    return self._described(self._offer(name))

  def _described(self, offer: Offer) -> dict[str, Any]:
    loaded, vision = offer.loaded, offer.loaded.model.vision
    patch = vision.patch_size * (loaded.model.packer.scale_factor if loaded.model.packer else 1)  # of an image token, in pixels
    colour = [int(255 * mean) for mean in vision.image_mean]
    return {
      'id': offer.name,
      'object': 'model',
      'created': self._started,
      'owned_by': 'dynllava_jax',
      'image_tokens': loaded.num_image,
      'kept_image_tokens': methods.stage_image_tokens(loaded.stages, loaded.num_image)[-1],
      'picture': {'side': vision.image_size // patch, 'aspect': loaded.info.image_aspect, 'colour': colour},
    }

  async def health(self) -> Response:
    """`/health`: 200 while requests are taken."""
    state = next((s for s in (d.state for d in self.drivers) if s != 'ready'), 'ready')
    return JSONResponse({'status': state}, 200 if state == 'ready' else 503)

  async def numbers(self) -> Response:
    """`/metrics`."""
    return Response(self.metrics.text(), media_type='text/plain; version=0.0.4; charset=utf-8')


async def _gone(request: fastapi.Request) -> None:
  """Returns when the client has gone."""
  while (await request.receive())['type'] != 'http.disconnect':
    pass


@functools.cache
def _page() -> str:
  return importlib.resources.files('dynllava_jax.server').joinpath('page.html').read_text('utf-8')


async def page() -> Response:
  """`/`: for people with a browser."""
  return HTMLResponse(_page(), headers={'Content-Security-Policy': POLICY})
