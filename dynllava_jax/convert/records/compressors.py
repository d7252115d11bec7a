"""Recomputes what was recorded of LOOK-M, which merges a prompt's keys and values before they are cached.

Per layer and head: scores, what stays, what is merged into what, the merged cache; then the logits and tokens decoded from it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dynllava_jax.config import Piece, Stage
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import EXACT, Quantity
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.decoded import Group, decoded_groups, with_bases
from dynllava_jax.convert.records.described import NUMBER, TEXT
from dynllava_jax.convert.records.runs import Answer, Runner, compare_run, per_layer

SCORE = KEY = 1e-5
NEEDED = ('scores', 'keep', 'pivot', 'k', 'v', 'cache_len')
# Merge, per cent that stays for its score, per cent that stays as the prompt's end.
LOOK_M = re.compile(r'(\w+)_h(\d+(?:\.\d+)?)_r(\d+(?:\.\d+)?)$')


def verify(record: Record, alone: bool = True, only: Sequence[str] = ()) -> Iterator[Quantity]:
  """Every quantity of the record; `only` some of its configs, `BASE/CONFIG`."""
  for base, groups in with_bases(record, decoded_groups(record).values(), only):
    runner = Runner(base.info.model, base.params, (Stage(compressor=piece(record, groups[0])),))
    yield from compare_run(record, groups, runner, base, own, alone, NEEDED)


def piece(record: Record, group: Group) -> Piece:
  """The compressor of a config, by `configs` of `meta.json` or by its name; ConversionError if neither says."""
  kinds = {'merge': TEXT, 'hh_ratio': NUMBER, 'recent_ratio': NUMBER}
  told = {name: record.setting('configs', group.setting, name, kind=kind, default=None) for name, kind in kinds.items()}
  if options := {name: value for name, value in told.items() if value is not None}:
    return Piece('look_m', options)
  named = LOOK_M.match(group.config)
  if not named:
    raise ConversionError(f'{record.at}: config {group.config!r} of a LOOK-M record, expected a name such as pivot_h20_r20')
  return Piece('look_m', {'merge': named[1], 'hh_ratio': float(named[2]) / 100, 'recent_ratio': float(named[3]) / 100})


def own(name: str, recorded: np.ndarray, answer: Answer) -> tuple[Any, float] | None:
  """The arrays of the compressor by name."""
  seen = answer.traces[0].of_layers[0]
  if name == 'cache_len':
    return per_layer(answer.cache_len, recorded), EXACT
  if name in ('k', 'v'):
    return getattr(answer, name)[0].swapaxes(1, 2), KEY
  length = int(answer.traces[0].length)
  if name == 'scores':  # per kv head, or before those of a group are added
    by_query_head = recorded.shape[1:2] == seen['received'].shape[1:2]
    return seen['received' if by_query_head else 'scores'][..., :length], SCORE
  keep = seen['keep'][..., :length]
  if name == 'keep':
    return keep, EXACT
  if name == 'pivot':
    return seen['pivot'][..., :length][~keep].reshape(*keep.shape[:2], -1), EXACT
  return None
