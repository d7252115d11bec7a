"""Baselines: image tokens drawn without replacement, from each row's own seed, and generated tokens that stay by chance."""

import jax

from dynllava_jax.methods.base import Chosen, Selector, SelectorInputs
from dynllava_jax.methods.gate import Fed, Gate, GateState
from dynllava_jax.ops.selection import top_indices


def select(inputs: SelectorInputs, budget: int, options):
  """A uniformly random subset of each row's image tokens."""
  num_image = inputs.image_hidden.shape[1]
  scores = jax.vmap(lambda s: jax.random.uniform(jax.random.key(s), (num_image,)))(inputs.seed)
  return Chosen(index=top_indices(scores, budget))


SELECTOR = Selector(select=select)


def draw(fed: Fed, state: GateState, options):
  """Uniform in [0, 1), by a token's number and identity alone, so that a replay draws the same."""
  key = jax.random.key(0)
  one = lambda number, token: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, number), token))
  return jax.vmap(one)(state.fed, fed.token)


GATE = Gate(score=draw)
