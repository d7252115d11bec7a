"""Conversations to token ids and labels. Templates are data: one table.

Text is tokenized in chunks between special tokens (`<image>`, `</s>`); what is supervised is decided by character
position, so the mask cannot slip when a tokenizer merges differently in context.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from dynllava_jax.config import IGNORE, IMAGE_ID, ConfigError
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.tokenizer import EOS, Tokenizer

IMAGE_TOKEN = '<image>'
ROLES = ('human', 'gpt')


@dataclasses.dataclass(frozen=True)
class Template:
  """How a conversation is written: `{system}{user}: q{after_user}{assistant}: a</s>...`."""

  system: str
  user: str = 'USER'
  assistant: str = 'ASSISTANT'
  after_user: str = ' '


TEMPLATES = {
  'vicuna_v1': Template(
    'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, '
    "detailed, and polite answers to the user's questions. "
  ),
  'plain_turns': Template(''),  # the same turns without a system prompt, for models trained from nothing
}


@dataclasses.dataclass(frozen=True)
class Encoded:
  """int32[N] ids, with `IMAGE_ID` where the image goes, and int32[N] labels, `IGNORE` where not supervised."""

  ids: np.ndarray
  labels: np.ndarray


def template(name: str) -> Template:
  """The template called `name`; ConfigError with the known names otherwise."""
  if name not in TEMPLATES:
    raise ConfigError(f'config.data.conversation: {name!r} is unknown; expected one of {", ".join(sorted(TEMPLATES))}')
  return TEMPLATES[name]


def render(turns: Sequence[dict[str, str]], style: Template, sample_id: str) -> tuple[str, list[tuple[int, int]]]:
  """The conversation as one text, and the (start, end) spans of it that are supervised.

  A conversation that ends with a question ends in the open prompt `ASSISTANT:`.

  Raises:
    DataError: wrong roles, an empty turn, a separator inside a text, or more than one image token.
  """
  text, spans = style.system, []
  if not turns:
    raise DataError(f'sample {sample_id}: has no turns')
  for i, turn in enumerate(turns):
    role, value = turn.get('from'), turn.get('value', '')
    if role != ROLES[i % 2]:
      raise DataError(f'sample {sample_id}, turn {i}: role {role!r}, expected {ROLES[i % 2]!r} (human and gpt alternate)')
    if not value.strip():
      raise DataError(f'sample {sample_id}, turn {i}: is empty')
    if EOS in value or f' {style.assistant}: ' in value:
      raise DataError(f'sample {sample_id}, turn {i}: holds a separator of the template ({EOS} or " {style.assistant}: ")')
    if role == 'human':
      text += f'{style.user}: {value}{style.after_user}{style.assistant}:'
    else:
      if IMAGE_TOKEN in value:
        raise DataError(f'sample {sample_id}, turn {i}: {IMAGE_TOKEN} in an answer; it belongs to a question')
      start = len(text)
      text += f' {value}{EOS}'
      spans.append((start, len(text)))
  if text.count(IMAGE_TOKEN) > 1:
    raise DataError(f'sample {sample_id}: {text.count(IMAGE_TOKEN)} image tokens, at most one is supported')
  return text, spans


def encode(text: str, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> Encoded:
  """Token ids and labels of a rendered conversation; ids begin with BOS.

  As in LLaVA, the text before and after the image are tokenized on their own, each with a word mark in front;
  within them what follows `</s>` has none.
  """
  ids, labels, offset, mark = [tokenizer.bos_id], [IGNORE], 0, True

  def add(token: int, at: int) -> None:
    ids.append(token)
    labels.append(token if any(a <= at < b for a, b in spans) else IGNORE)

  for chunk in re.split(f'({re.escape(EOS)}|{re.escape(IMAGE_TOKEN)})', text):
    if chunk == EOS:
      add(tokenizer.eos_id, offset)
      mark = False
    elif chunk == IMAGE_TOKEN:
      add(IMAGE_ID, offset)
      mark = True
    elif chunk:
      for token, at in tokenizer.encode_chunk(chunk, mark):
        add(token, offset + at)
    offset += len(chunk)
  return Encoded(np.asarray(ids, np.int32), np.asarray(labels, np.int32))
