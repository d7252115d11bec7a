"""Damaged records: every entry of `meta.json` and array of `case.npz` replaced by something odd, and what `--verify` makes of it.

    python tests/methods/damaged_records.py FOLDER BASES [NAME ...]

tries them all on the records called so below FOLDER and lists what was not as it is to be. Models are built and programs compiled
once, so that a damage costs a fraction of a second.
"""

import contextlib
import copy
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dynllava_jax.command_line import expected
from dynllava_jax.convert import verify
from dynllava_jax.convert.records import bases, compressors, kv, layers, reducer_arrays, reducers, selectors
from dynllava_jax.convert.records import reduction as reduction_module
from dynllava_jax.convert.records.bases import Record, open_record
from dynllava_jax.convert.records.reduction import Reduction
from dynllava_jax.convert.records.runs import Runner

ODD = (None, True, 7, -1, 2.5, float('inf'), 10**12, '', 'x', [], [None], ['x', 1], [[1]], {}, {'x': 1})
# What is said of a record and decides nothing: of the right kind it may be anything.
SAID = {
  *('paper', 'source', 'checked_by', 'checked_note', 'patches', 'patched', 'margins', 'margin_note', 'smallest_margin', 'checks'),
  *('checked', 'arrays', 'shapes', 'definition', 'seed', 'new_tokens', 'image_start', 'layer_indexing', 'R', 'decoder'),
  *('duplicates', 'weights', 'r_total', 'image_tokens', 'kept', 'user_marker', 'note', 'layer', 'bos', 'eos', 'text_positions'),
  *('input', 'ratio'),
}


@dataclasses.dataclass(frozen=True)
class Damage:
  """What is done to a record: to which entry or array, and how it is called."""

  name: str
  how: str
  apply: Callable[[dict, dict], None]


def of_meta(meta: dict[str, Any]) -> Iterator[Damage]:
  """Every entry, and every entry of a group in it, missing or of another kind."""

  def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    for key in value if isinstance(value, dict) and len(at) < 3 else ():
      yield (*at, key)
      yield from paths(value[key], (*at, key))

  def change(path: tuple, odd: Any, drop: bool = False):
    def apply(meta: dict, case: dict) -> None:
      group = meta
      for key in path[:-1]:
        group = group[key]
      if drop:
        del group[path[-1]]
      else:
        group[path[-1]] = odd

    return apply

  for path in paths(meta):
    if path[0] in SAID and len(path) > 1 and path[0] != 'margins':
      continue
    name = '/'.join(path)
    yield Damage(name, 'missing', change(path, None, drop=True))
    for odd in ODD:
      yield Damage(name, f'= {odd!r}', change(path, odd))
    value = meta
    for key in path:
      value = value[key]
    if isinstance(value, list) and value:
      yield Damage(name, 'longer', change(path, [*value, value[-1]]))
      yield Damage(name, 'shorter', change(path, value[:-1]))


ARRAYS: dict[str, Callable[[np.ndarray], Any]] = {
  'missing': lambda x: None,
  'a number': lambda x: np.asarray(x.reshape(-1)[0]),
  'another rank': lambda x: x[None],
  'flat': lambda x: x.reshape(-1) if x.ndim != 1 else x[:, None],
  'shorter': lambda x: x[:-1] if x.ndim else np.zeros(0, x.dtype),
  'without its first': lambda x: x[1:] if x.ndim else np.zeros(0, x.dtype),
  'longer': lambda x: np.concatenate([x, x[-1:]]) if x.ndim else np.stack([x, x]),
  'narrower': lambda x: x[..., :-1] if x.ndim > 1 else x[:0] if x.ndim else x[None],
  'empty': lambda x: np.zeros((0,), x.dtype),
  'whole numbers': lambda x: np.round(x * 3).astype(np.int64) if x.dtype.kind == 'f' else x.astype(np.int64) + 1,
  'fractions': lambda x: x.astype(np.float64) + 0.25,
  'truth values': lambda x: x.astype(bool) if x.dtype.kind != 'b' else ~x,
  'texts': lambda x: x.astype(str),
  'complex': lambda x: x.astype(np.complex64) + 1j,
  'not a number': lambda x: np.full(x.shape, np.nan, np.float32),
  'one not a number': lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, np.nan, x),
  'infinite': lambda x: np.full(x.shape, np.inf, np.float32),
  'huge': lambda x: np.full(x.shape, 2**40),
  'negative': lambda x: -1 - np.abs(x.astype(np.float64)).astype(x.dtype if x.dtype.kind != 'b' else int),
  'zeros': lambda x: np.zeros_like(x) if x.any() else np.ones_like(x),
}


def of_case(case: dict[str, np.ndarray]) -> Iterator[Damage]:
  """Every array, missing or in another form."""

  def change(name: str, make: Callable):
    def apply(meta: dict, case: dict) -> None:
      made = make(case[name])
      case.pop(name)
      if made is not None:
        case[name] = made

    return apply

  for name in case:
    for how, make in ARRAYS.items():
      yield Damage(name, how, change(name, make))


