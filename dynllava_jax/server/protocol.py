"""OpenAI's chat completions as this server takes them: every field that would change the answer is done, or refused by name.

https://platform.openai.com/docs/api-reference/chat/create
"""

import base64
import binascii
import io
import re
import secrets
from typing import Annotated, Any, Literal

import pydantic
from PIL import Image

from dynllava_jax.data import images
from dynllava_jax.display import printable
from dynllava_jax.evals.benchmarks.base import Question
from dynllava_jax.evals.benchmarks.kinds import check_words
from dynllava_jax.evals.layout import IMAGE_MARK
from dynllava_jax.serving.request import Options

FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF')
DATA_URL = re.compile(r'data:image/[\w.+-]+;base64,', re.ASCII)
SHOWN = 200  # characters of a message that come from the request
DEEPEST = 100  # levels of a body


class RefusedError(Exception):
  """A request that is not answered: HTTP `status`, and why."""

  def __init__(self, status: int, message: str, kind: str = 'invalid_request_error', param: str | None = None):
    super().__init__(message)
    self.status, self.kind, self.param = status, kind, param

  def body(self) -> dict[str, Any]:
    """As OpenAI's clients read it."""
    return {'error': {'message': printable(self), 'type': self.kind, 'param': self.param, 'code': self.status}}


class Strict(pydantic.BaseModel):
  """Nothing is converted, nothing unknown let pass."""

  model_config = pydantic.ConfigDict(extra='forbid', strict=True, allow_inf_nan=False)


class ImageUrl(Strict):
  """A picture; `detail` has one value here, since every picture becomes one square."""

  url: str
  detail: Literal['auto', 'low', 'high'] = 'auto'


class ImagePart(Strict):
  """A picture among a message's parts."""

  type: Literal['image_url']
  image_url: ImageUrl


class TextPart(Strict):
  """Words among a message's parts."""

  type: Literal['text']
  text: str


Part = Annotated[TextPart | ImagePart, pydantic.Field(discriminator='type')]


class Message(Strict):
  """One message of a conversation."""

  role: Literal['system', 'developer', 'user', 'assistant']
  content: str | list[Part]
  name: str | None = None


class StreamOptions(Strict):
  """What comes with a stream."""

  include_usage: bool = False
  include_obfuscation: bool = False


class Format(Strict):
  """Of the answer; other ones than text are not offered."""

  type: Literal['text']


class Body(Strict):
  """A request. The last two groups are those of other servers, and what is accepted because it changes nothing."""

  model: str
  messages: list[Message] = pydantic.Field(min_length=1)
  stream: bool = False
  stream_options: StreamOptions | None = None
  max_tokens: int | None = None
  max_completion_tokens: int | None = None
  temperature: float | None = None
  top_p: float | None = None
  seed: int | None = None
  stop: str | list[str] | None = None
  logprobs: bool | None = None
  top_logprobs: Literal[0] | None = None
  n: Literal[1] | None = None
  frequency_penalty: Annotated[float, pydantic.Field(ge=0, le=0)] | None = None
  presence_penalty: Annotated[float, pydantic.Field(ge=0, le=0)] | None = None
  logit_bias: Annotated[dict[str, float], pydantic.Field(max_length=0)] | None = None
  response_format: Format | None = None
  modalities: list[Literal['text']] | None = None

  top_k: int | None = None
  repetition_penalty: float | None = None
  details: bool = False

  user: str | None = None
  safety_identifier: str | None = None
  prompt_cache_key: str | None = None
  metadata: dict[str, str] | None = None
  service_tier: str | None = None
  store: Literal[False] | None = None

  def options(self, timeout: float, most: int) -> Options:
    """How it is answered. RefusedError for a value that cannot be."""
    tokens = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
    if tokens is not None and tokens > most:
      raise RefusedError(400, f'max_tokens: {tokens}, and this server has room for {most} of an answer', param='max_tokens')
    given = dict(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, repetition_penalty=self.repetition_penalty)
    seed = secrets.randbits(32) if self.seed is None else self.seed
    stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
    try:
      return Options(max_tokens=tokens, seed=seed, stop=stop, timeout=timeout, **{k: v for k, v in given.items() if v is not None})
    except ValueError as e:
      raise RefusedError(400, short(e)) from None

  def question(self, name: str, most_pixels: int) -> Question:
    """The last message, after the ones before it. RefusedError or DataError if the model cannot be asked so."""
    turns: list[dict[str, str]] = []
    picture, system = None, []
    for i, message in enumerate(self.messages):
      where = f'messages[{i}]'
      words, found = _content(message, where, most_pixels)
      if message.role in ('system', 'developer'):
        if turns:
          raise RefusedError(400, f'{where}: role {message.role!r} behind a question, expected in front of the first one')
        system.append(words)
        continue
      expected = ('user', 'assistant')[len(turns) % 2]
      if message.role != expected:
        raise RefusedError(400, f'{where}: role {message.role!r}, expected {expected!r}: questions and answers alternate')
      check_words(words, where)
      if found is not None:
        if message.role == 'assistant':
          raise RefusedError(400, f'{where}: a picture in an answer; it belongs to a question')
        if picture is not None:
          raise RefusedError(400, f'{where}: a second picture; this model sees one per conversation')
        picture = found
      if not turns:
        words = '\n'.join([*system, words])
      mark = IMAGE_MARK if found is not None else ''
      turns.append({'from': 'human' if message.role == 'user' else 'gpt', 'value': mark + words})
    if not turns or turns[-1]['from'] != 'human':
      raise RefusedError(400, 'messages: the last one is no question of the user')
    text = turns[-1]['value'].removeprefix(IMAGE_MARK)
    return Question(name, (text,), text, picture, before=tuple(turns[:-1]))


