"""Records of the reference's own parts, recomputed once for all tests of a file."""

import contextlib
import io

import pytest
from conftest import GOLDEN

from dynllava_jax.convert import verify
from dynllava_jax.convert.records.bases import Record, open_record
from dynllava_jax.methods import __main__ as program


def recorded(name: str) -> Record:
  """The record, with its base beside the other methods' records."""
  return open_record(GOLDEN / 'methods' / name, GOLDEN)


def verified(name: str):
  """(quantities, whether the command found all well, the lines it printed) of a record."""
  found, printed, original = [], io.StringIO(), verify.verify_method
  remember = lambda record: (found.append(q) or q for q in original(record))
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
    patch.setattr(verify, 'verify_method', remember)
    well = program.verify(str(GOLDEN / 'methods' / name), str(GOLDEN))
  return found, well, printed.getvalue().splitlines()
