"""What people ask, in the forms they have it in, to questions that the model can be asked: one picture or none, and words."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dynllava_jax import paths, remote
from dynllava_jax.data import images
from dynllava_jax.data.fields import is_no_picture
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks.base import Question
from dynllava_jax.evals.benchmarks.kinds import check_words
from dynllava_jax.evals.layout import Layout, Loaded, Rows

SETTING = 'text_lengths'  # what messages call the buckets


def question(id_: str | int, image: Any, text: Any) -> Question:
  """One question.

  Args:
    id_: what messages call it.
    image: a path, the bytes of a file, a Pillow image, uint8[H, W, 3], or None.
    text: the user's words.

  Raises:
    DataError: several pictures, no picture, or no words.
  """
  name = f'question {id_}'
  check_words(text, name)
  return Question(id_, (text,), text, picture(name, image))


def picture(name: str, image: Any) -> Any:
  """A picture as `Question.image` has it; DataError if it is none, or several."""
  if image is None or isinstance(image, bytes):
    return image
  if isinstance(image, (str, os.PathLike)):
    if is_no_picture(os.fspath(image)):
      raise DataError(f'{name}: image is {os.fspath(image)!r}, which is no picture; expected one, or none', 'other_content')
    return pathlib.Path(remote.fetched(paths.given(os.fspath(image), f'{name}: image')))
  if isinstance(image, (list, tuple)):
    raise DataError(
      f'{name}: {len(image)} images, expected one or none; this model sees one picture per conversation', 'several_images'
    )
  if not isinstance(image, (np.ndarray, Image.Image)):
    raise DataError(
      f'{name}: image is {type(image).__name__}, expected a path, bytes, a Pillow image or an array', 'undecodable_image'
    )
  return images.from_memory(image, name)


def pairs(image: Any, text: Any) -> tuple[list[tuple[Any, Any]], bool]:
  """(image, text) of every question, and whether several were asked.

  One picture goes with each of several questions; several pictures need as many questions.

  Raises:
    DataError: the numbers do not fit.
  """
  many = isinstance(text, (list, tuple))
  if not isinstance(image, (list, tuple)):
    return [(image, t) for t in (text if many else [text])], many
  if not many:
    raise DataError(
      f'question {text!r}: {len(image)} images, expected one or none; to ask the same of each, give as many questions as images',
      'several_images',
    )
  if len(image) != len(text):
    raise DataError(f'{len(image)} images and {len(text)} questions; give as many of both, or one image for all')
  return list(zip(image, text)), True


def lay_out(loaded: Loaded, asked: Sequence[Question], text_lengths: Sequence[int], seeds: Sequence[int]) -> list[Rows]:
  """The prompt of each question as a batch of one, in the smallest text bucket that holds it.

  Raises:
    DataError: a prompt that fits no bucket, or a picture that cannot be read.
  """
  one = lambda q, seed: Layout(loaded, [q], text_lengths, 0, SETTING).rows([0]).seeded(seed)
  return [one(q, seed) for q, seed in zip(asked, seeds)]