def parse(content: bytes) -> Body:
  """A request's body. RefusedError with the first thing that is wrong in it."""
  try:
    return Body.model_validate_json(content)
  except pydantic.ValidationError as e:
    error = min(
      e.errors(include_url=False, include_context=False, include_input=True), key=lambda e: e['type'] != 'extra_forbidden'
    )
    path = '.'.join(map(str, error['loc'])) or 'body'
    unknown = error['type'] == 'extra_forbidden'
    what = 'is not known to this server' if unknown else error['msg']
    seen = '' if unknown or isinstance(error['input'], (dict, list, bytes)) else f', got {error["input"]!r:.60}'
    more = f' (and {e.error_count() - 1} more)' if e.error_count() > 1 else ''
    raise RefusedError(400, short(f'{path}: {what}{seen}{more}'), param=short(path)) from None


def short(text: Any) -> str:
  """So much of a message as is worth sending back."""
  text = printable(text)
  return text if len(text) <= SHOWN else f'{text[:SHOWN]}...'


def _content(message: Message, where: str, most_pixels: int) -> tuple[str, bytes | None]:
  """Words and encoded picture of a message."""
  if isinstance(message.content, str):
    return message.content, None
  pictures = [part.image_url.url for part in message.content if isinstance(part, ImagePart)]
  if len(pictures) > 1:
    raise RefusedError(400, f'{where}: {len(pictures)} pictures; this model sees one per conversation')
  words = '\n'.join(part.text for part in message.content if isinstance(part, TextPart))
  return words, picture_of(pictures[0], where, most_pixels) if pictures else None


def picture_of(url: str, where: str, most_pixels: int) -> bytes:
  """The file that a data URL holds, if it is a picture of at most so many pixels; nothing is ever fetched. RefusedError."""
  found = DATA_URL.match(url)
  if not found:
    raise RefusedError(
      400, f'{where}: image_url is {short(url[:40])!r}, expected data:image/...;base64,...; this server fetches nothing'
    )
  try:
    content = base64.b64decode(url[found.end() :], validate=True)
  except (binascii.Error, ValueError) as e:
    raise RefusedError(400, f'{where}: image_url is no base64 ({e})') from None
  try:
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
      width, height = opened.size
  except Exception:  # a broken file can make Pillow's readers raise anything
    raise RefusedError(400, f'{where}: image_url is no picture in {", ".join(FORMATS)}; {len(content)} bytes') from None
  if width * height > most_pixels or max(width, height) > images.MAX_SIDE:
    raise RefusedError(400, f'{where}: a picture of {width} x {height} pixels, at most {most_pixels:,} are read; scale it down')
  return content
