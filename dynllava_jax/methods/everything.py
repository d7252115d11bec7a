"""Keeps every token: the selector of dense stages."""

import jax.numpy as jnp

from dynllava_jax.methods.base import Chosen, Selector, SelectorInputs


def select(inputs: SelectorInputs, budget: int, options):
  """The first `budget` image tokens; a stage with this selector has a budget of all of them."""
  return Chosen(index=jnp.broadcast_to(jnp.arange(budget, dtype=jnp.int32), (inputs.image_hidden.shape[0], budget)))


SELECTOR = Selector(select=select)
