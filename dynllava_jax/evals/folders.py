"""Where benchmark data lies: LLaVA's layout of `playground/data/eval`, read with messages that name the file."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from dynllava_jax import paths, remote
from dynllava_jax.data.samples import DataError


@dataclasses.dataclass(frozen=True)
class Folder:
  """One benchmark's data.

  Attributes:
    root: what `--data` says.
    names: the benchmark's folder inside it; what lies directly in `root` is found too.
    labels: file or folder that replaces the labels' place in the layout, '' for none.
  """

  root: pathlib.Path
  names: tuple[str, ...]
  labels: str = ''

  def find(self, *relative: str) -> pathlib.Path | None:
    """The first of these paths that exists in the benchmark's folder or in `root`."""
    places = [self.root / name / path for name in self.names for path in relative] + [self.root / path for path in relative]
    return next((p for p in places if remote.here(p).exists()), None)

  def need(self, *relative: str) -> pathlib.Path:
    """As `find`; DataError with the places looked at if there is none."""
    found = self.find(*relative)
    if found is None:
      wanted = ' or '.join(str(self.root / self.names[0] / path) for path in relative)
      raise DataError(f'{wanted}: missing; `python eval.py --check_data --data={self.root}` says where to get it')
    return found

  def need_labels(self, *relative: str) -> pathlib.Path:
    """The labels: `labels` if given, else as `need`."""
    if not self.labels:
      return self.need(*relative)
    path = remote.fetched(paths.given(self.labels, 'config.labels'))
    if not path.exists():
      raise DataError(f'config.labels: {path} does not exist')
    return path


def read_text(path: pathlib.Path) -> str:
  """A text file, with or without a byte order mark; DataError if it is none."""
  try:
    return path.read_text(encoding='utf-8-sig')
  except IsADirectoryError:
    raise DataError(f'{path}: is a folder, expected a file') from None
  except UnicodeDecodeError as e:
    raise DataError(f'{path}: not UTF-8 text ({e})') from None


def read_json(path: pathlib.Path) -> Any:
  """Parsed JSON; DataError with file and place if it is none."""
  try:
    return json.loads(read_text(path))
  except json.JSONDecodeError as e:
    raise DataError(f'{path}: not JSON ({e})') from None


def read_lines(path: pathlib.Path, bad: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
  """One JSON object per line.

  Args:
    path: the file; blank lines are skipped.
    bad: told about each line that is no JSON object; if None such a line raises.

  Raises:
    DataError: no such file, or a bad line.
  """
  if not path.is_file():
    raise DataError(f'{path}: no such file')
  rows = []
  for number, line in enumerate(read_text(path).split('\n'), 1):  # splitlines would cut at U+2028 in a text
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      if not isinstance(row, dict):
        raise ValueError(f'expected an object, got {type(row).__name__}')
      rows.append(row)
    except ValueError as e:
      message = f'{path}, line {number}: not a JSON object ({e})'
      if bad is None:
        raise DataError(message) from None
      bad(message)
  return rows


def fields(row: dict[str, Any], names: tuple[str, ...], where: str) -> tuple:
  """Values of `row`; DataError naming what is missing."""
  if not isinstance(row, dict):
    raise DataError(f'{where}: expected an object, got {type(row).__name__}')
  missing = [n for n in names if n not in row]
  if missing:
    raise DataError(f'{where}: lacks {", ".join(missing)}; has {", ".join(row) or "nothing"}')
  return tuple(row[n] for n in names)
