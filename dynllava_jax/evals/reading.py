"""Text, JSON and JSON lines as other tools write them: any byte order mark, and messages that name file and line.

What is no file of sensible size, such as a pipe or a device, is refused before it is opened. JSON's `NaN` and `Infinity`, which
Python would read, are no JSON and no number that a score may come from.
"""

import contextlib
import json
import math
import pathlib
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from dynllava_jax.data.samples import DataError
from dynllava_jax.files import decoded, read_regular

LONGEST = 200  # characters of a list of names in a message
BLANKS = ' \t\r\n\ufeff'
Kind = type | tuple[type, ...]
ID: Kind = (str, int)
WORDS = {str: 'a text', int: 'a whole number', ID: 'a text or a whole number', list: 'a list', dict: 'an object'}
WORDS |= {(str, list): 'a text or a list of texts'}
LARGEST = 4 * 2**30  # bytes; the largest benchmark file, a table with its pictures inside, has a twentieth of it


def read_text(path: pathlib.Path) -> str:
  """A text file, see `files.decoded`.

  Raises:
    DataError: no such file, no regular one, larger than `LARGEST`, or no text.
  """
  try:
    content = read_regular(path, LARGEST)
  except FileNotFoundError:
    raise DataError(f'{path}: no such file; is the name right?') from None
  except OSError as e:
    why = 'is a folder, expected a file' if path.is_dir() else f'cannot be read ({e.strerror})'
    raise DataError(f'{path}: {why}; is it the right file?') from None
  try:
    return decoded(content)
  except UnicodeDecodeError as e:
    raise DataError(f'{path}: not UTF-8 text ({e}); get the file again, or save it as UTF-8') from None


def read_json(path: pathlib.Path) -> Any:
  """Parsed JSON; DataError with file and place if it is none."""
  try:
    return _parsed(read_text(path))
  except ValueError as e:
    raise DataError(f'{path}: not JSON ({e}); get the file again') from None


def read_objects(path: pathlib.Path) -> Mapping[str, Any]:
  """A JSON object; DataError if it is something else."""
  content = read_json(path)
  if not isinstance(content, dict):
    raise DataError(f'{path}: holds {_kind(content)}, expected a JSON object; is it the right file?')
  return content


def read_list(path: pathlib.Path) -> list[Any]:
  """A JSON list, or one object per line whatever the file is called; DataError if it is something else."""
  try:
    content = read_json(path)
  except DataError:
    bad: list[str] = []
    rows = read_lines(path, bad.append)
    if bad or len(rows) < 2:
      raise
    return rows
  if not isinstance(content, list):
    raise DataError(f'{path}: holds {_kind(content)}, expected a JSON list; is it the right file?')
  return content


def read_lines(path: pathlib.Path, bad: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
  """One JSON object per line, or a list of them.

  Args:
    path: the file; blank lines are skipped.
    bad: told about each line that is no JSON object; if None such a line raises.

  Raises:
    DataError: as `read_text`, or a bad line.
  """
  rows, text = [], read_text(path)
  if text.lstrip(BLANKS).startswith('['):
    with contextlib.suppress(ValueError):
      if isinstance(whole := _parsed(text.strip(BLANKS)), list) and all(isinstance(row, dict) for row in whole):
        return whole
  for number, line in enumerate(text.split('\n'), 1):  # splitlines would cut at U+2028 in a text
    line = line.strip(BLANKS)  # the mark is left inside, of a file that was put together from several
    if not line:
      continue
    try:
      row = _parsed(line)
      if not isinstance(row, dict):
        raise ValueError(f'expected an object, got {_kind(row)}')
      rows.append(row)
    except ValueError as e:
      message = f'{path}, line {number}: not a JSON object ({e})'
      if bad is None:
        raise DataError(f'{message}; get the file again, or mend the line') from None
      bad(message)
  return rows


def fields(row: Any, kinds: Mapping[str, Kind], where: str) -> tuple:
  """Values of `row` by name; DataError naming what is missing, null, or not of its kind (a key of `WORDS`)."""
  if not isinstance(row, dict):
    raise DataError(f'{where}: expected an object, got {_kind(row)}; is it the right file?')
  missing = [n for n in kinds if row.get(n) is None]
  if missing:
    present = ', '.join(row) or 'nothing'
    present = present if len(present) < LONGEST else f'{present[:LONGEST]}...'
    raise DataError(f'{where}: lacks {", ".join(missing)}; has {present}; is it the right file?')
  return tuple(_checked(row[name], name, kind, where) for name, kind in kinds.items())


def check_label(text: str, where: str) -> str:
  """The text; DataError if it is blank: an answer would be right that says nothing."""
  if not text.strip():
    raise DataError(f'{where}: the label is {text!r}, expected an answer; leave the question out, or get the file again')
  return text


def optional(row: Mapping[str, Any], name: str, kind: Kind, where: str) -> Any:
  """A value of `row` as `fields` checks it; None if it is absent or null."""
  return None if row.get(name) is None else _checked(row[name], name, kind, where)


def _checked(value: Any, name: str, kind: Kind, where: str) -> Any:
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    raise DataError(f'{where}: {name} is {reprlib.repr(value)}, expected {WORDS[kind]}; is it the right file?')
  return value


def _parsed(text: str) -> Any:
  try:
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)
  except RecursionError:
    raise ValueError('lists or objects inside each other without end') from None


def _refuse(name: str) -> None:
  raise ValueError(f'{name} is no number')


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise ValueError(f'{text} is too large')
  return value


def _kind(value: Any) -> str:
  names = {dict: 'an object', list: 'a list', str: 'a text', bool: 'true or false', type(None): 'null'}
  return names.get(type(value), 'a number')
