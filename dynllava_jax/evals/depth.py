"""How deep runs went that leave early, and what fixed depths mixed at random would score with as many layers.

A criterion that is no better than that mixture knows nothing of the questions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def run_of(depths: Sequence[Sequence[int]]) -> dict[str, Any]:
  """Of a run, by the layers behind each token of each answer: their mean over answers, and `fixed_depth` if all are the same."""
  if not depths:
    return {'layers_run': None}
  found = {n for answer in depths for n in answer}
  mean = float(np.mean([np.mean(answer) for answer in depths]))
  return {'layers_run': mean, 'fixed_depth': found.pop() if len(found) == 1 else None}


def compare(rows: Mapping[str, dict[str, Any]]) -> None:
  """Adds `mixture` to the rows of runs whose depth varies, where runs of fixed depths with a score lie around it."""
  fixed = {row['fixed_depth']: row['score'] for row in rows.values() if row.get('fixed_depth') and 'score' in row}
  for row in rows.values():
    layers = row['layers_run']
    if layers is not None and row['fixed_depth'] is None and fixed and min(fixed) <= layers <= max(fixed):
      depths = sorted(fixed)
      row['mixture'] = float(np.interp(layers, depths, [fixed[d] for d in depths]))
