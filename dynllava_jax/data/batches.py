"""Samples to rows, rows to batches: fixed shapes, laid out on the host."""

import dataclasses

import jax
import numpy as np

from dynllava_jax.config import IGNORE, IMAGE_ID, VisionConfig
from dynllava_jax.data.conversation import IMAGE_TOKEN, Template, encode, render
from dynllava_jax.data.images import preprocess
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
  """

  pixels: np.ndarray
  tokens: np.ndarray
  labels: np.ndarray
  length: np.ndarray
  image_start: np.ndarray
  answer_start: np.ndarray
  seed: np.ndarray


def make_row(
  sample: Sample, number: int, *, style: Template, tokenizer: Tokenizer, vision: VisionConfig, text_length: int
) -> Batch:
  """Lays one sample out.

  Args:
    sample: a conversation; one that ends with a question becomes a prompt.
    number: seed of the row.
    style, tokenizer, vision: how text and image are encoded.
    text_length: text bucket, tokens besides the image's.

  Raises:
    DataError: too long, image without placeholder or the reverse, or nothing to train on.
  """
  text, spans = render(sample.conversations, style, sample.id)
  if (sample.image is not None) != (IMAGE_TOKEN in text):
    raise DataError(
      f'sample {sample.id}: '
      + (f'has an image but no {IMAGE_TOKEN}' if sample.image is not None else f'has {IMAGE_TOKEN} but no image')
    )
  encoded = encode(text, spans, tokenizer)
  num_image = vision.num_patches
  where = np.flatnonzero(encoded.ids == IMAGE_ID)
  start = int(where[0]) if len(where) else -1
  text_tokens = len(encoded.ids) - len(where)
  if text_tokens > text_length:
    raise DataError(
      f'sample {sample.id}: {text_tokens} text tokens, the bucket has {text_length}; raise '
      'config.data.text_length or shorten the sample'
    )

  def expand(row, filler):
    full = row if start < 0 else np.concatenate([row[:start], np.full(num_image, filler, np.int32), row[start + 1 :]])
    return np.concatenate([full, np.full(text_length + num_image - len(full), filler, np.int32)]), len(full)

  tokens, length = expand(encoded.ids, tokenizer.pad_id)
  labels, _ = expand(encoded.labels, IGNORE)
  answer_start = length
  if spans:
    ignored = np.flatnonzero(labels[:length] == IGNORE)
    answer_start = int(ignored[-1]) + 1
    if answer_start >= length:
      raise DataError(f'sample {sample.id}: no supervised token; does it end with an answer?')
  size = vision.image_size
  pixels = np.zeros((size, size, 3), np.uint8) if sample.image is None else preprocess(sample.image, vision)
  as_int = lambda x: np.asarray(x, np.int32)
  return Batch(pixels, tokens, labels, as_int(length), as_int(start), as_int(answer_start), np.asarray(number, np.uint32))


def stack(rows: list[Batch]) -> Batch:
  """Rows of equal shapes to a batch."""
  return jax.tree.map(lambda *xs: np.stack(xs), *rows)
