"""Runs whose sequence is cut at each stage in training as in a prefill, and plain ones; answers are part of the prompt then.

Axes: B batch, S sequence, D width.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax import methods
from dynllava_jax.config import Objective
from dynllava_jax.methods.training import Training
from dynllava_jax.models import trained_experts
from dynllava_jax.models.batch import Prompt, TrainInputs, TrainOutput
from dynllava_jax.models.layer_types import LayerOutput
from dynllava_jax.models.stacks import Stack


def forward(model: Any, x: jax.Array, prompt: Prompt, inputs: TrainInputs, objective: Objective) -> TrainOutput:
  """Labels go with their rows, see `TrainOutput.places`."""
  state, weights, kept, seen, told = model.start(x, prompt, None), {}, [], {}, []
  for i, stage in enumerate(model.stages):
    selector, options = methods.selector_of(stage)
    weights[i] = selector.training_weight(inputs.labels, options) if selector.training_weight else None
    state, _, _ = model.reduce(i, state, prompt, None, weights, answer_start=None)
    kept.append(state.image_index)
    rows = state.rows(prompt.image_start) if stage.layers else None
    learning = trained_experts.learning(model, inputs, objective, state.length, state.x.shape[1])
    x, outputs = model.run_layers(i, state.x, state.rotary, rows=rows, **learning)
    told += outputs
    seen |= {name: value for stack, out in zip(model.llama.stacks_in(i), outputs) for name, value in passing(stack, out)}
    state = dataclasses.replace(state, x=x)
  hidden, head = model.llama.output(state.x)
  real = jnp.arange(hidden.shape[1]) < state.length[:, None]
  return TrainOutput(
    hidden, head=head, places=jnp.where(real, state.positions, -1), kept_image=tuple(kept), seen=seen | trained_experts.seen(told)
  )


def passing(stack: Stack, out: LayerOutput) -> Iterator[tuple[str, jax.Array]]:
  """Of layers with routers, bool[B, P], the image tokens that pass each of them."""
  if 'passes' in out.details:
    yield from ((f'passes_{layer}', out.details['passes'][i]) for i, layer in enumerate(stack.layers))


def dense(model: Any, x: jax.Array, prompt: Prompt, inputs: TrainInputs, objective: Objective) -> TrainOutput:
  """Nothing is left out."""
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  learning, told = trained_experts.learning(model, inputs, objective, prompt.length, x.shape[1]), []
  for i in range(len(model.stages)):
    x, layers = model.run_layers(i, x, positions, **learning)
    told += layers
  hidden, head = model.llama.output(x)
  return TrainOutput(hidden, head=head, seen=trained_experts.seen(told))


TRAINING = Training(name='gathers', forward=forward)
DENSE = Training(name='dense', forward=dense)
