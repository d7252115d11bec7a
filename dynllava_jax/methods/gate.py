"""What a gate is: it scores each generated token when it is fed, and decides if it stays when it leaves the guarded window.

The guard is the same for all gates: the first `sinks` generated tokens and the last `window` ones stay whatever they score, and
count in the share. A token is judged once, when `window` newer ones have been fed; what is dropped is never seen again. The
threshold is a number, or follows a share: a token stays if its rank among all scores before it is high enough, and the bar moves
with how many tokens too few or too many are held. Everything is per row, of static shape [B, T], and the same when it is replayed.

Axes: B batch, T generated tokens, D width.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax.config import ConfigError, ModelConfig, Stage
from dynllava_jax.config.parsing import require
from dynllava_jax.methods.base import Origin

Memory = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateOptions:
  """When a generated token stays.

  Attributes:
    share: of the generated tokens, sinks and window included, that are to be held; 0 goes by `threshold`.
    gain: how much one token too few or too many moves the bar; 0 is a plain running quantile.
    threshold: a token stays if its score is above it.
    sinks: first generated tokens that stay; window: newest ones that are not judged yet.
  """

  share: float = 0.0
  gain: float = 0.5
  threshold: float = 0.0
  sinks: int = 0
  window: int = 0

  def __post_init__(self):
    require(0 <= self.share <= 1, f'share is {self.share}, expected a share in (0, 1], or 0 to go by threshold')
    require(self.gain >= 0, f'gain is {self.gain}, expected 0 or more')
    for name in ('sinks', 'window'):
      require(getattr(self, name) >= 0, f'{name} is {getattr(self, name)}, expected 0 or more')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fed:
  """A generated token of each row, as it is fed.

  Attributes:
    hidden: float[B, D], at the entry of the gated stage; token: int32[B].
    told: float32[B, 2], its surprisal -log p and the entropy of the distribution that it was drawn from, in nats; None unless the
      gate `needs_told`.
    margin: float32[B], the text predictor's keep margin; None for a model without one.
  """

  hidden: jax.Array
  token: jax.Array
  told: jax.Array | None = None
  margin: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate(Origin):
  """A score of generated tokens.

  Attributes:
    score: (`Fed`, `GateState` before it, options) -> float32[B]; the larger the more worth keeping.
    memory: (rows, T, D, options) -> what it remembers of the tokens, zeros [B, T, ...] by name.
    remember: (`Fed`, options) -> by the same names what is written at the token's number, [B, ...].
    needs_told: whether it looks at `Fed.told`; needs_predictor: at `Fed.margin`.
  """

  score: Callable[[Fed, 'GateState', Any], jax.Array]
  memory: Callable[[int, int, int, Any], Memory] = lambda rows, size, width, options: {}
  remember: Callable[[Fed, Any], Memory] = lambda fed, options: {}
  needs_told: bool = False
  needs_predictor: bool = False
  options: type = GateOptions
  source: str = 'this project'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GateState:
  """What a gate knows of each row.

  Attributes:
    fed: int32[B], generated tokens fed so far, over all turns; the next one's number.
    scores: float32[B, T] by number; kept: bool[B, T], whether each is held, True for those not judged yet.
    memory: as `Gate.memory` has it.
  """

  fed: jax.Array
  scores: jax.Array
  kept: jax.Array
  memory: Memory

  @property
  def before(self) -> jax.Array:
    """bool[B, T]: numbers of tokens that were fed."""
    return jnp.arange(self.kept.shape[1]) < self.fed[:, None]

  @property
  def held(self) -> jax.Array:
    """bool[B, T]: fed, and not dropped."""
    return self.kept & self.before


def new_state(gate: Gate, options: GateOptions, rows: int, size: int, width: int) -> GateState:
  """Of rows that have generated nothing yet; `size` is T."""
  memory = gate.memory(rows, size, width, options)
  zeros = jnp.zeros((rows, size), jnp.float32)
  return GateState(jnp.zeros(rows, jnp.int32), zeros, jnp.ones((rows, size), bool), memory)


def judge(
  gate: Gate, options: GateOptions, fed: Fed, state: GateState, active: jax.Array
) -> tuple[jax.Array, jax.Array, GateState]:
  """Feeds a token to each row of bool[B] `active`, and judges the one that leaves the window by that, if any.

  Returns:
    (bool[B], whether that one stays, True if there is none or it is a sink; float32[B], its score, +inf where it is not judged;
    the state behind it).
  """
  size = state.scores.shape[1]
  rows, numbers = jnp.arange(active.shape[0]), jnp.arange(size)
  here = jnp.where(active, state.fed, size)
  put = lambda old, new: old.at[rows, here].set(new.astype(old.dtype), mode='drop')
  scores = put(state.scores, gate.score(fed, state, options))
  memory = jax.tree.map(put, state.memory, gate.remember(fed, options))
  leaving = state.fed - options.window
  judged = active & (leaving >= options.sinks)
  number = jnp.maximum(leaving, 0)
  score = jnp.take_along_axis(scores, jnp.minimum(number, size - 1)[:, None], 1)[:, 0]
  if options.share:
    kept_before = (state.kept & (numbers < number[:, None])).sum(-1) + options.window
    keep = stays(scores, score, number, kept_before, options)
  else:
    keep = score > options.threshold
  keep |= ~judged
  kept = state.kept.at[rows, jnp.where(judged, number, size)].set(keep, mode='drop')
  return keep, jnp.where(judged, score, jnp.inf), GateState(state.fed + active, scores, kept, memory)


def stays(scores: jax.Array, score: jax.Array, number: jax.Array, held: jax.Array, options: GateOptions) -> jax.Array:
  """The rule of a share: bool[B], whether a token of `score` float32[B] and int32[B] `number` stays.

  Its rank counts scores before it that are smaller or the same, so ties go to the newer token.

  Args:
    scores: float32[B, T] by number; held: int32[B], tokens held besides this one, of `number + window` fed besides it.
    options: share and gain.
  """
  before = jnp.arange(scores.shape[1]) < number[:, None]
  not_above = (before & (scores <= score[:, None])).sum(-1)
  rank = (not_above + 0.5) / (number + 1)
  missing = options.share * (number + options.window) - held
  return rank >= 1 - jnp.clip(options.share + options.gain * missing, 0, 1)


def check_gate(model: ModelConfig, judging: Sequence[Stage], gates: Mapping[int, Gate]) -> None:
  """Raises ConfigError unless generated tokens are judged once, by what this model has.

  Args:
    model: what is run; judging: the stages that judge them; gates: those with a gate of their own, by where they start.
  """
  for stage in (s for s in judging if s.gate is not None):
    at = f'stage at layer {stage.start}: gate {stage.gate.name}'
    if len(judging) > 1:
      others = ', '.join(str(s.start) for s in judging if s is not stage)
      raise ConfigError(f'{at}: generated tokens are judged at layer {others} too; one stage of a run may')
    if gates[stage.start].needs_predictor and model.predictor is None:
      raise ConfigError(f'{at}: needs a text predictor, and this model has none')
