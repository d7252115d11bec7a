"""Text, JSON and JSON lines as other tools write them: any byte order mark, and messages that name file and line.

What is no file of sensible size, such as a pipe or a device, is refused before it is opened. JSON's `NaN` and `Infinity`, which
Python would read, are no JSON and no number that a score may come from.
"""

import codecs
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from dynllava_jax.data.samples import DataError
from dynllava_jax.files import read_regular

LARGEST = 4 * 2**30  # bytes; the largest benchmark file, a table with its pictures inside, has a twentieth of it
MARKS = (  # of UTF-32 before UTF-16, whose mark it begins with
  (codecs.BOM_UTF8, 'utf-8-sig'),
  (codecs.BOM_UTF32_LE, 'utf-32'),
  (codecs.BOM_UTF32_BE, 'utf-32'),
  (codecs.BOM_UTF16_LE, 'utf-16'),
  (codecs.BOM_UTF16_BE, 'utf-16'),
)


def read_text(path: pathlib.Path) -> str:
  """A text file: UTF-8, or what its byte order mark says.

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
  encoding = next((name for mark, name in MARKS if content.startswith(mark)), 'utf-8')
  try:
    return content.decode(encoding)
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
  """A JSON list; DataError if it is something else."""
  content = read_json(path)
  if not isinstance(content, list):
    raise DataError(f'{path}: holds {_kind(content)}, expected a JSON list; is it the right file?')
  return content


def read_lines(path: pathlib.Path, bad: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
  """One JSON object per line.

  Args:
    path: the file; blank lines are skipped.
    bad: told about each line that is no JSON object; if None such a line raises.

  Raises:
    DataError: as `read_text`, or a bad line.
  """
  rows = []
  for number, line in enumerate(read_text(path).split('\n'), 1):  # splitlines would cut at U+2028 in a text
    line = line.strip().removeprefix('\ufeff')  # of a file that was put together from several
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


def fields(row: Any, names: tuple[str, ...], where: str) -> tuple:
  """Values of `row`; DataError naming what is missing or null."""
  if not isinstance(row, dict):
    raise DataError(f'{where}: expected an object, got {_kind(row)}; is it the right file?')
  missing = [n for n in names if row.get(n) is None]
  if missing:
    raise DataError(f'{where}: lacks {", ".join(missing)}; has {", ".join(row) or "nothing"}; is it the right file?')
  return tuple(row[n] for n in names)


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
