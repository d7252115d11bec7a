"""What a method consists of: the pieces, one type per site, that a run names in its reducer and its stages.

A piece is a small frozen dataclass of functions and of static declarations: what it needs (nothing else is computed), its
options (a frozen dataclass, which says what is allowed), and where it comes from. To add a method, write one file with its
pieces and name them in `methods/__init__.py`. The decoder, the cache and the generation loop stay as they are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dynllava_jax.config import ModelConfig, Piece, VisionConfig, from_config_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
  """Of a piece without settings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
  """What every piece says about itself; `python -m dynllava_jax.methods` prints it.

  Attributes:
    options: frozen dataclass of the piece's settings; raises ConfigError itself for values that are impossible on any model.
    source: where the method is published, and the commit of the code that it was compared with.
    verified: what it was compared with, quantity by quantity; '' if with nothing.
  """

  options: type = NoOptions
  source: str = ''
  verified: str = ''

  def read_options(self, piece: Piece, site: str) -> Any:
    """`piece.options` as the dataclass `options`; ConfigError with the nearest known name for one that does not exist."""
    return from_config_dict(self.options, dict(piece.options), f'{site} {piece.name}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerNeeds:
  """What a reducer wants to see of the vision tower besides the features; blocks are counted from 0.

  Attributes:
    class_feature: the class token's row beside the patch features.
    class_attention: blocks whose attention row of the class token is wanted.
    key_mean: blocks whose keys are wanted, averaged over heads.
  """

  class_feature: bool = False
  class_attention: tuple[int, ...] = ()
  key_mean: tuple[int, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TowerOutput:
  """What the vision tower gives: always the features, the rest where `TowerNeeds` asks for it.

  Attributes:
    features: float[B, P, C], patches of the selected layer.
    class_feature: float[B, C], the class token of that layer.
    class_attention: by block, float32[B, N, P]: softmax over all P + 1 tokens, the class token's own column cut off.
    key_mean: by block, float32[B, P + 1, H], head mean of the keys (with bias, unscaled), class token first.
  """

  features: jax.Array
  class_feature: jax.Array | None = None
  class_attention: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
  key_mean: dict[int, jax.Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reduced:
  """Image tokens of the language model: `tokens` float[B, M, D], and for each the patch that it stands for.

  `index` is int32[B, M]; -1 is the class token. Of a merged token it is the patch that absorbed others.
  """

  tokens: jax.Array
  index: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reducer(Origin):
  """Makes the image tokens that the language model sees, between tower and language model.

  Attributes:
    reduce: (tower output, projector float[B, n, C] -> float[B, n, D], options) -> `Reduced`. A row depends on that row alone;
      choices are made in float32, ties go to the lowest index; no division may give NaN, rows without image included.
    num_tokens: (model, options) -> M; ConfigError with the reason if the model cannot be reduced so.
    needs: (vision, options) -> `TowerNeeds`.
    projects_all: whether the projector runs on all patches, or only on what is left of them.
  """

  reduce: Callable[[TowerOutput, Callable[[jax.Array], jax.Array], Any], Reduced]
  num_tokens: Callable[[ModelConfig, Any], int]
  needs: Callable[[VisionConfig, Any], TowerNeeds] = lambda vision, options: TowerNeeds()
  projects_all: bool = False


@dataclasses.dataclass(frozen=True)
class SelectorInputs:
  """What a selector may look at.

  Attributes:
    image_hidden: float[B, P, D], hidden states of the image tokens that reach the stage (arbitrary in rows
      without image; the result is ignored there).
    seed: uint32[B], one number per row, so that a random choice does not depend on the row's neighbours.
    image_predictor: float[B, P, D] -> float[B, P, 2], or None if the model has none.
    text_predictor: float[..., D] -> float[..., 2], or None if the model has none.
  """

  image_hidden: jax.Array
  seed: jax.Array
  image_predictor: Callable[[jax.Array], jax.Array] | None
  text_predictor: Callable[[jax.Array], jax.Array] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selector(Origin):
  """Picks the tokens that enter a stage.

  Attributes:
    select: (inputs, budget M) -> int32[B, M], ascending indices of the image tokens to keep.
    text_margin: float[..., D] hidden states of generated tokens, text predictor -> float32[...] keep margin
      (kept when > 0); None if the method keeps every generated token.
  """

  select: Callable[[SelectorInputs, int], jax.Array]
  text_margin: Callable[[jax.Array, Callable], jax.Array] | None = None
