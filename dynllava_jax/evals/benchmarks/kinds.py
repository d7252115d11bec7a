"""Which questions the product can be asked: words, and one picture or none.

Whatever else a file may hold, such as a video, a second picture or a sound, is refused by name: the model would answer without it.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from dynllava_jax.data.conversation import IMAGE_TOKEN
from dynllava_jax.data.fields import is_empty, is_no_picture, other_content
from dynllava_jax.data.marks import other_mark
from dynllava_jax.data.samples import DataError
from dynllava_jax.display import printable
from dynllava_jax.evals.folders import Folder

KNOWN = ('image', 'question_id', 'text', 'category', 'id', 'conversations', 'question', 'answer', 'answers')


def only_picture(row: Mapping[str, Any], where: str) -> str | None:
  """The one picture that a row of a question file names; None if it names none.

  Raises:
    DataError: several pictures, something else to look at or to listen to, or no name.
  """
  other = other_content(row, KNOWN)
  if other:
    name = printable(other.name)[:80]
    raise DataError(f'{where}: has {name}, expected one image or none; leave such questions out', 'other_content')
  image = row.get('image')
  if isinstance(image, list):
    if len(image) > 1:
      raise DataError(f'{where}: has {len(image)} images, expected one or none; leave such questions out', 'several_images')
    image = image[0] if image else None
  if is_empty(image):
    return None
  if not isinstance(image, str):
    raise DataError(f'{where}: image is {image!r}, expected the name of a file; is it a question file of LLaVA?')
  if is_no_picture(image):
    raise DataError(f'{where}: image is {image!r}, which is no picture; leave such questions out', 'other_content')
  return image


def picture_below(folder: Folder, base: pathlib.Path, row: Mapping[str, Any], where: str) -> pathlib.Path | None:
  """`only_picture` as a file below the image folder `base`; DataError also if it lies outside."""
  name = only_picture(row, where)
  return None if name is None else folder.image(base, name, where)


def needed_picture(folder: Folder, base: pathlib.Path, row: Mapping[str, Any], where: str) -> pathlib.Path:
  """As `picture_below`, of a benchmark whose questions all have a picture."""
  path = picture_below(folder, base, row, where)
  if path is None:
    raise DataError(f'{where}: image is {row.get("image")!r}, expected the name of a file; is it the right question file?')
  return path


def check_words(text: Any, where: str) -> None:
  """DataError unless `text` is a string with words, and nothing in it stands for a picture or a sound."""
  if not isinstance(text, str) or not text.strip():
    raise DataError(f'{where}: the question is {text!r}, expected a text; is it the right file?', 'empty_question')
  mark = IMAGE_TOKEN if IMAGE_TOKEN in text else other_mark(text)
  if mark:
    what = 'the text names the image itself' if mark == IMAGE_TOKEN else 'the text stands for more than a picture'
    raise DataError(f'{where}: {what}, by {mark}; take it out, or leave the question out', 'other_content')
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise DataError(f'{where}: the question is no Unicode text ({e.reason} at character {e.start}); get the file again') from None
