"""Thresholds of early exits (`methods.exits`): solved for shares, stored beside the checkpoint, looked up.

A run names the ratio that the shares follow, `exit=dict(name='confidence', ratio=0.8)`; the numbers are in `exits.json` in the
checkpoint's folder, for one step and one place of the exits. Axes: E exits, the end of the last layer among them, Q measurements.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dynllava_jax import checkpoint
from dynllava_jax.config import ConfigError, Piece, Stage
from dynllava_jax.files import write_atomically
from dynllava_jax.methods.exits import shares, solve, taken

FILE = 'exits.json'
OF_THRESHOLD = ('threshold', 'ratio')


def described(stages: Sequence[Stage], layers: int) -> dict[str, Any]:
  """What a run's exits are and where they lie, whatever their thresholds: the key of an entry."""
  exits = [s.exit for s in stages if s.exit]
  ends = [s.start for s in stages[1:]] + [layers]
  kinds = {(e.name, tuple((k, v) for k, v in e.options if k not in OF_THRESHOLD)) for e in exits}
  if len(kinds) > 1:
    raise ConfigError(f'exits: {" and ".join(sorted(k for k, _ in kinds))} in one run have no common thresholds; use one of them')
  ((name, options),) = kinds
  return {'exit': {'name': name, **dict(options)}, 'layers': [end for s, end in zip(stages, ends) if s.exit or end == layers]}


def with_thresholds(stages: tuple[Stage, ...], path: str, layers: int) -> tuple[Stage, ...]:
  """The stages with the stored thresholds where an exit names a ratio; ConfigError if there are none for it."""
  ratios = {dict(s.exit.options).get('ratio') for s in stages if s.exit} - {None}
  if not ratios:
    return stages
  if len(ratios) > 1:
    raise ConfigError(f'exits: one run has one ratio, got {", ".join(map(str, sorted(ratios)))}')
  (ratio,) = ratios
  directory, step = checkpoint.locate(path)
  wanted = described(stages, layers) | {'ratio': ratio, 'step': step}
  entry = next((e for e in stored(directory) if all(e[k] == v for k, v in wanted.items())), None)
  if entry is None:
    raise ConfigError(
      f'exits: no thresholds of {wanted["exit"]["name"]} behind layers {wanted["layers"]} with ratio {ratio:g} for step {step} in '
      f'{directory / FILE}; make them with `python -m dynllava_jax.calibrate` and the same config'
    )
  limits = iter(entry['thresholds'])
  return tuple(s if s.exit is None else dataclasses.replace(s, exit=limited(s.exit, next(limits))) for s in stages)


def limited(exit_: Piece, threshold: float) -> Piece:
  """The exit with a threshold of its own."""
  return Piece(exit_.name, {k: v for k, v in exit_.options if k not in OF_THRESHOLD} | {'threshold': threshold})


def stored(directory: pathlib.Path) -> list[dict[str, Any]]:
  """The entries beside a checkpoint; ConfigError if the file is none of ours."""
  path = directory / FILE
  try:
    found = json.loads(path.read_text()) if path.exists() else []
    if not isinstance(found, list) or not all(
      isinstance(e, dict) and {'exit', 'layers', 'ratio', 'step'} <= e.keys() for e in found
    ):
      raise ValueError('not a list of thresholds')
  except (OSError, ValueError) as e:
    raise ConfigError(f'{path}: {e}; remove it, and calibrate again') from None
  return found


def store(directory: pathlib.Path, entries: Sequence[dict[str, Any]]) -> pathlib.Path:
  """Adds entries, in the place of those for the same."""
  key = lambda e: json.dumps([e[k] for k in ('exit', 'layers', 'ratio', 'step')], sort_keys=True)
  kept = {key(e): e for e in (*stored(directory), *entries)}
  write_atomically(directory / FILE, (json.dumps(list(kept.values()), indent=1) + '\n').encode())
  return directory / FILE


def entry(of_run: dict[str, Any], ratio: float, step: int, values: np.ndarray) -> dict[str, Any]:
  """Thresholds for float[E, Q] values; what was wanted and what they give stand beside each other."""
  wanted = shares(ratio, len(values))
  limits = solve(values, wanted)
  reached = np.bincount(taken(values, limits), minlength=len(values)) / values.shape[1]
  return of_run | {
    'ratio': ratio,
    'step': step,
    'thresholds': [float(x) for x in limits],
    'wanted': [round(float(x), 4) for x in wanted],
    'reached': [round(float(x), 4) for x in reached],
    'measured': values.shape[1],
  }
