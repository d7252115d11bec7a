"""DeeR early exit (arXiv 2411.02359): a question leaves the decoder where two exits in a row say nearly the same.

The paper is about actions of a robot: one decision per time step, a head that pools all language tokens, no generated text and no
cache. What is compared here are next-token distributions of one exit head that all depths share; that, the text losses
(`models/exiting.py`) and what happens to the cache are this project's. Two flat distributions are also close, so that "no change"
need not be "sure": `confidence` stands beside it.

Axes: V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.config.parsing import require
from dynllava_jax.methods.exits import Exit, ExitOptions

EPS = 1e-5  # of the cosine, as in the authors' code


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  length = lambda x: jnp.sqrt(jnp.square(x).sum(-1))
  return 1 - (a * b).sum(-1) / jnp.maximum(length(a) * length(b), EPS)


DISTANCES = {
  'rms': lambda a, b: jnp.sqrt(jnp.square(a - b).mean(-1)),  # the code calls it L2
  'mean': lambda a, b: jnp.abs(a - b).mean(-1),
  'max': lambda a, b: jnp.abs(a - b).max(-1),
  'cosine': _cosine,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeerOptions(ExitOptions):
  """`distance` between what two exits say: `rms` (the published one), `mean`, `max` or `cosine`."""

  distance: str = 'rms'

  def __post_init__(self):
    super().__post_init__()
    require(self.distance in DISTANCES, f'distance is {self.distance!r}, expected one of {", ".join(DISTANCES)}')


EXIT = Exit(
  measure=lambda here, before, options: DISTANCES[options.distance](here, before),
  compares=True,
  options=DeerOptions,
  source='arXiv 2411.02359; github.com/yueyang130/DeeR-VLA',
  verified="the authors' thresholds and distances; exits, tokens, logits and gradients of this project's text form, in torch",
)
