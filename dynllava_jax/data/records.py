"""LLaVA's JSON as records, and what is looked at in every record before it may be trained on."""

import dataclasses
import json
import os
import pathlib
import reprlib
from typing import Any

import numpy as np

from dynllava_jax.config import IGNORE, IMAGE_ID
from dynllava_jax.data.batches import render_turns
from dynllava_jax.data.conversation import Template, encode
from dynllava_jax.data.fields import OF_SAMPLE, OF_TURN, is_empty, is_no_picture, other_content, unused
from dynllava_jax.data.images import MAX_BYTES, decode
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.tokenizer import BOS, EOS, UNK, Tokenizer
from dynllava_jax.display import printable
from dynllava_jax.files import below, check_regular, decoded, read_regular
from dynllava_jax.paths import Given, is_local

BLANKS = ' \t\r\n\ufeff'  # of JSON, and the mark that is left where files were put together
IN_MEMORY = 4  # bytes per byte of JSON, at least
LONGEST_NAME = 200  # characters of an id in messages


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
  """Entries of a JSON array, or one per line of a `.jsonl` file that holds none, unchecked. See `files.decoded`.

  Raises:
    DataError: the file is no JSON, or no list, with the line; or so large that it would not fit into memory.
  """
  try:
    check_regular(path)
    size, memory = path.stat().st_size, os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if IN_MEMORY * size > memory:
      need = f'{IN_MEMORY * size / 1e9:,.0f} GB of memory to be read, this machine has {memory / 1e9:,.0f}'
      raise DataError(f'{path}: takes some {need}; split it')
    text = decoded(path.read_bytes())
  except OSError as e:
    raise DataError(f'{path}: cannot be read ({e.strerror}); expected a JSON or JSONL file') from None
  except UnicodeDecodeError as e:
    raise DataError(f'{path}: not UTF-8 text ({e.reason} at byte {e.start:,})') from None
  lined = path.suffix in ('.jsonl', '.ndjson')
  by_line = lined and not text.lstrip(BLANKS).startswith('[')  # a list is one, whatever it is called
  lines = enumerate(text.split('\n'), 1) if by_line else [(1, text)]
  out = []
  for number, line in lines:
    line = line.strip(BLANKS)
    if not line:
      continue
    try:
      entry = json.loads(line)
    except json.JSONDecodeError as e:
      hint = '; one object per line is read from a file called .jsonl' if e.msg == 'Extra data' and not lined else ''
      raise DataError(f'{path}, line {number + e.lineno - 1}: no JSON ({e.msg}, column {e.colno}){hint}') from None
    except RecursionError:
      raise DataError(f'{path}, line {number}: nested too deeply for a list of samples') from None
    except ValueError as e:  # an integer of thousands of digits
      raise DataError(f'{path}, line {number}: cannot be read ({e})') from None
    out.append(entry)
  if not by_line:
    out = out[0] if out else None
    if not isinstance(out, list):
      raise DataError(f'{path}: expected a list of samples, found {type(out).__name__}')
  return out


def entry_name(entry: Any, source: str, number: int) -> str:
  """The id of an entry, fit to be printed; its place in the source if it has none."""
  given = entry.get('id') if isinstance(entry, dict) else None
  if is_empty(given) or isinstance(given, (list, dict)):
    return f'{source}#{number}'
  name = printable(str(given).encode(errors='replace').decode())
  return name if len(name) <= LONGEST_NAME else f'{name[:LONGEST_NAME]}... ({source}#{number})'


