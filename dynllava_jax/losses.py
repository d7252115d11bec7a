"""The training objective: cross-entropy, and what the methods of a run add to it.

Every mean is over the whole batch, also where only some of its rows are at hand, so the losses of parts add up.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dynllava_jax.config import IGNORE, Objective
from dynllava_jax.methods.training import Training
from dynllava_jax.models.batch import Prompt, TrainInputs, TrainOutput
from dynllava_jax.models.cross_entropy import cross_entropy
from dynllava_jax.ops.layout import gather_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
  """Scalars: `total` is `ce` and the terms of the run's methods; `shown`: what is logged of these, by name."""

  total: jax.Array
  ce: jax.Array
  shown: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
  """What the means of a batch are over; known before the model runs.

  Attributes:
    supervised: tokens with a label that some position predicts.
    more: what the run's methods count besides, by name.
    share: 1 over the number of equal parts that the batch is computed in.
  """

  supervised: jax.Array
  more: dict[str, jax.Array]
  share: float = dataclasses.field(default=1.0, metadata={'static': True})


def count(prompt: Prompt, inputs: TrainInputs, objective: Objective, parts: Sequence[Training], pieces: int = 1) -> Counts:
  """What the means of this batch are over.

  Args:
    prompt, inputs: the batch, with labels int32[B, S].
    objective: settings of the methods; parts: how the run is trained, `models.trained.parts`.
    pieces: number of equal parts that it will be computed in.
  """
  more = {}
  for part in parts:
    more |= part.counts(prompt, inputs, objective)
  return Counts((inputs.labels[:, 1:] != IGNORE).sum(), more, 1 / pieces)


def remaining(labels: jax.Array, places: jax.Array | None) -> jax.Array:
  """Labels int32[B, S] of the rows at `places` int32[B, S'], as `TrainOutput` has them."""
  return labels if places is None else jnp.where(places >= 0, gather_rows(labels, jnp.maximum(places, 0)), IGNORE)


def training_losses(
  out: TrainOutput,
  prompt: Prompt,
  inputs: TrainInputs,
  objective: Objective,
  parts: Sequence[Training],
  counts: Counts | None = None,
) -> Losses:
  """Losses of one batch, or what some of its rows contribute to them.

  Args:
    out: from `train_forward`.
    prompt, inputs, objective, parts: as in `count`.
    counts: of the whole batch, if these rows are a part of it.
  """
  counts = counts or count(prompt, inputs, objective, parts)
  ce = cross_entropy(out.hidden, remaining(inputs.labels, out.places), out.head, counts.supervised)
  total, shown = ce, {}
  for part in parts:
    terms, told = part.losses(out, prompt, inputs, objective, counts)
    shown |= told
    for term in terms.values():
      total = total + term
  return Losses(total, ce, shown)
