"""Recomputes recorded cases and compares every quantity; `records/` has one file per kind of record."""

import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import ConfigError
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records import (
  compressors,
  context_pruning,
  deer,
  depth,
  icae,
  instruct_predictor,
  kv,
  layers,
  moe_llava,
  pyramid,
  reducers,
  selectors,
  tokenpacker,
)
from dynllava_jax.convert.records.base import Mismatch, Quantity, load_case
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.described import ENTRIES
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
  depth.VIDEOLLM: depth.verify,
  depth.PMOD: depth.verify,
  pyramid.METHOD: pyramid.verify,
  context_pruning.METHOD: context_pruning.verify,
  moe_llava.METHOD: moe_llava.verify,
  deer.METHOD: deer.verify,
  icae.METHOD: icae.verify,
  tokenpacker.METHOD: tokenpacker.verify,
  instruct_predictor.METHOD: instruct_predictor.verify,
}
# Of arrays by their names: why no run here can equal them.
BEYOND = 'of a block of the tower that LLaVA does not run'
LEFT = {
  'dymu': (
    (r'.*/(group|size|hidden)/\d+', BEYOND),
    (r'.*/tokens_per_block', f'the last is {BEYOND}; the others are the lengths of size/BLOCK'),
    (r'.*/hidden_after_layer_\d+', 'seen in the logits'),
    (r'find/\w+|\w+/thresholds', 'how thresholds were found in batches; the schedule that they give a picture is run'),
  ),
  'prumerge': ((r'\w*plus\w*/.*', "the authors' code takes a patch twice here, as one by attention and as one of the strided"),),
  depth.PMOD: ((r'train/(attention_mask|image_index)', 'what was given'),),
  pyramid.METHOD: ((r'ids|labels|image_features|\w+/prompt_ids|train/(gumbel|draws)', 'what was given'),),
  moe_llava.METHOD: ((r'unit_top\d/(logits|gumbel|uniform)|train/(ids|gumbel_\d+)|infer\d+/prompt', 'what was given'),),
  context_pruning.METHOD: ((r'train/(ids|targets)|infer/prompt_\w+|llama/(prompt_len|train_targets)', 'what was given'),),
  instruct_predictor.METHOD: (
    (r'nocache/.*', "the authors' code without a cache judges by another predictor; compared with cached decoding instead"),
  ),
}
SETTINGS = ('hyper', 'configs')  # entries that every method fills in its own way
LONGEST = 400  # characters of them that a message shows
REFUSED = {  # records of what is known, and left out for a reason
  'kv_decoding': (
    'it is of a cache that is cut again while tokens are generated; here capacity, room for later turns and the gate count on its '
    'slots, so compressors act once, after the prefill (kv_scores.py)'
  ),
}


def verify(info: CheckpointInfo, params: dict[str, Any], case_file: str | pathlib.Path) -> list[Quantity]:
  """Compares a converted model with a recorded case; parameters in checkpoint form."""
  case = load_case(case_file)
  check_case(info, case, case_file)
  try:
    return Verifier(info, params, case, case_file).run()
  except Mismatch as e:
    raise ConversionError(f'{case_file}: {e}') from None
  except KeyError as e:
    raise ConversionError(f'{case_file}: array {e} is missing; expected a case of the recorded format') from None


def verify_method(record: Record) -> Iterator[Quantity]:
  """Recomputes the record of a method, quantity by quantity.

  Raises:
    ConversionError: a method of which nothing recomputes the records, or a record that cannot be read.
  """
  if record.method not in OF_METHODS:
    reason = REFUSED.get(record.method, f'known are {", ".join(sorted(OF_METHODS))}')
    raise ConversionError(f'{record.described}: nothing here recomputes records of method {record.method!r}; {reason}')
  try:
    yield from OF_METHODS[record.method](record)
  except Mismatch as e:
    raise ConversionError(f'{record.at}: {e}') from None
  except ConfigError as e:  # a setting that is impossible, or is on this base
    told = json.dumps({name: value for name, value in record.meta.items() if name not in ENTRIES or name in SETTINGS})
    shown = told if len(told) <= LONGEST else f'{told[:LONGEST]} ...'
    raise ConversionError(f'{record.described}: {e}; it says {shown}') from None


def why_left(record: Record, names: Iterable[str]) -> dict[str, list[str]]:
  """Arrays that were not compared, by the reason."""
  found: dict[str, list[str]] = {}
  for name in names:
    known = (reason for pattern, reason in LEFT.get(record.method, ()) if re.fullmatch(pattern, name))
    found.setdefault(next(known, 'nothing here knows of it'), []).append(name)
  return found
