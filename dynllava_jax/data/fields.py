"""What an entry holds besides LLaVA's own fields: content that this model would never see, or notes that do no harm.

A sample about a video or a second picture must not pass for one that can be trained on because its text can be.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

OF_SAMPLE, OF_TURN = ('id', 'image', 'conversations'), ('from', 'value')
MEDIA = (
  r'videos?|clips?|frames?|audios?|speech|speeches|sounds?|voices?|music|images|imgs?|pictures?|photos?|point_?clouds?|points|pdfs?'
  r'|documents?|depth|masks?|image_?\d+'
)
# A field of such a name with something in it; `video_id` or `image_size` are notes.
CONTENT = re.compile(
  rf'(?:{MEDIA}|(?:image|{MEDIA})_?(?:paths?|files?|urls?|lists?)|system|system_prompt|tools|functions|history)', re.IGNORECASE
)
FILE = re.compile(
  r'\.(?:mp4|avi|mov|mkv|webm|m4v|mpe?g|flv|wmv|wav|mp3|flac|ogg|opus|m4a|aac|npy|npz|pt|ply|pcd|las|pdf'
  r'|jpe?g|png|webp|bmp|tiff?)$',
  re.IGNORECASE,
)
# Marks that stand for other content in a question, as other projects write them. An HTML element is no such mark.
MARK = re.compile(
  r'<(?P<name>video|audio|speech|sound|voice|music|point_?cloud|img|images|image|image_?placeholder'
  r'|image[_ -]?\d+|video[_ -]?\d+|audio[_ -]?\d+|frame[_ -]?\d+|imagehere|videohere)>(?!\s*(?:tags?|elements?)\b)'
  r'|<\|(?:vision_start|(?:image|video|audio|vision)_?(?:pad|bos|eos)?|(?:image|audio|video)_?\d+)\|>'
  r'|\[(?:IMG|VIDEO|AUDIO)\]',
  re.IGNORECASE,
)
CODE = re.compile(r'```.*?(?:```|$)|`[^`\n]*`', re.S)


def is_empty(value: Any) -> bool:
  """Whether a field says that there is nothing: null, an empty text or list, or the NaN that tables leave."""
  return value is None or value in ('', [], {}) or (isinstance(value, float) and math.isnan(value))


def other_content(fields: Mapping[str, Any], known: tuple[str, ...]) -> str:
  """The name of a field that holds content which the model does not take; '' if there is none."""
  picture = fields.get('image')
  for name, value in fields.items():
    if name in known or is_empty(value):
      continue
    values = value if isinstance(value, list) else [value]
    files = [v for v in values if isinstance(v, str) and FILE.search(v) and v != picture]
    note = isinstance(value, (bool, int, float)) and not CONTENT.fullmatch(name)
    if not note and (CONTENT.fullmatch(name) or files):
      return name
  return ''


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
