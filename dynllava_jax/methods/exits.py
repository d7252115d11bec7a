"""What an exit is: at the end of a stage the shared exit head says what it would answer, and a measure of that if it is enough.

A row leaves where the measure is at most the threshold of the stage's exit (equality leaves), at the latest behind the last layer.
Thresholds follow from values on other questions and from the shares that are to leave at each exit, by the solver of DeeR-VLA
(arXiv 2411.02359, `ExitController.set_threshold`).

Axes: B batch, V vocabulary, E exits, Q questions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dynllava_jax.config import ConfigError, ModelConfig, Stage
from dynllava_jax.config.parsing import require
from dynllava_jax.methods.base import Origin

NEVER, ALWAYS = -1e8, 1e8  # thresholds, as the authors write them
QUESTION, TOKEN = 'question', 'token'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitOptions:
  """When a row leaves.

  Attributes:
    threshold: it leaves if the measure is not above it; `NEVER` and `ALWAYS` do what they say.
    ratio: by the thresholds that were stored for it beside the checkpoint (`evals/exit_thresholds.py`) instead; 0 for `threshold`.
    per: 'question' decides once, behind the last token of the prompt, and the answer and all later turns run at that depth; 'token'
      decides for each generated token, whose keys and values in the layers above are made of the state that it left with.
  """

  threshold: float = NEVER
  ratio: float = 0.0
  per: str = QUESTION

  def __post_init__(self):
    require(self.per in (QUESTION, TOKEN), f'per is {self.per!r}, expected {QUESTION!r} or {TOKEN!r}')
    require(isinstance(self.threshold, (int, float)), f'threshold is {self.threshold!r}, expected a number')
    require(self.ratio >= 0, f'ratio is {self.ratio}, expected a positive number, or 0 to go by threshold')
    require(not self.ratio or self.threshold == NEVER, 'ratio and threshold both say when to leave; leave one out')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exit(Origin):
  """How sure an exit is.

  Attributes:
    measure: (next-token probabilities float32[..., V] of the exit head here, the same at the end of the stage before, None unless
      it `compares`, options) -> float32[...]; the smaller the surer.
    compares: whether it looks at the stage before.
  """

  measure: Callable[[jax.Array, jax.Array | None, Any], jax.Array]
  compares: bool = False
  options: type = ExitOptions


def decided_per(stages: Sequence[Stage]) -> str:
  """What the exits of a run decide about, 'question' or 'token'; '' for a run without any."""
  return next((dict(s.exit.options).get('per', QUESTION) for s in stages if s.exit), '')


def check_exits(model: ModelConfig, stages: Sequence[Stage], pieces: Sequence[tuple[Exit | None, ExitOptions | None]]) -> None:
  """Raises ConfigError unless rows can leave where these stages say; `pieces`: the exit of each stage and its settings."""
  for i, (stage, (kind, options)) in enumerate(zip(stages, pieces)):
    if kind is None:
      continue
    at = f'stage at layer {stage.start}: exit {stage.exit.name}'
    if model.exit_head is None:
      raise ConfigError(f'{at}: needs an exit head, and this model has none; train one with configs/methods.py:deer')
    if kind.compares and i == 0:
      raise ConfigError(f'{at}: compares with the end of the stage before, and there is none; let another stage begin at layer 1')
    if options.per != decided_per(stages):
      raise ConfigError(f'{at}: decides per {options.per}, another exit of the run per {decided_per(stages)}; use one of them')
    if other := next((s for s in stages if s.revisit), None):
      raise ConfigError(f'{at}: does not go together with revisit {other.revisit.name}; use one of them')


def shares(ratio: float, exits: int, kind: str = 'exp') -> np.ndarray:
  """float32[E]: the share that is to leave at each exit, the last one included.

  `exp`: in proportion to ratio^k, k from 1; `gauss`: to exp(-(k - ratio)^2 / 2), k from 0. A smaller ratio leaves earlier.
  """
  require(kind in ('exp', 'gauss'), f'shares are {kind!r}, expected exp or gauss')
  require(exits > 0 and (ratio > 0 or kind == 'gauss'), f'ratio is {ratio}, expected a positive number')
  k = np.arange(exits, dtype=np.float64)
  weights = ratio ** (k + 1) if kind == 'exp' else np.exp(-((k - ratio) ** 2) / 2)
  return (weights / weights.sum()).astype(np.float32)


def solve(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """Thresholds float32[E] by which so many of the questions leave at each exit.

  Exit after exit, of those that have not left yet the floor(Q * share) with the smallest values do, and all that are as small;
  where that is none, or more than there are, nobody leaves.

  Args:
    values: float[E, Q], what each exit measured of each question; wanted: float[E], as `shares` makes them.
  """
  count, left = values.shape[1], np.zeros(values.shape[1], bool)
  thresholds = np.full(len(wanted), NEVER, np.float32)
  for k, share in enumerate(wanted[:-1]):
    number, still = int(np.floor(count * share)), np.sort(values[k][~left])
    if 0 < number <= len(still):
      thresholds[k] = still[number - 1]
    left |= values[k] <= thresholds[k]
  thresholds[-1] = ALWAYS
  return thresholds


def taken(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
  """int[Q]: the exit at which each question leaves; values float[E, Q], thresholds float[E]."""
  return np.argmax(values[: len(thresholds)] <= thresholds[:, None], axis=0)
