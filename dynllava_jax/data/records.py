"""LLaVA's JSON as records, and what is looked at in every record before it may be trained on."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from dynllava_jax.config import IGNORE, IMAGE_ID
from dynllava_jax.data.batches import render_turns
from dynllava_jax.data.conversation import Template, encode
from dynllava_jax.data.images import decode
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.tokenizer import BOS, EOS, UNK, Tokenizer
from dynllava_jax.paths import Given


@dataclasses.dataclass(frozen=True)
class Record:
  """A sample as it stands in the JSON file; `image_path` is '' without image."""

  id: str
  source: str
  image_path: str
  conversations: tuple[dict[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Finding:
  """What an examination of one record found.

  Attributes:
    reason: key of `samples.REASONS`, '' if the record can be used.
    message: the error, with id and turn.
    tokens: ids of the whole sample, the image counted as one; 0 if they were not counted.
    reach: so many of them must be left, if it is cut, for an image and a supervised token after it to remain.
    has_image: whether it names an image.
  """

  id: str
  source: str
  reason: str = ''
  message: str = ''
  tokens: int = 0
  reach: int = 0
  has_image: bool = False


def read_json(path: pathlib.Path) -> list[Any]:
  """Entries of a JSON array, or one per line of a `.jsonl` file, unchecked.

  Raises:
    DataError: the file is no JSON, or no list; with the line.
  """
  try:
    text = path.read_text(encoding='utf-8-sig')
  except UnicodeDecodeError as e:
    raise DataError(f'{path}: not UTF-8 text ({e})') from None
  lines = enumerate(text.split('\n'), 1) if path.suffix == '.jsonl' else [(1, text)]
  out = []
  for number, line in lines:
    if not line.strip():
      continue
    try:
      entry = json.loads(line)
    except json.JSONDecodeError as e:
      raise DataError(f'{path}, line {number + e.lineno - 1}: no JSON ({e.msg}, column {e.colno})') from None
    except RecursionError:
      raise DataError(f'{path}, line {number}: nested too deeply for a list of samples') from None
    except ValueError as e:  # an integer of thousands of digits
      raise DataError(f'{path}, line {number}: cannot be read ({e})') from None
    out.append(entry)
  if path.suffix != '.jsonl':
    out = out[0] if out else None
    if not isinstance(out, list):
      raise DataError(f'{path}: expected a list of samples, found {type(out).__name__}')
  return out


def entry_name(entry: Any, source: str, number: int) -> str:
  """The id of an entry, fit to be printed; its place in the source if it has none."""
  given = entry.get('id') if isinstance(entry, dict) else None
  return f'{source}#{number}' if given is None else str(given).encode(errors='replace').decode()


def parse(entry: Any, source: str, number: int) -> Record:
  """Checks the structure of one entry; DataError if it is none of LLaVA's."""
  name = entry_name(entry, source, number)
  where = f'sample {name} (number {number} of {source})'
  if not isinstance(entry, dict) or not isinstance(entry.get('conversations'), list):
    raise DataError(f'{where}: expected an object with a list "conversations"')
  for i, turn in enumerate(entry['conversations']):
    if not isinstance(turn, dict) or not isinstance(turn.get('from'), str) or not isinstance(turn.get('value'), str):
      raise DataError(f'{where}, turn {i}: expected {{"from": ..., "value": ...}} with texts, found {str(turn)[:80]}')
  image = entry.get('image', '')
  if isinstance(image, list) and len(image) == 1:
    image = image[0]
  if isinstance(image, list):
    raise DataError(f'{where}: {len(image)} images, one is supported', 'several_images')
  if not isinstance(image, str) or ('image' in entry and not image):
    raise DataError(f'{where}: "image" is {image!r}, expected a path; leave the key out for text')
  turns = tuple({'from': t['from'], 'value': t['value']} for t in entry['conversations'])
  for what in (str(entry.get('id', '')), image, *(t['value'] for t in turns)):
    if any('\ud800' <= c <= '\udfff' for c in what):  # JSON can hold half of a character, UTF-8 cannot
      raise DataError(f'{where}: holds half of a surrogate pair, which is no text')
  return Record(name, source, image, turns)


def read_image(record_id: str, path: str, root: Given) -> bytes:
  """The bytes of an image file; DataError if there is none."""
  try:
    return (root / path).read_bytes()
  except (OSError, ValueError) as e:  # ValueError: a path with a NUL in it
    why = e.strerror if isinstance(e, OSError) else e
    raise DataError(f'sample {record_id}: image {root / path} cannot be read ({why})', 'missing_image') from None


def examine(record: Record, *, style: Template, tokenizer: Tokenizer | None, images: Given | None) -> Finding:
  """Everything that can be found out about one record without a bucket.

  Args:
    record: the sample.
    style: its template.
    tokenizer: None leaves the tokens uncounted, and takes LLaMA's special tokens for granted.
    images: root of the image files; None leaves them alone.
  """
  has_image = bool(record.image_path)
  about = {'id': record.id, 'source': record.source, 'has_image': has_image}
  try:
    special = tokenizer.special if tokenizer else (BOS, EOS, UNK)
    text, spans = render_turns(record.id, record.conversations, has_image, style=style, special=special)
    if not spans or spans[-1][1] != len(text):
      raise DataError(f'sample {record.id}: no supervised token at its end; does it end with an answer?', 'no_supervised_token')
    if has_image and images is not None:
      decode(read_image(record.id, record.image_path, images), f'sample {record.id}: image {record.image_path}')
  except DataError as e:
    return Finding(**about, reason=e.reason, message=str(e))
  if tokenizer is None:
    return Finding(**about)
  encoded = encode(text, spans, tokenizer)
  image = int(np.argmax(encoded.ids == IMAGE_ID))  # 0 without one
  reach = image + int(np.argmax(encoded.labels[image:] != IGNORE)) + 1
  return Finding(**about, tokens=len(encoded.ids), reach=reach)
