"""Conversations to token ids and labels. Templates are data: one table.

Text is tokenized in chunks around `<image>`, as LLaVA does; what is supervised is decided by character position, so the
mask cannot slip when a tokenizer merges differently in context. LLaVA counts tokens instead, and where its count fails
(a separator in a text, an empty answer, chatml with LLaMA's tokenizer) it silently masks the whole sample or merges
turns; such samples raise `DataError` here, or come out right.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dynllava_jax.config import IGNORE, IMAGE_ID, ConfigError
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.tokenizer import BOS, EOS, Tokenizer

IMAGE_TOKEN = '<image>'
ROLES = ('human', 'gpt')

VICUNA = (
  'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, '
  "detailed, and polite answers to the user's questions. "
)
LLAVA_LLAMA_2 = (
  'You are a helpful language and vision assistant. You are able to understand the visual content that the user '
  'provides, and assist the user with a variety of tasks using natural language.'
)
LLAMA_2 = (
  'You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.'
  '  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal '
  'content. Please ensure that your responses are socially unbiased and positive in nature.\n\n'
  'If a question does not make any sense, or is not factually coherent, explain why instead of answering '
  "something not correct. If you don't know the answer to a question, please don't share false information."
)
MPT = 'A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.'


@dataclasses.dataclass(frozen=True)
class Template:
  """How a conversation is written; what is supervised is `answer`, the answer's text and `end`.

      {first}question{close}{answer}answer text{end}{next}question{close}...

  Attributes:
    separators: strings that no text may hold, because they would forge a turn.
    caption: the question is dropped, only its image stays (LLaVA's first training stage); one round only.
  """

  first: str
  next: str
  close: str
  answer: str
  end: str
  separators: tuple[str, ...]
  caption: bool = False


def _vicuna(system: str) -> Template:
  return Template(f'{system}USER: ', 'USER: ', ' ASSISTANT:', ' ', EOS, (EOS, ' ASSISTANT: '))


def _llama_2(system: str, later: str) -> Template:
  return Template(f'[INST] {system}', f'{later}[INST] ', ' [/INST]', ' ', f' {EOS}', (EOS, '[/INST] '))


def _chatml(system: str) -> Template:
  start, end = '<|im_start|>', '<|im_end|>'
  user, assistant = f'{start}user\n', f'{end}{start}assistant\n'
  return Template(f'{start}system\n{system}{end}{user}', user, assistant, '', end, (start, end))


TEMPLATES = {
  'vicuna_v1': _vicuna(VICUNA),
  'llava_llama_2': _llama_2(f'<<SYS>>\n{LLAVA_LLAMA_2}\n<</SYS>>\n\n', BOS),
  'llama_2': _llama_2(f'<<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n', BOS),
  'mistral_instruct': _llama_2('', ''),
  'chatml_direct': _chatml('Answer the questions.'),
  'mpt': _chatml(MPT),
  'plain': Template('', '', '', '', '\n', (EOS,), caption=True),
  'plain_turns': _vicuna(''),  # for models trained from nothing
}


ALIASES = {'v1': 'vicuna_v1', 'v0_plain': 'plain', 'mistral_direct': 'chatml_direct'}  # LLaVA's other names for the same


@dataclasses.dataclass(frozen=True)
class Encoded:
  """int32[N] ids, with `IMAGE_ID` where the image goes, and int32[N] labels, `IGNORE` where not supervised."""

  ids: np.ndarray
  labels: np.ndarray


def template(name: str) -> Template:
  """The template called `name`, by LLaVA's other names too; ConfigError with the known names otherwise."""
  name = ALIASES.get(name, name)
  if name not in TEMPLATES:
    raise ConfigError(f'config.data.conversation: {name!r} is unknown; expected one of {", ".join(sorted(TEMPLATES))}')
  return TEMPLATES[name]


def check_template(style: Template, tokenizer: Tokenizer) -> None:
  """Raises ConfigError if the tokenizer has no single token for the template's end of an answer: generation could not stop."""
  end = style.end.strip()
  if end and len(tokenizer.encode(end)) != 1:
    raise ConfigError(
      f'config.data.conversation: answers end in {end}, which this tokenizer cuts into pieces; it must be one token'
    )


def as_trained(turns: Sequence[dict[str, str]], sample_id: str) -> list[dict[str, str]]:
  """LLaVA's clean-up before a template is applied.

  An answer before the first question is dropped. A turn that holds `<image>` loses all copies of it and surrounding
  blanks, and starts with one, on a line of its own.

  Raises:
    DataError: `<image>` in an answer.
  """
  turns = list(turns[1:] if turns and turns[0].get('from') == ROLES[1] else turns)
  for i, turn in enumerate(turns):
    if IMAGE_TOKEN in turn.get('value', ''):
      if turn.get('from') == ROLES[1]:
        message = f'sample {sample_id}, turn {i}: {IMAGE_TOKEN} in an answer; it belongs to a question'
        raise DataError(message, 'placeholder_in_answer')
      rest = turn['value'].replace(IMAGE_TOKEN, '').strip()
      turns[i] = turn | {'value': f'{IMAGE_TOKEN}\n{rest}'.strip()}
  return turns


def render(turns: Sequence[dict[str, str]], style: Template, sample_id: str) -> tuple[str, list[tuple[int, int]]]:
  """The conversation as one text, and the (start, end) spans of it that are supervised.

  A conversation that ends with a question ends in the open prompt, such as `ASSISTANT:`.

  Raises:
    DataError: wrong roles, an empty turn, or a separator inside a text.
  """
  if not turns:
    raise DataError(f'sample {sample_id}: has no turns', 'malformed')
  for i, turn in enumerate(turns):
    _check_turn(turn, i, style, sample_id)
  if style.caption:
    return _render_caption([turn['value'] for turn in turns], style, sample_id)
  text, spans = style.first, []
  for i, turn in enumerate(turns):
    if i % 2 == 0:
      text += (style.next if i else '') + turn['value'] + style.close
    else:
      start = len(text)
      text += style.answer + turn['value'] + style.end
      spans.append((start, len(text)))
  return text, spans


def _check_turn(turn: dict[str, str], i: int, style: Template, sample_id: str) -> None:
  role, value = turn.get('from'), turn.get('value', '')
  if role != ROLES[i % 2]:
    message = f'sample {sample_id}, turn {i}: role {role!r}, expected {ROLES[i % 2]!r} (human and gpt alternate)'
    raise DataError(message, 'wrong_roles')
  if not value:
    raise DataError(f'sample {sample_id}, turn {i}: is empty', 'empty_answer' if i % 2 else 'empty_question')
  for separator in style.separators:
    if separator in value:
      message = f'sample {sample_id}, turn {i}: holds a separator of the template ({separator!r})'
      raise DataError(message, 'separator_in_text')


def check_special(turns: Sequence[dict[str, str]], special: Sequence[str], sample_id: str) -> None:
  """Raises DataError if a text holds a special token as plain text. LLaVA lets `<s>` pass, and so does this."""
  for token in set(special) - {BOS, IMAGE_TOKEN}:
    for i, turn in enumerate(turns):
      if token in turn['value']:
        message = f"sample {sample_id}, turn {i}: holds the tokenizer's special token {token}"
        raise DataError(message, 'separator_in_text')


def _render_caption(values: list[str], style: Template, sample_id: str) -> tuple[str, list[tuple[int, int]]]:
  if len(values) == 1:
    return values[0] + style.end, []
  if len(values) > 2:
    raise DataError(f'sample {sample_id}: {len(values)} turns, this template takes an image and its caption', 'wrong_roles')
  if IMAGE_TOKEN not in values[0]:
    raise DataError(f'sample {sample_id}: no {IMAGE_TOKEN}, this template is for captions', 'image_without_placeholder')
  text = IMAGE_TOKEN + values[1] + style.end
  return text, [(len(IMAGE_TOKEN), len(text))]


def encode(text: str, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> Encoded:
  """Token ids and labels of a rendered conversation; ids begin with BOS, if the tokenizer has one.

  As in LLaVA, the texts before and after the image are tokenized on their own.
  """
  begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  ids, at, offset = begin, [-1] * len(begin), 0
  for i, chunk in enumerate(text.split(IMAGE_TOKEN)):
    if i:
      ids.append(IMAGE_ID)
      at.append(-1)
      offset += len(IMAGE_TOKEN)
    for token, where in tokenizer.encode(chunk):
      ids.append(token)
      at.append(offset + where)
    offset += len(chunk)
  ids, at = np.asarray(ids, np.int32), np.asarray(at)
  supervised = np.zeros(len(ids), bool)
  for start, end in spans:
    supervised |= (at >= start) & (at < end)
  return Encoded(ids, np.where(supervised, ids, IGNORE).astype(np.int32))
