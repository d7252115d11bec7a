"""What an entry holds besides LLaVA's own fields: content that this model would never see, or notes that do no harm.

A sample about a video or a second picture must not pass for one that can be trained on because its text can be. A field is
content by its name, taken apart into words (`left_images`, `audioFeatures`, `frames_dir`), by its value (the name of a media
file, a data URI, an encoded picture), or because a list or object in it has such a field.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

OF_SAMPLE, OF_TURN = ('id', 'image', 'conversations'), ('from', 'value')
DEEPEST = 8  # levels that are looked into

# The last word of a name, once the words of `CARRIER` behind it are gone.
MEDIA = re.compile(
  r'images?|imgs?|pictures?|pics?|photos?|screenshots?|thumbnails?|videos?|vids?|frames?|keyframes?|audios?|waveforms?|wavs?'
  r'|spectrograms?|mel|fbanks?|pixels?|pdfs?|pointclouds?|media|medias|multimedia|attachments?|multimodal'
)
# Whole names, which mean something else with a word in front.
ALONE = re.compile(
  r'clips?|speech|speeches|sounds?|voices?|music|points|documents?|depth|masks?|gifs?|movies?|recordings?|mm'
  r'|multi modal|system|tools|functions'
  r'|history|(?:system (?:prompt|message))|(?:tool|function) calls?|(?:chat|conversation) history|input features?|inputs embeds?'
)
CARRIER = """
path paths file files filename filenames url urls uri uris list lists dir dirs folder folders directory data base64 b64 bytes
blob binary feature features feat feats embed embeds embedding embeddings array arrays tensor tensors value values content
contents token tokens input inputs sequence sequences
""".split()  # noqa: SIM905
NOT_THE_THING = ('num', 'n', 'number', 'count', 'has', 'is', 'max', 'min', 'total', 'of', 'in', 'for', 'per', 'about', 'from')
TYPE = re.compile(r'(?:.* )?(?:type|modality|modalities|mime|mimetype)')
OTHER_TYPE = re.compile(
  r'(?:input_)?(?:videos?|audios?|speech|point_?clouds?|pdf)(?:_(?:url|file|clip))?|(?:video|audio)/.+|application/pdf',
  re.IGNORECASE,
)

PICTURES = (
  'jpe?g|jpe|jfif|png|apng|webp|bmp|dib|tiff?|gif|jp2|j2k|jpx|avif|ico|ppm|pgm|pbm|pnm|tga|hei[cf]|svg|psd|raw|dng|cr2|nef|arw'
)
OTHERS = (
  'mp4|avi|mov|mkv|webm|m4v|mpe?g|mpg|flv|wmv|3gp|3g2|ogv|mts|m2ts|vob|rm|rmvb|asf|divx'
  '|wav|mp3|flac|ogg|oga|opus|m4a|m4b|aac|amr|aiff?|wma|au|mid|midi|mka'
  '|npy|npz|pt|pth|pkl|h5|hdf5|mat|safetensors|ply|pcd|las|laz|obj|stl|glb|gltf|off|dcm|nii|nii\\.gz'
  '|pdf|docx?|pptx?|xlsx?|odt|odp|ods|epub|djvu|rtf'
)
_BEHIND = r'(?:[?#]\S+)?\s*$'  # of an address
FILE = re.compile(rf'[^\s.]\.(?:{PICTURES}|{OTHERS}){_BEHIND}', re.IGNORECASE)
OTHER_FILE = re.compile(rf'[^\s.]\.(?:{OTHERS}|svg){_BEHIND}', re.IGNORECASE)
# A data URI, and how files of JPEG, PNG, GIF, RIFF (WebP, WAVE, AVI), WebM, MP4, MP3, Ogg and PDF begin in base64.
ENCODED = re.compile(
  r'data:(?:image|video|audio|application/pdf)|(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|GkXfo|AAAA[A-Za-z0-9+/]{2}mZ0eX|SUQz|T2dnUw|JVBERi)'
  r'[A-Za-z0-9+/=\s]{40}'
)


class Content(NamedTuple):
  """A field with content that the model does not take: its name, through what it lies in (`extra.image`), and its value."""

  name: str
  value: Any


def is_empty(value: Any) -> bool:
  """Whether a field says that there is nothing: null, an empty text or list, or the NaN that tables leave."""
  return value is None or value in ('', [], {}) or (isinstance(value, float) and math.isnan(value))


def other_content(fields: Mapping[str, Any], known: tuple[str, ...]) -> Content | None:
  """The first field that holds content which the model does not take."""
  picture = fields.get('image') if 'image' in known else None
  picture = picture[0] if isinstance(picture, list) and len(picture) == 1 else picture
  return _within({name: value for name, value in fields.items() if name not in known}, '', picture, 0)


def is_no_picture(name: str) -> bool:
  """Whether a file name ends as that of a video, a sound, a document or numbers."""
  return bool(OTHER_FILE.search(name))


def unused(fields: Mapping[str, Any], known: tuple[str, ...]) -> list[str]:
  """Names of the other fields with something in them."""
  return [name for name, value in fields.items() if name not in known and not is_empty(value)]


def _within(fields: Mapping[str, Any], inside: str, picture: Any, depth: int) -> Content | None:
  for name, value in fields.items():
    if is_empty(value) or value is False:
      continue
    full = f'{inside}{name}'
    if _is_content(str(name), value, picture):
      return Content(full, value)
    if found := _inside(value, f'{full}.', picture, depth):
      return found
  return None


def _inside(value: Any, inside: str, picture: Any, depth: int) -> Content | None:
  if depth == DEEPEST:
    return None
  if isinstance(value, Mapping):
    return _within(value, inside, picture, depth + 1)
  entries = (entry for entry in value if isinstance(entry, (list, Mapping))) if isinstance(value, list) else ()
  return next(filter(None, (_inside(entry, inside, picture, depth + 1) for entry in entries)), None)


def _is_content(name: str, value: Any, picture: Any) -> bool:
  texts = list(_texts(value))
  if texts and all(_same_picture(text, picture) for text in texts):
    return False
  if any(FILE.search(text) or ENCODED.match(text) for text in texts if not _same_picture(text, picture)):
    return True
  words = _words(name)
  spoken = ' '.join(words)
  if TYPE.fullmatch(spoken) and any(OTHER_TYPE.fullmatch(text) for text in texts):
    return True
  while words and words[-1] in CARRIER:
    words.pop()
  if not words:
    return bool(ALONE.fullmatch(spoken))
  named = ALONE.fullmatch(' '.join(words)) or ALONE.fullmatch(spoken)
  if not named and not MEDIA.fullmatch(words[-1]) and words[-2:] not in (['point', 'cloud'], ['point', 'clouds']):
    return False
  if isinstance(value, (bool, int, float)):  # a number of them, or whether there are some
    return spoken == words[0]
  return not set(words[:-1]) & set(NOT_THE_THING)


def _texts(value: Any) -> Iterator[str]:
  """The texts of a value and of the list that it may be."""
  return (entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str))


def _same_picture(text: str, picture: Any) -> bool:
  """Whether a text names the sample's picture once more, with or without its folders."""
  return isinstance(picture, str) and os.path.basename(text) == os.path.basename(picture) != ''


def _words(name: str) -> list[str]:
  """`leftImages_2` -> left, images."""
  apart = re.sub(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Za-z])(?=\d)', ' ', name.replace('base64', 'b64').replace('Base64', 'B64'))
  words = [word.lower() for word in re.split(r'[\W_]+', apart.replace('b 64', 'b64').replace('B 64', 'b64')) if word]
  while len(words) > 1 and words[-1].isdigit():
    words.pop()
  return words
