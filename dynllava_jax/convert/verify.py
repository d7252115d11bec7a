"""Recomputes recorded cases and compares every quantity; `records/` has one file per kind of record."""

import pathlib
from collections.abc import Iterator
from typing import Any

from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records import compressors, instruct_predictor, kv, layers, reducers, selectors, tokenpacker
from dynllava_jax.convert.records.base import Quantity, load_case
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.dynamic_llava import Verifier, check_case

# How the record of a method is recomputed, by the method's name in `meta.json`.
OF_METHODS = {
  **dict.fromkeys(reducers.RECORDED, reducers.verify),
  **dict.fromkeys(kv.RECORDED, kv.verify),
  'fastv': selectors.verify,
  'pyramiddrop': selectors.verify,
  'sparsevlm': selectors.verify,
  'look-m': compressors.verify,
  'redundancylens': layers.verify,
  tokenpacker.METHOD: tokenpacker.verify,
  instruct_predictor.METHOD: instruct_predictor.verify,
}


def verify(info: CheckpointInfo, params: dict[str, Any], case_file: str | pathlib.Path) -> list[Quantity]:
  """Compares a converted model with a recorded case; parameters in checkpoint form."""
  case = load_case(case_file)
  check_case(info, case, case_file)
  try:
    return Verifier(info, params, case).run()
  except KeyError as e:
    raise ConversionError(f'{case_file}: array {e} is missing; expected a case of the recorded format') from None


def verify_method(record: Record) -> Iterator[Quantity]:
  """Recomputes the record of a method, quantity by quantity.

  Raises:
    ConversionError: a method of which nothing recomputes the records, or a record that cannot be read.
  """
  if record.method not in OF_METHODS:
    raise ConversionError(
      f'{record.folder}/meta.json: nothing here recomputes records of {record.method!r}; known are {", ".join(sorted(OF_METHODS))}'
    )
  yield from OF_METHODS[record.method](record)
