"""What an entry holds besides LLaVA's own fields: content that this model would never see, or notes that do no harm.

A sample about a video or a second picture must not pass for one that can be trained on because its text can be.
"""

import math
import posixpath
import re
from collections.abc import Mapping
from typing import Any

OF_SAMPLE, OF_TURN = ('id', 'image', 'conversations'), ('from', 'value')
# Words of names and marks, lower case. `im` and the like mean a picture only beside a word of PARTS.
MEDIA = (
  r'images?|imgs?|pictures?|photos?|videos?|vids?|audios?|speech|speeches|sounds?|voices?|music|media|frames?|point[_ -]?clouds?'
)
SHORT = r'im|vi|vis|vision'
PARTS = (
  r'start|end|begin|of|bos|eos|pad|padding|soft|patch|patches|newline|context|tokens?|place[_ -]?holders?|here|features?|embeds?'
  r'|embeddings?|input|\d+'
)
CONTENT = re.compile(
  rf'{MEDIA}|clips?|movies?|gifs?|points|pdfs?|documents?|depth|masks?|wave[_ ]?forms?|spectrograms?|pixels?|base64|attachments?',
)
# Words that make a name a note about something: `video_id`, `image_size`, `num_frames`, `caption_of_image`.
NOTE = re.compile(
  r'ids?|sizes?|width|height|names?|source|split|num|number|counts?|licen[cs]e|captions?|descriptions?|types?|format|category|hash'
  r'|md5|sha\d*|score|quality|fps|rate|duration|length|index|ratio|resolution|channels?|tags?|labels?|title|date|author|dataset|has|is'
  r'|original|text|prompt|question|answer|info|meta|metadata|domain|topic|mode'
)
TALK = re.compile(r'system|system_?prompt|tools?|tool_?(?:calls?|choice|results?)|functions?|function_?calls?|history')
# A path or address of something to look at, to listen to or to read.
FILE = re.compile(
  r'\.(?:mp4|avi|mov|mkv|webm|m4v|mpe?g|3gpp?|flv|wmv|ogv|wav|mp3|flac|ogg|opus|m4a|aac|amr|aiff?|wma|npy|npz|pt|ply|pcd|las|glb|stl'
  r'|dcm|nii|h5|pkl|pdf|docx?|pptx?|xlsx?|jpe?g|jp2|png|webp|bmp|tiff?|gif|avif|hei[cf]|svg)(?:[?#]\S*)?$|^data:\w+/[\w.+-]+[;,]',
  re.IGNORECASE,
)
# Marks that stand for other content in a question, as other projects write them. An HTML element is no such mark: it has a
# closing tag, attributes, or is spoken of as one.
_BESIDE = rf'(?:{PARTS})[_ -]?'
_NAME = rf'(?:{_BESIDE})*(?:(?:{MEDIA})|(?:{SHORT})(?=[_ -]?(?:{PARTS})))(?:[_ -]?(?:{MEDIA}|{PARTS}))*'
_PIPED = _NAME.replace('im|', '')  # <|im_start|> is ChatML's
_FILED = FILE.pattern.replace('$', r'(?=[\s)<"\']|$)').replace('^', '')
MARK = re.compile(
  rf'<(?P<around>{MEDIA})>[^<\n]*?(?:{_FILED}|://)[^<\n]*</(?P=around)>|!\[[^\]\n]*\]\([^)\n]*?(?:{_FILED})[^)\n]*\)'
  rf'|<(?P<name>{_NAME})\s*/?>(?!\s*(?:tags?|elements?)\b)|<\|(?:{_PIPED})\|>|<(?:__\w*(?:{MEDIA})\w*__)>'
  rf'|\[(?:{MEDIA}|(?:{MEDIA})[_ -]?\d+)\](?!\()',
  re.IGNORECASE,
)
DEEPEST = 8  # levels of a nested field that are looked at
CODE = re.compile(r'```.*?(?:```|$)|`[^`\n]*`', re.S)


def is_empty(value: Any) -> bool:
  """Whether a field says that there is nothing: null, an empty text or list, or the NaN that tables leave."""
  return value is None or value in ('', [], {}) or (isinstance(value, float) and math.isnan(value))


def other_content(fields: Mapping[str, Any], known: tuple[str, ...]) -> str:
  """The name of a field that holds content which the model does not take, itself or further in; '' if there is none."""
  return _content({name: value for name, value in fields.items() if name not in known}, fields.get('image'), 1)


def _content(fields: Mapping[str, Any], picture: Any, level: int) -> str:
  for name, value in fields.items():
    if is_empty(value):
      continue
    of_content = _is_content(str(name))
    values = value if isinstance(value, list) else [value]
    shown = [v for v in values if isinstance(v, str) and FILE.search(v) and not _same(v, picture)]
    # A number, or the picture once more, under a name that only resembles one of content is a note.
    note = all(isinstance(v, (bool, int, float)) or _same(v, picture) for v in values) and not CONTENT.fullmatch(name.lower())
    if shown or (of_content and not note):
      return name
    inner = (_content(v, picture, level + 1) for v in values if isinstance(v, dict) and level < DEEPEST)
    if any(inner):
      return name
  return ''


def _is_content(name: str) -> bool:
  """Whether a field's name, `videoPath` and `image_2` alike, is one of content and not of a note about it."""
  spaced = re.sub(r'(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=\d)', '_', name).lower()
  words = re.split(r'[^a-z0-9]+', spaced)
  joined = '_'.join(words)
  if TALK.fullmatch(joined):
    return True
  return bool(re.search(rf'(?:^|_)(?:{CONTENT.pattern})(?:_|$)', joined)) and not any(NOTE.fullmatch(word) for word in words)


def _same(value: Any, picture: Any) -> bool:
  """Whether a field names the sample's own picture, with or without its folders."""
  return isinstance(value, str) and isinstance(picture, str) and posixpath.basename(value) == posixpath.basename(picture)


def other_mark(question: str) -> str:
  """The first mark in a question that stands for something other than its picture; '' if there is none."""
  prose = CODE.sub('', question)
  for found in MARK.finditer(prose):
    name = found['name']
    if found[0] != '<image>' and not (name and f'</{name}>' in question):
      return found[0]
  return ''


def unused(fields: Mapping[str, Any], known: tuple[str, ...]) -> list[str]:
  """Names of the other fields with something in them."""
  return [name for name, value in fields.items() if name not in known and not is_empty(value)]
