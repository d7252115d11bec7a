"""Recomputes a recorded case and compares every quantity; `records/` has one file per kind of record."""

import pathlib
from typing import Any

from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import Quantity, load_case
from dynllava_jax.convert.records.dynamic_llava import Verifier, check_case


def verify(info: CheckpointInfo, params: dict[str, Any], case_file: str | pathlib.Path) -> list[Quantity]:
  """Compares a converted model with a recorded case; parameters in checkpoint form."""
  case = load_case(case_file)
  check_case(info, case, case_file)
  try:
    return Verifier(info, params, case).run()
  except KeyError as e:
    raise ConversionError(f'{case_file}: array {e} is missing; expected a case of the recorded format') from None
