"""Baseline: every n-th image token, where n = P / M may be fractional."""

import jax.numpy as jnp

from dynllava_jax.methods.base import Chosen, Selector, SelectorInputs


def select(inputs: SelectorInputs, budget: int, options):
  """Indices floor(i * P / M) for i < M, the same in every row."""
  batch, num_image = inputs.image_hidden.shape[:2]
  return Chosen(index=jnp.broadcast_to((jnp.arange(budget) * num_image // budget).astype(jnp.int32), (batch, budget)))


SELECTOR = Selector(select=select)
