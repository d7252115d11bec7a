"""Baseline: image tokens drawn without replacement, from each row's own seed."""

import jax

from dynllava_jax.methods.base import Chosen, Selector, SelectorInputs
from dynllava_jax.ops.selection import top_indices


def select(inputs: SelectorInputs, budget: int, options):
  """A uniformly random subset of each row's image tokens."""
  num_image = inputs.image_hidden.shape[1]
  scores = jax.vmap(lambda s: jax.random.uniform(jax.random.key(s), (num_image,)))(inputs.seed)
  return Chosen(index=top_indices(scores, budget))


SELECTOR = Selector(select=select)
