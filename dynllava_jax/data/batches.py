"""Samples to rows, rows to batches: fixed shapes, laid out on the host."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from dynllava_jax.config import IGNORE, IMAGE_ID, VisionConfig
from dynllava_jax.data.conversation import IMAGE_TOKEN, ROLES, Encoded, Template, as_trained, check_special, encode, render
from dynllava_jax.data.images import preprocess
from dynllava_jax.data.marks import other_mark
from dynllava_jax.data.samples import DataError, Sample
from dynllava_jax.data.tokenizer import Tokenizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Fixed-shape arrays of B rows with S = text bucket + P positions; without B it is one row.

  Attributes:
    pixels: uint8[B, R, R, 3], zeros in rows without image, which never look at them.
    tokens: int32[B, S]; the P positions of the image and the padding hold the pad token.
    labels: int32[B, S], -100 where not supervised.
    length: int32[B], real positions, image included.
    image_start: int32[B], position of the first image token, -1 without image.
    answer_start: int32[B], first position of the last answer.
    seed: uint32[B], from the sample's number.
    instruct_start: int32[B], first position of the last instruction: behind the answer before it or, if that is later, behind the
      image; `length` without image, where none is judged.
  """

  pixels: np.ndarray
  tokens: np.ndarray
  labels: np.ndarray
  length: np.ndarray
  image_start: np.ndarray
  answer_start: np.ndarray
  seed: np.ndarray
  instruct_start: np.ndarray | None = None


def render_turns(
  sample_id: str, turns: Sequence[dict[str, str]], has_image: bool, *, style: Template, special: Sequence[str]
) -> tuple[str, list[tuple[int, int]]]:
  """`conversation.render` after LLaVA's clean-up, with everything checked that needs no tokenizer.

  Args:
    sample_id, turns, has_image: the sample.
    style: template.
    special: the tokenizer's special tokens, which no text may hold.

  Raises:
    DataError: image without placeholder or the reverse, several images, or whatever else cannot be rendered.
  """
  turns = as_trained(turns, sample_id)
  text, spans = render(turns, style, sample_id)
  check_special(turns, special, sample_id)
  for i, turn in enumerate(turns):
    if turn['from'] == ROLES[0] and (mark := other_mark(turn['value'])):
      message = f'sample {sample_id}, turn {i}: {mark} stands for content that this model does not take; only {IMAGE_TOKEN} is'
      raise DataError(message, 'other_content')
  placeholders = text.count(IMAGE_TOKEN)
  if has_image and not placeholders:
    raise DataError(f'sample {sample_id}: has an image but no {IMAGE_TOKEN}', 'image_without_placeholder')
  if placeholders and not has_image:
    raise DataError(f'sample {sample_id}: has {IMAGE_TOKEN} but no image', 'placeholder_without_image')
  if placeholders > 1:
    raise DataError(f'sample {sample_id}: {placeholders} image tokens, at most one is supported', 'several_images')
  return text, spans


def encode_turns(
  sample_id: str, turns: Sequence[dict[str, str]], has_image: bool, *, style: Template, tokenizer: Tokenizer
) -> Encoded:
  """Token ids and labels of one conversation, the image a single `IMAGE_ID`. Raises as `render_turns` does."""
  return encode(*render_turns(sample_id, turns, has_image, style=style, special=tokenizer.special), tokenizer)


def cut(encoded: Encoded, size: int) -> Encoded:
  """The first `size` tokens, without what is left of a question at their end: nothing after it is supervised."""
  labels = encoded.labels[:size]
  size = int(np.flatnonzero(labels != IGNORE).max(initial=-1)) + 1
  return Encoded(encoded.ids[:size], labels[:size])


def make_row(
  sample: Sample,
  number: int,
  *,
  style: Template,
  tokenizer: Tokenizer,
  vision: VisionConfig,
  num_image: int,
  text_length: int,
  aspect: str = 'pad',
  training: bool = False,
  text_room: int | None = None,
  truncate: bool = False,
) -> Batch:
  """Lays one sample out.

  Args:
    sample: a conversation; one that ends with a question becomes a prompt.
    number: seed of the row.
    style, tokenizer, vision: how text and image are encoded.
    num_image: P, positions that an image takes.
    text_length: text bucket, tokens besides the image's.
    aspect: how the image becomes a square, see `images.preprocess`.
    training: refuse prompts. A row without image may also fill the image's positions with text, for which the
      later stages of generation have no room.
    text_room: so many of them, where training cuts the sequence; all if None.
    truncate: cut a sample that is too long, as LLaVA does, instead of refusing it.

  Raises:
    DataError: see `encode_turns`; too long, or nothing to train on.
  """
  has_image = sample.image is not None
  text_room = num_image if text_room is None else text_room
  encoded = encode_turns(sample.id, sample.conversations, has_image, style=style, tokenizer=tokenizer)
  room = text_length + (1 if has_image else text_room if training else 0)
  if len(encoded.ids) > room and truncate:
    encoded = cut(encoded, room)
    if not len(encoded.ids):
      raise DataError(f'sample {sample.id}: its first answer lies beyond the largest bucket', 'too_long')
  if len(encoded.ids) > room:
    raise DataError(
      f'sample {sample.id}: {len(encoded.ids) - has_image} text tokens, the bucket has {room - has_image}; raise '
      'config.data.text_length or shorten the sample',
      'too_long',
    )
  where = np.flatnonzero(encoded.ids == IMAGE_ID)
  start = int(where[0]) if len(where) else -1
  if has_image and start < 0:
    raise DataError(f'sample {sample.id}: its image lies beyond the largest bucket', 'too_long')

  def expand(row, filler):
    full = row if start < 0 else np.concatenate([row[:start], np.full(num_image, filler, np.int32), row[start + 1 :]])
    return np.concatenate([full, np.full(text_length + num_image - len(full), filler, np.int32)]), len(full)

  tokens, length = expand(encoded.ids, tokenizer.pad_id)
  labels, _ = expand(encoded.labels, IGNORE)
  ignored = np.flatnonzero(labels[:length] == IGNORE)
  answer_start = int(ignored.max(initial=-1)) + 1
  if training and answer_start >= length:
    raise DataError(f'sample {sample.id}: no supervised token at its end; does it end with an answer?', 'no_supervised_token')
  size = vision.image_size
  pixels = preprocess(sample.image, vision, aspect) if has_image else np.zeros((size, size, 3), np.uint8)
  as_int = lambda x: np.asarray(x, np.int32)
  answered = np.flatnonzero(labels[:answer_start] != IGNORE)
  instruct_start = max(start + num_image, int(answered.max(initial=-1)) + 1) if has_image else length
  seed, spans = np.asarray(number, np.uint32), (as_int(length), as_int(start), as_int(answer_start))
  return Batch(pixels, tokens, labels, *spans, seed, as_int(instruct_start))


def stack(rows: list[Batch]) -> Batch:
  """Rows of equal shapes to a batch."""
  return jax.tree.map(lambda *xs: np.stack(xs), *rows)
