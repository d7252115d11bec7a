"""A run without a method costs what it cost: FLOPs and bytes of the programs of a tiny model, before they are compiled."""

import importlib.util
import json

import jax
import pytest
from conftest import GOLDEN, ROOT

SPEC = importlib.util.spec_from_file_location('programs', ROOT / 'benchmarks' / 'programs.py')
programs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(programs)
RECORDED = json.loads((GOLDEN / 'programs.json').read_text())


@pytest.mark.skipif(jax.__version__ != RECORDED['jax'], reason=f'the figures are those of jax {RECORDED["jax"]}')
def test_no_program_costs_more_than_recorded():
  """After a change of what all runs do, `python benchmarks/programs.py --tiny` records the new figures; a new site is none."""
  assert programs.costlier(programs.of_tiny(), RECORDED['figures'], at_most=1.001) == []


def test_what_costs_more_is_named():
  before, now = ({'dense': {'decode': {'flops': 100.0, 'bytes accessed': b}}} for b in (10.0, 11.0))
  assert programs.costlier(now, before, 1.001) == ['dense decode: bytes accessed 11 (1.1000 of 10)']
  assert programs.costlier(before, now, 1.001) == []
