"""What the entries of a record's `meta.json` are to be: whoever reads one says so, and another kind is one line that names it."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from dynllava_jax.convert.inputs import ConversionError


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of entry: what it is called, and whether a value is of it."""

  name: str
  holds: Callable[[Any], bool]


def _whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _number(value: Any) -> bool:
  return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def every(kind: Kind, of: str) -> Kind:
  """Lists of that kind."""
  return Kind(of, lambda value: isinstance(value, list) and all(map(kind.holds, value)))


TEXT = Kind('text', lambda value: isinstance(value, str))
NAME = Kind('a name', lambda value: isinstance(value, str) and value.strip() not in ('', '.', '..', '/'))
FLAG = Kind('true or false', lambda value: isinstance(value, bool))
WHOLE = Kind('a whole number', _whole)
NUMBER = Kind('a number', _number)
GROUP = Kind('an object with named entries', lambda value: isinstance(value, dict))
WHOLES = every(WHOLE, 'a list of whole numbers')
NUMBERS = every(NUMBER, 'a list of numbers')
ANY = Kind('anything', lambda value: True)

# What every record may have, and what it is in all of them.
ENTRIES = {
  'method': NAME,
  **dict.fromkeys(('paper', 'source', 'checked_by', 'checked_note', 'margin_note', 'input', 'definition', 'weights'), TEXT),
  **dict.fromkeys(('base_models', 'configs', 'hyper', 'arrays', 'shapes', 'margins', 'checks', 'checked'), GROUP),
  **dict.fromkeys(('patches', 'patched'), every(TEXT, 'a list of texts')),
  **dict.fromkeys(('new_tokens', 'image_start', 'seed'), WHOLE),
}


def read(at: pathlib.Path, name: str, value: Any, kind: Kind) -> Any:
  """`value` of the entry `name` of the file `at`, a list as a tuple; ConversionError if it is of another kind."""
  if not kind.holds(value):
    shown = repr(value)
    raise ConversionError(f'{at}: {name} is {shown if len(shown) < 80 else shown[:70] + " ..."}, expected {kind.name}')
  return tuple(value) if isinstance(value, list) else value


def entries(group: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
  """Every entry of a group and of the groups in it: (names from the outermost on, value)."""
  for name, value in group.items():
    yield (*at, name), value
    if isinstance(value, dict):
      yield from entries(value, (*at, name))


def check_entries(at: pathlib.Path, meta: dict[str, Any]) -> None:
  """ConversionError unless the entries that every record may have are what they are in all of them."""
  for name, kind in ENTRIES.items():
    if name in meta:
      read(at, name, meta[name], kind)
