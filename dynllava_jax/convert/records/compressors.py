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
from dynllava_jax.convert.records.runs import Answer, Group, Runner, compare_run, decoded_groups, per_layer, with_bases

SCORE = KEY = 1e-5
# Merge, per cent that stays for its score, per cent that stays as the prompt's end.
LOOK_M = re.compile(r'(\w+)_h(\d+(?:\.\d+)?)_r(\d+(?:\.\d+)?)$')


def verify(record: Record, alone: bool = True, only: Sequence[str] = ()) -> Iterator[Quantity]:
  """Every quantity of the record; `only` some of its configs, `BASE/CONFIG`."""
  for base, groups in with_bases(record, decoded_groups(record).values(), only):
    runner = Runner(base.info.model, base.params, (Stage(compressor=piece(record, groups[0])),))
    yield from compare_run(record, groups, runner, base, own, alone)


def piece(record: Record, group: Group) -> Piece:
  """The compressor of a config, by `configs` of `meta.json` or by its name; ConversionError if neither says."""
  given = record.meta.get('configs', {}).get(group.setting, {})
  if given:
    return Piece('look_m', {name: given[name] for name in ('merge', 'hh_ratio', 'recent_ratio') if name in given})
  named = LOOK_M.match(group.config)
  if not named:
    raise ConversionError(f'{record.folder}: config {group.config!r} of a LOOK-M record, expected a name such as pivot_h20_r20')
  return Piece('look_m', {'merge': named[1], 'hh_ratio': float(named[2]) / 100, 'recent_ratio': float(named[3]) / 100})


def own(name: str, recorded: np.ndarray, answer: Answer) -> tuple[Any, float] | None:
  """The arrays of the compressor by name."""
  seen = answer.traces[0].of_layers
  if name == 'cache_len':
    return per_layer(answer.cache_len, recorded), EXACT
  if name in ('k', 'v'):
    return getattr(answer, name)[0].swapaxes(1, 2), KEY
  length = int(answer.traces[0].length)
  if name == 'scores':  # per kv head, or before those of a group are added
    by_query_head = recorded.shape[1] != seen['scores'].shape[1]
    return seen['received' if by_query_head else 'scores'][..., :length], SCORE
  keep = seen['keep'][..., :length]
  if name == 'keep':
    return keep, EXACT
  if name == 'pivot':
    return seen['pivot'][..., :length][~keep].reshape(*keep.shape[:2], -1), EXACT
  return None
