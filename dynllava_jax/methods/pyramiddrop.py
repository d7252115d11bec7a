"""PyramidDrop (arXiv 2410.17247): at several layers, image tokens that the last prompt token looks at least leave.

A layer list (8, 16, 24) with ratios (0.5, 0.25, 0.125) is one stage per layer, `Stage(start=8, selector='pyramiddrop',
image_keep_rate=0.5)` and so on: ratios are of all image tokens of the run. The attention is that of the layer that is entered, on
what reaches it. Positions are numbered anew after every cut; with `renumber=False`, not of the authors, tokens keep theirs.

Trained with it, a model sees the same cuts, but image tokens are ranked by all rows in front of an answer. Nothing flows back
through the ranking.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.config import IGNORE
from dynllava_jax.methods import fastv
from dynllava_jax.methods.base import Selector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """`renumber`: whether rotary positions are 0, 1, 2, ... again for what stays."""

  renumber: bool = True


def training_weight(labels: jax.Array, options: Options) -> jax.Array:
  """The rows in front of an answer, all alike and 1 together; none in a row without answer, which no loss asks about."""
  del options
  answered = labels != IGNORE
  before = jnp.pad(~answered[:, :-1] & answered[:, 1:], [(0, 0), (0, 1)])
  return before / jnp.maximum(before.sum(-1, keepdims=True), 1).astype(jnp.float32)


SELECTOR = Selector(
  select=fastv.select,
  attention='entering',
  renumbers=lambda options: options.renumber,
  training='gathers',
  training_weight=training_weight,
  options=Options,
  source='arXiv 2410.17247, Cooperx521/PyramidDrop 6444f30',
  verified="the authors' code: scores, sets, positions per layer, cache lengths, logits and tokens; "
  'in training sets, labels, logits, loss and gradients',
)
