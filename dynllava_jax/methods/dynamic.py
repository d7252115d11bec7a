"""Dynamic-LLaVA (arXiv 2412.00876): learned predictors choose image tokens and judge generated ones, and on demand instructions."""

import dataclasses

from dynllava_jax.methods.base import Chosen, Selector, SelectorInputs
from dynllava_jax.methods.gate import Gate
from dynllava_jax.ops.selection import keep_margin, top_indices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Settings of the selector.

  Attributes:
    instruct: whether the instruction predictor judges the last instruction of a prompt, and all of a later turn. It has no quota.
      The authors' scripts leave it off, and their table 9 shows what it costs.
  """

  instruct: bool = False


def select(inputs: SelectorInputs, budget: int, options):
  """The `budget` image tokens with the largest keep margin."""
  return Chosen(index=top_indices(keep_margin(inputs.image_predictor(inputs.image_hidden)), budget))


def text_margin(hidden, text_predictor):
  """Keep minus drop logit of each token."""
  return keep_margin(text_predictor(hidden))


SELECTOR = Selector(
  select=select,
  text_margin=text_margin,
  training='masks',
  options=Options,
  source='arXiv 2412.00876',
  verified="the authors' code",
)

GATE = Gate(score=lambda fed, state, options: fed.margin, needs_predictor=True, source='arXiv 2412.00876')
