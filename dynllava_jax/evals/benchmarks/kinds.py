"""Which questions the product can be asked: words, and one picture or none.

Whatever else a file may hold, such as a video, a second picture or a sound, is refused by name: the model would answer without it.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from dynllava_jax.data.conversation import IMAGE_TOKEN
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.folders import Folder

OTHER_MEDIA = ('video', 'videos', 'audio', 'audios', 'sound', 'speech', 'images', 'image_2', 'depth', 'point_cloud', 'frames')
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.npy', '.npz')
# What stands for pictures, videos and sounds in the texts of LLaVA and its relatives; the model would read them as words.
PLACEHOLDER = re.compile(
  r'<\|?(?:image|video|audio|speech|sound)s?(?:[ _-]?(?:\d+|placeholder|token|pad))?\|?>|<(?:im|vi)_(?:start|end|patch)>',
  re.IGNORECASE,
)


def only_picture(row: Mapping[str, Any], where: str) -> str | None:
  """The one picture that a row of a question file names; None if it names none.

  Raises:
    DataError: several pictures, something else to look at or to listen to, or no name.
  """
  other = [name for name in OTHER_MEDIA if row.get(name) not in (None, '', [], {})]
  if other:
    raise DataError(f'{where}: has {", ".join(other)}, expected one image or none; leave such questions out')
  image = row.get('image')
  if isinstance(image, list):
    if len(image) > 1:
      raise DataError(f'{where}: has {len(image)} images, expected one or none; leave such questions out', 'several_images')
    image = image[0] if image else None
  if image in (None, ''):
    return None
  if not isinstance(image, str):
    raise DataError(f'{where}: image is {image!r}, expected the name of a file; is it a question file of LLaVA?')
  if image.lower().endswith(VIDEOS):
    raise DataError(f'{where}: image is {image!r}, which is no picture; leave such questions out')
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
  found = PLACEHOLDER.search(text)
  if found:
    what = 'the text names the image itself' if found.group() == IMAGE_TOKEN else 'the text stands for more than one picture'
    raise DataError(f'{where}: {what} by {found.group()}; take it out, or leave the question out', 'several_images')
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise DataError(f'{where}: the question is no Unicode text ({e.reason} at character {e.start}); get the file again') from None
