"""Runs whose sequence is cut at each stage in training as in a prefill, and plain ones; answers are part of the prompt then.

Axes: B batch, S sequence, D width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax import methods
from dynllava_jax.config import Objective
from dynllava_jax.methods.training import Training
from dynllava_jax.models.batch import Prompt, TrainInputs, TrainOutput


def forward(model: Any, x: jax.Array, prompt: Prompt, inputs: TrainInputs, objective: Objective) -> TrainOutput:
  """Labels go with their rows, see `TrainOutput.places`."""
  del objective
  state, weights, kept = model.start(x, prompt, None), {}, []
  for i, stage in enumerate(model.stages):
    selector, options = methods.selector_of(stage)
    weights[i] = selector.training_weight(inputs.labels, options) if selector.training_weight else None
    state, _, _ = model.reduce(i, state, prompt, None, weights, answer_start=None)
    kept.append(state.image_index)
    x, _ = model.run_layers(i, state.x, state.rotary)
    state = dataclasses.replace(state, x=x)
  hidden, head = model.llama.output(state.x)
  real = jnp.arange(hidden.shape[1]) < state.length[:, None]
  return TrainOutput(hidden, head=head, places=jnp.where(real, state.positions, -1), kept_image=tuple(kept))


def dense(model: Any, x: jax.Array, prompt: Prompt, inputs: TrainInputs, objective: Objective) -> TrainOutput:
  """Nothing is left out."""
  del prompt, inputs, objective
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  for i in range(len(model.stages)):
    x, _ = model.run_layers(i, x, positions)
  hidden, head = model.llama.output(x)
  return TrainOutput(hidden, head=head)


TRAINING = Training(name='gathers', forward=forward)
DENSE = Training(name='dense', forward=dense)
