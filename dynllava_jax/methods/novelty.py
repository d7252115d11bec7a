"""Gate: tokens stay whose hidden state at the stage's entry is unlike those of the generated tokens that are held."""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.config.parsing import require
from dynllava_jax.methods.gate import Fed, Gate, GateOptions, GateState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(GateOptions):
  """`against`: 'held' compares with the tokens that are held, 'all' with all that were fed."""

  against: str = 'held'

  def __post_init__(self):
    super().__post_init__()
    require(self.against in ('held', 'all'), f'against is {self.against!r}, expected held or all')


def direction(hidden: jax.Array) -> jax.Array:
  """float32[..., D] of length 1, or 0."""
  hidden = hidden.astype(jnp.float32)
  return hidden * jax.lax.rsqrt(jnp.maximum(jnp.square(hidden).sum(-1, keepdims=True), 1e-12))


def score(fed: Fed, state: GateState, options: Options) -> jax.Array:
  """1 - the largest cosine, between 0 and 2; 2 for the first token."""
  cosine = jnp.einsum('btd,bd->bt', state.memory['directions'], direction(fed.hidden), precision='highest')
  compared = state.held if options.against == 'held' else state.before
  return 1 - jnp.where(compared, cosine, -1).max(-1)


GATE = Gate(
  score=score,
  options=Options,
  memory=lambda rows, size, width, options: {'directions': jnp.zeros((rows, size, width), jnp.float32)},
  remember=lambda fed, options: {'directions': direction(fed.hidden)},
)
