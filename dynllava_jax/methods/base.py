"""What a selector is: how one method picks the tokens that enter a stage.

To add a method, write one file with a `Selector` and name it in `selectors/__init__.py`. The decoder, the
cache and the generation loop stay as they are.
"""

import dataclasses
from collections.abc import Callable

import jax


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


@dataclasses.dataclass(frozen=True)
class Selector:
  """One method.

  Attributes:
    select: (inputs, budget M) -> int32[B, M], ascending indices of the image tokens to keep.
    text_margin: float[..., D] hidden states of generated tokens, text predictor -> float32[...] keep margin
      (kept when > 0); None if the method keeps every generated token.
  """

  select: Callable[[SelectorInputs, int], jax.Array]
  text_margin: Callable[[jax.Array, Callable], jax.Array] | None = None
