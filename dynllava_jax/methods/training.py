"""How a method is trained: what it draws, its forward pass, what it adds to the loss. The step and the model know none by name.

Axes: B batch, S sequence, D width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dynllava_jax.config import ModelConfig, Objective


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of what is trained on: `rows` and `positions` of a batch, `image` tokens of a row, and the model."""

  rows: int
  positions: int
  image: int
  model: ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
  """What a step draws at random for one method.

  Attributes:
    noise: tree of arrays [B, ...]; None for none.
    dense: bool[B], rows that are run as if there were no method; None for none.
    told: scalars of the step, by name; they are logged.
  """

  noise: Any = None
  dense: jax.Array | None = None
  told: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
  """A part of how runs are trained. One part of a run has a forward pass; others may add to the loss.

  What `losses` gives of the parts of a batch must add up to that of the batch: sums are divided by what `Counts` says of all of it.

  Attributes:
    name: under which its draws are found in `TrainInputs.drawn`.
    forward: (the `DynLlava`, embedded x float[B, S, D], `Prompt`, `TrainInputs`, `Objective`) -> `TrainOutput`; None for a part
      that only adds.
    draw: (key of the step, `Shape`, share of the run that is done, `Objective`) -> `Drawn`. Who draws splits the key, or folds a
      number of its own into it.
    counts: (`Prompt`, `TrainInputs`, `Objective`) -> by name, what its means over the batch are divided by.
    losses: (`TrainOutput`, `Prompt`, `TrainInputs`, `Objective`, `Counts`) -> (terms that the loss has besides cross-entropy, by
      name; scalars that are logged).
  """

  name: str
  forward: Callable[..., Any] | None = None
  draw: Callable[[jax.Array, Shape, jax.Array, Objective], Drawn] = lambda key, shape, progress, objective: Drawn()
  counts: Callable[..., dict[str, jax.Array]] = lambda prompt, inputs, objective: {}
  losses: Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array]]] = lambda out, prompt, inputs, objective, counts: ({}, {})
