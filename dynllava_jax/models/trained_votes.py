"""Runs whose layers vote on their context in training: sequences of full length, keys weighed by what is left of them.

What is minimised besides the cross-entropy is the share of entries of the survival matrix that are left, over all layers that vote,
real queries but the last and real keys; those on and above the diagonal are 1 whatever happens, so it ends near a half (as the
authors of arXiv 2305.15805 have it). Axes: B batch, S sequence, D width, L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax import methods
from dynllava_jax.config import Objective
from dynllava_jax.methods.training import Drawn, Shape, Training
from dynllava_jax.models import reduction, trained_experts
from dynllava_jax.models.batch import Prompt, TrainInputs, TrainOutput
from dynllava_jax.ops.pruning import Softness

NAME = 'votes'
LEFT, ROWS = 'survival/', 'voting'


def draw(key: jax.Array, shape: Shape, progress: jax.Array, objective: Objective) -> Drawn:
  """Rows that nobody votes in; alpha rises from start to end along half a cosine."""
  cfg = objective.pruning
  alpha = cfg.alpha_end + 0.5 * (cfg.alpha_start - cfg.alpha_end) * (1 + jnp.cos(jnp.pi * progress))
  dense = jax.random.bernoulli(key, cfg.dense_share, (shape.rows,))
  return Drawn(dense=dense, told={'alpha': jnp.asarray(alpha, jnp.float32)})


def forward(model: Any, x: jax.Array, prompt: Prompt, inputs: TrainInputs, objective: Objective) -> TrainOutput:
  """Without an alpha among what was drawn votes are those of generation."""
  drawn = inputs.of(NAME)
  learning, told = trained_experts.learning(model, inputs, objective, prompt.length, x.shape[1]), []
  softness = Softness(drawn.told['alpha'], drawn.dense) if 'alpha' in drawn.told else None
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  rows, left, seen = reduction.start(x, prompt.length, model.num_image).rows(prompt.image_start), {}, {}
  for i, stage in enumerate(model.stages):
    votes = methods.bound(stage.layers, 'layers', methods.LayerKind())[0].voting is not None
    x, (out,) = model.run_layers(i, x, positions, rows=rows if votes else None, softness=softness, **learning)
    told.append(out)
    if votes:
      totals = zip(model.llama.layers_of(i), out.details['survival_total'])
      left |= {f'{LEFT}{layer}': total for layer, total in totals}
      seen[f'of_keys/{i}'] = out.details['survival']
  hidden, head = model.llama.output(x)
  return TrainOutput(hidden, head=head, dense=drawn.dense, seen=left | seen | trained_experts.seen(told))


def counts(prompt: Prompt, inputs: TrainInputs, objective: Objective) -> dict[str, jax.Array]:
  """Rows that somebody votes in."""
  del objective
  return {ROWS: _voting(prompt, inputs).sum()}


def losses(
  out: TrainOutput, prompt: Prompt, inputs: TrainInputs, objective: Objective, counts: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """The term, and of each layer `held/LAYER`: the share of earlier tokens that queries find, a mean over rows, queries and keys."""
  voting, length = _voting(prompt, inputs), prompt.length.astype(jnp.float32)
  rows = jnp.maximum(counts.more[ROWS], 1)
  mean = lambda of_rows: jnp.where(voting, of_rows, 0).sum() / rows
  pairs = (length - 1) * (length - 2) / 2  # of a query but the last and an earlier key
  constant = length * (length - 1) - pairs
  terms, shown = [], {}
  for name, total in out.seen.items():
    if name.startswith(LEFT):
      terms.append(mean(total / jnp.maximum(length * (length - 1), 1)))
      shown[f'held/{name.removeprefix(LEFT)}'] = mean((total - constant) / jnp.maximum(pairs, 1))
  sparsity = objective.pruning.gamma * jnp.stack(terms).mean()
  return {'sparsity': sparsity}, shown | {'sparsity': sparsity}


def _voting(prompt: Prompt, inputs: TrainInputs) -> jax.Array:
  """bool[B]."""
  dense = inputs.of(NAME).dense
  return jnp.ones_like(prompt.length, bool) if dense is None else ~dense


TRAINING = Training(name=NAME, forward=forward, draw=draw, counts=counts, losses=losses)
