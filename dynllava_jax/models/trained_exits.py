"""Runs with exits in training: the exit head learns to answer behind every exit, beside the ordinary head behind the last layer.

The sum of three cross-entropies, all of weight 1 as the losses of DeeR (arXiv 2411.02359) are: the ordinary head; the exit head on
the state of an exit drawn for each position; the exit head on that of one exit up to a position drawn for each row, and of another
from there on. The paper has actions of time steps where this has tokens: the form for text is this project's.
Axes: B batch, S sequence, D width, V vocabulary, E exits, the end of the last layer among them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax.config import Objective
from dynllava_jax.methods.training import Drawn, Shape, Training
from dynllava_jax.models import trained_experts
from dynllava_jax.models.batch import Prompt, TrainInputs, TrainOutput
from dynllava_jax.models.cross_entropy import cross_entropy

NAME = 'exits'
READ = ('exit_random', 'exit_two')  # what the exit head reads, and the terms of the loss


def draw(key: jax.Array, shape: Shape, progress: jax.Array, objective: Objective) -> Drawn:
  """Shares in [0, 1) of the exits and of the positions: `exit_random` float32[B, S], `exit_two` float32[B, 2], `cut` float32[B]."""
  del progress, objective
  sizes = {'exit_random': (shape.rows, shape.positions), 'exit_two': (shape.rows, 2), 'cut': (shape.rows,)}
  return Drawn(noise={name: jax.random.uniform(k, size) for k, (name, size) in zip(jax.random.split(key, 3), sizes.items())})


def forward(model: Any, x: jax.Array, prompt: Prompt, inputs: TrainInputs, objective: Objective) -> TrainOutput:
  """Nothing is left out; the exit head reads what was drawn."""
  noise, last = inputs.of(NAME).noise, len(model.stages) - 1
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  exits = [i for i, stage in enumerate(model.stages) if stage.exit or i == last]
  number = lambda share: jnp.floor(share * len(exits)).astype(jnp.int32)
  first = positions < jnp.floor(noise['cut'] * x.shape[1])[:, None] + 1
  two = number(noise['exit_two'])
  wanted = {'exit_random': number(noise['exit_random']), 'exit_two': jnp.where(first, two[:, :1], two[:, 1:])}
  read = {name: jnp.zeros_like(x) for name in READ}
  learning, told = trained_experts.learning(model, inputs, objective, prompt.length, x.shape[1]), []
  for i in range(len(model.stages)):
    x, outputs = model.run_layers(i, x, positions, **learning)
    told += outputs
    for name in READ if i in exits else ():
      read[name] = jnp.where((wanted[name] == exits.index(i))[..., None], x, read[name])
  seen = {name: model.exit_head(states)[0] for name, states in read.items()} | {'exit_matrix': model.exit_head(x[:, :1])[1]}
  hidden, head = model.llama.output(x)
  return TrainOutput(hidden, head=head, seen=seen | trained_experts.seen(told))


def losses(
  out: TrainOutput, prompt: Prompt, inputs: TrainInputs, objective: Objective, counts: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Means over supervised tokens."""
  del prompt, objective
  terms = {name: cross_entropy(out.seen[name], inputs.labels, out.seen['exit_matrix'], counts.supervised) for name in READ}
  return terms, terms


TRAINING = Training(name=NAME, forward=forward, draw=draw, losses=losses)
