"""A damaged record gives one line that names file and entry, or a quantity that differs: never a traceback, never agreement."""

import numpy as np
import pytest
from conftest import GOLDEN
from damaged_records import damages, kept_programs, outcome

from dynllava_jax.config import IMAGE_ID
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import EXACT, Mismatch, compare, given, load_case, token_ids
from dynllava_jax.convert.records.bases import open_record
from dynllava_jax.convert.records.described import ENTRIES, GROUP, NUMBER, WHOLE, WHOLES, read


@pytest.fixture(scope='module', autouse=True)
def programs():
  with kept_programs():
    yield


@pytest.mark.slow
def test_whatever_is_damaged_is_told_of(tmp_path):
  """All entries and arrays of a record; `damaged_records.py` as a program does it for others."""
  record = open_record(GOLDEN / 'methods' / 'fastervlm', GOLDEN)
  found = [(d.name, d.how, said) for d in damages(record) if (said := outcome(record, d, tmp_path))]
  assert found == []


def of_kind(value):
  return {WHOLE: 3, NUMBER: 2.5, WHOLES: [1, 2], GROUP: {}}.get(value)


@pytest.mark.parametrize('odd', [True, None, 'x', [1, 'x'], [[1]], float('nan'), float('inf'), 10**12])
@pytest.mark.parametrize('kind', [WHOLE, NUMBER, WHOLES, GROUP])
def test_an_entry_of_another_kind_is_named(kind, odd):
  with pytest.raises(ConversionError, match=rf'^meta.json: a/b is .*, expected {kind.name}$'):
    read('meta.json', 'a/b', odd, kind)
  assert read('meta.json', 'a/b', of_kind(kind), kind) in (3, 2.5, (1, 2), {})


@pytest.mark.parametrize('name', ENTRIES)
def test_entries_of_every_record_are_checked_when_it_is_opened(name, tmp_path):
  """Also those that nobody reads: a record whose `source` is a number is no record."""
  (tmp_path / 'meta.json').write_text(f'{{"method": "x", "{name}": 2.5}}')
  np.savez(tmp_path / 'case.npz', x=np.zeros(2))
  with pytest.raises(ConversionError, match=f'meta.json: {name} is 2.5, expected'):
    open_record(tmp_path, None)


def test_a_record_says_what_shapes_its_arrays_have(tmp_path):
  (tmp_path / 'meta.json').write_text('{"method": "x", "shapes": {"a/b": [2, 3]}}')
  for arrays, message in (({}, "array 'a/b' is missing"), ({'a/b': np.zeros((3, 2))}, r"'a/b' has shape \(3, 2\), and .*\(2, 3\)")):
    np.savez(tmp_path / 'case.npz', c=np.zeros(1), **arrays)
    with pytest.raises(ConversionError, match=message):
      open_record(tmp_path, None)


@pytest.mark.parametrize(
  'array, message',
  [
    (None, "'x' is missing"),
    (np.zeros(3), r"'x' has shape \(3,\), expected \(any, 2\)"),
    (np.zeros((2, 3)), r"'x' has shape \(2, 3\), expected \(any, 2\)"),
    (np.zeros((0, 2)), r"'x' has shape \(0, 2\)"),
    (np.zeros((1, 2)), "'x' holds float64, expected whole numbers"),
  ],
)
def test_arrays_that_something_is_computed_from(array, message):
  case = {} if array is None else {'x': array}
  with pytest.raises(ConversionError, match=f'^case.npz: array {message}'):
    given('case.npz', case, 'x', (None, 2), whole=True)


@pytest.mark.parametrize(
  'ids, message',
  [
    ([1, IMAGE_ID, 2, IMAGE_ID], 'holds -200 2 times, expected one image at most'),
    ([1, 64], 'holds 64, expected 0 to 63'),
    ([-1, 3], 'holds -1, expected 0 to 63'),
    ([IMAGE_ID], 'holds no text'),
    ([[1, 2], [3, 4]], r'has shape \(2, 2\), expected \(1, any\)'),
  ],
)
def test_recorded_prompts_are_prompts(ids, message):
  with pytest.raises(ConversionError, match=message):
    token_ids('case.npz', {'x': np.array(ids)}, 'x', 64)


def test_what_was_recorded_in_another_form_is_no_agreement(tmp_path):
  with pytest.raises(Mismatch, match=r'x has shape \(2, 1\) in the record, expected \(2,\)'):
    compare('x', np.zeros(2), np.zeros((2, 1)), 1.0)
  with pytest.raises(Mismatch, match='x is float32 in the record, expected whole numbers'):
    compare('x', np.arange(2), np.arange(2, dtype=np.float32), EXACT)
  assert not compare('x', np.full(2, np.inf), np.full(2, np.inf), 1.0).ok
  for odd in (np.array(['x']), np.array([1j])):
    np.savez(tmp_path / 'case.npz', x=odd)
    with pytest.raises(ConversionError, match="case.npz: array 'x' holds .*, expected numbers"):
      load_case(tmp_path / 'case.npz')
