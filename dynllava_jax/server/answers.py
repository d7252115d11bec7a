"""Replies as OpenAI's clients read them: whole, or as the events of a stream."""

import json
import time
from collections.abc import Sequence
from typing import Any

from dynllava_jax.data.tokenizer import Tokenizer
from dynllava_jax.serving import request as req
from dynllava_jax.serving.request import Reply

REASONS = {req.END: 'stop', req.STOP: 'stop', req.LENGTH: 'length'}


class Writer:
  """The answer to one request. `id`: of the answer, `model`: as it was asked for."""

  def __init__(self, id_: str, model: str, prompt_tokens: int, image_tokens: int, tokenizer: Tokenizer):
    self.id, self._model, self._tokenizer = id_, model, tokenizer
    self._prompt_tokens, self._image_tokens = prompt_tokens, image_tokens
    self._created = int(time.time())

  def whole(self, reply: Reply, logprobs: bool, details: bool) -> dict[str, Any]:
    """A `chat.completion`."""
    message = {'role': 'assistant', 'content': reply.text, 'refusal': None}
    choice = {
      'index': 0,
      'message': message,
      'logprobs': self.logprobs(reply.tokens, reply.log_probs) if logprobs else None,
      'finish_reason': REASONS[reply.finish],
    }
    out = self._head('chat.completion') | {'choices': [choice], 'usage': self.usage(reply)}
    return out | ({'details': self.details(reply)} if details else {})

  def chunk(self, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None, **more: Any) -> bytes:
    """One event of a stream."""
    choice = {'index': 0, 'delta': delta, 'logprobs': logprobs, 'finish_reason': finish and REASONS[finish]}
    return event(self._head('chat.completion.chunk') | {'choices': [choice]} | more)

  def usage_chunk(self, reply: Reply) -> bytes:
    """The event with the numbers, which has no choice."""
    return event(self._head('chat.completion.chunk') | {'choices': [], 'usage': self.usage(reply)})

  def usage(self, reply: Reply) -> dict[str, Any]:
    """Tokens, and of the image and of the answer how many stay in the cache behind the last cut; `rung`: how it was run."""
    return {
      'prompt_tokens': self._prompt_tokens,
      'completion_tokens': len(reply.tokens),
      'total_tokens': self._prompt_tokens + len(reply.tokens),
      'image_tokens': self._image_tokens,
      'kept_image_tokens': len(reply.kept_image),
      'kept_completion_tokens': reply.kept_generated,
      'rung': reply.rung,
    }

  def logprobs(self, tokens: Sequence[int], log_probs: Sequence[float]) -> dict[str, Any]:
    """Of each token but the one that ends an answer."""
    content = []
    for token, log_prob in zip(tokens, log_probs):
      if token != self._tokenizer.eos_id:
        piece = self._tokenizer.piece(token)
        text = piece.encode(errors='replace')
        content.append({'token': text.decode(), 'logprob': log_prob, 'bytes': list(text), 'top_logprobs': []})
    return {'content': content, 'refusal': None}

  def details(self, reply: Reply) -> dict[str, Any]:
    """What a page draws: which patches and which words were kept, and times."""
    pieces = [self._tokenizer.piece(t) for t in reply.tokens if t != self._tokenizer.eos_id]
    return {
      'kept_image': list(reply.kept_image),
      'pieces': pieces,
      'kept': [bool(k) for k in reply.kept],
      'seconds': {'waited': reply.timings.waited, 'first': reply.timings.first, 'total': reply.timings.total},
    }

  def _head(self, kind: str) -> dict[str, Any]:
    return {'id': self.id, 'object': kind, 'created': self._created, 'model': self._model}


def event(value: Any) -> bytes:
  """A server-sent event."""
  return b'data: ' + json.dumps(value).encode() + b'\n\n'


DONE = b'data: [DONE]\n\n'