def parse(entry: Any, source: str, number: int) -> Record:
  """Checks the structure of one entry; DataError if it is none of LLaVA's, or holds what the model does not take."""
  name = entry_name(entry, source, number)
  where = f'sample {name} (number {number} of {source})'
  if not isinstance(entry, dict) or not isinstance(entry.get('conversations'), list):
    raise DataError(f'{where}: expected an object with a list "conversations"')
  for i, turn in enumerate(entry['conversations']):
    if not isinstance(turn, dict) or not isinstance(turn.get('from'), str) or not isinstance(turn.get('value'), str):
      raise DataError(f'{where}, turn {i}: expected {{"from": ..., "value": ...}} with texts, found {_shown(turn)}')
    if found := other_content(turn, OF_TURN):
      message = f'{where}, turn {i}: "{_shown(found.name)}" holds {_shown(found.value)}, which this model does not take'
      raise DataError(message, 'other_content')
  if found := other_content(entry, OF_SAMPLE):
    message = (
      f'{where}: "{_shown(found.name)}" holds {_shown(found.value)}, which this model does not take; a picture belongs in "image"'
    )
    raise DataError(message, 'other_content')
  image = entry.get('image')
  if isinstance(image, list) and len(image) == 1:
    image = image[0]
  if isinstance(image, list) and len(image) > 1:
    raise DataError(f'{where}: {len(image)} images, one is supported', 'several_images')
  image = '' if is_empty(image) else image
  if not isinstance(image, str):
    raise DataError(f'{where}: "image" is {_shown(image)}, expected a path; leave the key out for text')
  if is_no_picture(image):
    raise DataError(f'{where}: "image" is {_shown(image)}, which is no picture', 'other_content')
  turns = tuple({'from': t['from'], 'value': t['value']} for t in entry['conversations'])
  for what in (str(entry.get('id', ''))[:LONGEST_NAME], image, *(t['value'] for t in turns)):
    if any('\ud800' <= c <= '\udfff' for c in what):  # JSON can hold half of a character, UTF-8 cannot
      raise DataError(f'{where}: holds half of a surrogate pair, which is no text')
  return Record(name, source, image, turns)


def unused_fields(entry: Any) -> list[str]:
  """Names of what a parsed entry holds besides LLaVA's fields, those of turns as `turn.NAME`."""
  in_turns = {f'turn.{name}' for turn in entry['conversations'] for name in unused(turn, OF_TURN)}
  return unused(entry, OF_SAMPLE) + sorted(in_turns)


def _shown(value: Any) -> str:
  """Anything that JSON can hold, on one line and short, however deep it is."""
  return printable(reprlib.repr(value))[:80] if not isinstance(value, str) else printable(value)[:80]


def read_image(record_id: str, path: str, root: Given, allow_outside: bool = False) -> bytes:
  """The bytes of an image file.

  Args:
    record_id: for messages.
    path: as it stands in the data.
    root: the folder it starts from, and must stay in once `..` and links are followed, unless `allow_outside`.

  Raises:
    DataError: there is none, it lies outside, or it is none that ends, such as a pipe.
  """
  shown = printable(path)
  try:
    if not is_local(root):
      return _of_store(root, path)
    return read_regular(root / path if allow_outside else below(root, path), MAX_BYTES)
  except OSError as e:
    raise DataError(f'sample {record_id}: image {root / shown} cannot be read ({e.strerror})', 'missing_image') from None
  except ValueError as e:
    if '\0' in path:
      raise DataError(f'sample {record_id}: image {root / shown} cannot be read ({e})', 'missing_image') from None
    hint = 'if that is meant, --allow_outside (config.data.allow_outside) reads it'
    raise DataError(f'sample {record_id}: image {shown}: {e}; {hint}', 'outside_image') from None


def _of_store(root: Given, path: str) -> bytes:
  """As `read_image`, from an object store, which knows no links and resolves no `..`."""
  if path.startswith('/') or '..' in path.split('/') or '://' in path:
    raise ValueError(f'it lies outside of {root}')
  return (root / path).read_bytes()


def examine(
  record: Record, *, style: Template, tokenizer: Tokenizer | None, images: Given | None, allow_outside: bool = False
) -> Finding:
  """Everything that can be found out about one record without a bucket.

  Args:
    record: the sample.
    style: its template.
    tokenizer: None leaves the tokens uncounted, and takes LLaMA's special tokens for granted.
    images: root of the image files; None leaves them alone.
    allow_outside: see `read_image`.
  """
  has_image = bool(record.image_path)
  about = {'id': record.id, 'source': record.source, 'has_image': has_image}
  try:
    special = tokenizer.special if tokenizer else (BOS, EOS, UNK)
    text, spans = render_turns(record.id, record.conversations, has_image, style=style, special=special)
    if not spans or spans[-1][1] != len(text):
      raise DataError(f'sample {record.id}: no supervised token at its end; does it end with an answer?', 'no_supervised_token')
    if has_image and images is not None:
      content = read_image(record.id, record.image_path, images, allow_outside)
      decode(content, f'sample {record.id}: image {printable(record.image_path)}')
  except DataError as e:
    return Finding(**about, reason=e.reason, message=str(e))
  if tokenizer is None:
    return Finding(**about)
  encoded = encode(text, spans, tokenizer)
  image = int(np.argmax(encoded.ids == IMAGE_ID))  # 0 without one
  reach = image + int(np.argmax(encoded.labels[image:] != IGNORE)) + 1
  return Finding(**about, tokens=len(encoded.ids), reach=reach)
