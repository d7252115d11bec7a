"""Layers whose rows vote on what stands before them: a token that one row drops is gone for all later ones.

Each layer holds other tokens, so its cache is a `PrunedCache`. By what rows vote is the method's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dynllava_jax.config import ConfigError, ModelConfig, Stage
from dynllava_jax.ops.pruning import Votes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voting:
  """What a `LayerKind` of this family does, in prefill, training and decoding alike.

  Attributes:
    votes: (normalised x float[B, T, D], this layer's flags and weights, options) -> the rows' votes.
    holds: options -> tokens that each layer's cache has room for; 0 for all.
    flops: (model, queries, keys that they see, options) -> FLOPs of the matrix products that a layer makes for it.
    numbers: (model, options) -> numbers that a layer caches for a token besides keys and values.
  """

  votes: Callable[[jax.Array, dict[str, jax.Array], Any], Votes]
  holds: Callable[[Any], int]
  flops: Callable[[ModelConfig, float, float, Any], float]
  numbers: Callable[[ModelConfig, Any], int]


def check_voting(
  model: ModelConfig, stages: tuple[Stage, ...], votes: list[bool], ranks: list[str], judging: list[Stage], unmerges: bool
) -> None:
  """Raises ConfigError unless layers that vote have weights for it, and nobody else decides about the same tokens.

  Args:
    model, stages: what is run.
    votes, ranks: of each stage, whether its layers vote, and `Selector.attention`; judging: stages that judge generated tokens.
    unmerges: whether the decoder attends over tokens that its reducer merged.
  """
  for i, stage in enumerate(stages):
    at = f'stage at layer {stage.start}'
    if (ranks[i] == 'entering' and votes[i]) or (ranks[i] == 'previous' and i and votes[i - 1]):
      raise ConfigError(f'{at}: {stage.selector} ranks by attention to tokens that votes have dropped; use another selector there')
    if not votes[i]:
      continue
    if model.pruning is None:
      raise ConfigError(
        f'{at}: {stage.layers.name} needs interaction weights, and this model has none; configs/methods.py trains them'
      )
    others = [piece.name for piece in (stage.compressor, stage.revisit) if piece is not None]
    others += [f'the exit at layer {s.start}' for s in stages if s.exit is not None]
    others += [f'the gate at layer {s.start}' for s in judging if s.start <= stage.start]
    if others or unmerges:
      raise ConfigError(f'{at}: {stage.layers.name} does not go together with {(*others, "unmerging")[0]}; use one of them')