def outcome(record: Record, damage: Damage, folder: pathlib.Path) -> str:
  """'' if it is as it is to be: an error of one line with file and name, or a quantity that differs; else what it was.

  Args:
    record: as it was recorded; folder: where the damaged one is written.
  """
  meta, case = copy.deepcopy(record.meta), dict(record.case)
  damage.apply(meta, case)
  (folder / 'meta.json').write_text(json.dumps(meta))
  np.savez(folder / 'case.npz', **case)
  try:
    damaged = open_record(folder, record.bases)
    found = list(verify.verify_method(damaged))
  except Exception as e:
    if not expected(e):
      return f'{type(e).__name__}: {traceback.format_exc(limit=-3)}'
    told, last = str(e), damage.name.rpartition('/')[2]
    if '\n' in told:
      return f'several lines: {told}'
    named = any(f'{folder}/{file}' in told for file in ('meta.json', 'case.npz')) and last in told
    other = 'in the record, expected' in told  # of an array whose shape follows from the damaged one, or from a setting
    return '' if named or other else f'does not name it: {told}'
  if not found or not all(q.ok for q in found):
    return ''
  if damage.name not in record.case:
    return '' if {damage.name.partition('/')[0], damage.name.rpartition('/')[2]} & SAID else 'agrees'
  now, was = case.get(damage.name), record.case[damage.name]
  same = now is not None and now.shape == was.shape and np.array_equal(now, was, equal_nan=now.dtype.kind == 'f')
  explained = 'nothing here knows of it' not in verify.why_left(record, [damage.name])
  last_rows = damage.how == 'without its first' and damage.name.endswith('/logits')  # which is all that some records hold
  return '' if same or explained or last_rows else 'agrees'


class KeptRunner(Runner):
  """Answers what it was asked before from memory."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.known: dict[tuple, Any] = {}

  def answer(self, asked, steps, text=0):
    key = (tuple(map(_content, asked)), steps, text)
    if key not in self.known:
      self.known[key] = super().answer(asked, steps, text)
    return self.known[key]

  def uncached(self, asked, tokens):
    key = (tuple(map(_content, asked)), tokens.tobytes(), tokens.shape)
    if key not in self.known:
      self.known[key] = super().uncached(asked, tokens)
    return self.known[key]


class KeptReduction(Reduction):
  """The same of a reducer and what is behind it."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.known: dict[tuple, Any] = {}

  def __call__(self, prompts, steps):
    key = (tuple(map(_content, prompts)), tuple(steps))
    if key not in self.known:
      self.known[key] = super().__call__(prompts, steps)
    return self.known[key]

  def tower(self, prompts):
    key = ('tower', tuple(map(_content, prompts)))
    if key not in self.known:
      self.known[key] = super().tower(prompts)
    return self.known[key]


def _content(prompt: Any) -> tuple:
  """The fields of a prompt, to tell it from others."""
  arrays = (getattr(prompt, field.name) for field in dataclasses.fields(prompt))
  return tuple(None if a is None else (a.shape, a.dtype.str, np.asarray(a).tobytes()) for a in arrays)


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
  """Bases, runners and reductions are made once for each that is different."""
  made: dict[tuple, tuple] = {}

  def once(cls: type) -> Callable:
    def make(*args, **kwargs):
      given = (*args, *kwargs.values())
      key = (cls, *(id(a) if isinstance(a, (dict, bases.Base)) else repr(a) for a in given))
      if key not in made:
        made[key] = cls(*args, **kwargs), given  # which stay, so that nothing else gets their addresses
      return made[key][0]

    return make

  def base(record: Record, named: str, vision: str | None = None):
    key = (record.find(named).resolve(), vision and record.find(vision).resolve())
    if key not in made:
      made[key] = (load(record, named, vision),)
    return made[key][0]

  load = Record.base
  runner, reduction = once(KeptRunner), once(KeptReduction)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Record, 'base', base)
    for module in (compressors, kv, layers, selectors, reduction_module):
      patch.setattr(module, 'Runner', runner)
    for module in (reducers, reducer_arrays):
      patch.setattr(module, 'Reduction', reduction)
    yield


def damages(record: Record) -> Iterator[Damage]:
  """All of a record."""
  yield from of_meta(record.meta)
  yield from of_case(record.case)


def main(folder: str, over: str, *names: str) -> None:
  """Lists what was not as it is to be."""
  with kept_programs(), tempfile.TemporaryDirectory() as scratch:
    for name in names or sorted(p.name for p in pathlib.Path(folder).iterdir()):
      record, tried, began = open_record(pathlib.Path(folder) / name, pathlib.Path(over)), 0, time.time()
      if record.method not in verify.OF_METHODS:
        continue
      for damage in damages(record):
        tried += 1
        if said := outcome(record, damage, pathlib.Path(scratch)):
          print(f'{name}: {damage.name} {damage.how}: {said}', flush=True)
      print(f'{name}: {tried} damages, {time.time() - began:.0f} s', flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
