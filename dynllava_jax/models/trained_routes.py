"""Dynamic Pyramid Network in training: each row draws kernels from what its routers say, and a hinge loss asks for larger ones.

Routes differ from row to row, so sequences keep their length: what was pooled moves to the left and padding grows, and nothing is
saved. A draw that leaves too few tokens is drawn again, which is a draw among the others.
Axes: B batch, S sequence, P image tokens, D width, K layers with a router, E kernels.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax import methods
from dynllava_jax.config import Objective
from dynllava_jax.methods import dpn
from dynllava_jax.methods.training import Drawn, Shape, Training
from dynllava_jax.models import trained_experts
from dynllava_jax.models.batch import Prompt, TrainInputs, TrainOutput
from dynllava_jax.models.layer_types import LayerOutput
from dynllava_jax.models.pyramid import first_router
from dynllava_jax.ops import pooling

NAME = 'routes'


def draw(key: jax.Array, shape: Shape, progress: jax.Array, objective: Objective) -> Drawn:
  """Gumbel noise float32[B, K, E]; E is the most kernels that a router chooses from."""
  del progress, objective
  kernels = shape.model.dpn.kernels
  return Drawn(noise=jax.random.gumbel(key, (shape.rows, len(kernels), max(map(len, kernels)))))


def forward(model: Any, x: jax.Array, prompt: Prompt, inputs: TrainInputs, objective: Objective) -> TrainOutput:
  """Positions are numbered anew in every stage; labels go with their rows, see `TrainOutput.places`."""
  cfg, noise = model.cfg.dpn, inputs.of(NAME).noise
  places = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
  places = jnp.where(places < prompt.length[:, None], places, -1)
  positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
  has_image = prompt.image_start >= 0
  side = jnp.where(has_image, dpn.side_of(model.num_image), 0)
  seen: dict[str, jax.Array] = {}
  told: list[LayerOutput] = []
  for i, stage in enumerate(model.stages):
    if stage.selector == 'dpn_routed':
      depth = cfg.layers.index(stage.start)
      kernels = jnp.asarray(cfg.kernels[depth])
      probabilities = model.dpn(first_router(x, places, prompt, cfg.router_id, model.num_image))[stage.start]
      pooled = side * side >= dpn.FEWEST
      ceil = methods.selector_of(stage)[1].ceil
      left = (-(-side[:, None] // kernels)) ** 2 if ceil else (side * side)[:, None] // kernels**2
      allowed = (left >= objective.dpn.fewest) | ((kernels == kernels.min()) & (left.max(-1, keepdims=True) < objective.dpn.fewest))
      scores = jnp.log(probabilities) + noise[:, depth, : len(kernels)]
      chosen = jnp.argmax(jnp.where(allowed, jax.lax.stop_gradient(scores), -jnp.inf), -1)
      weight = jnp.where(pooled, jnp.take_along_axis(probabilities, chosen[:, None], 1)[:, 0], 1.0)
      kernel = jnp.where(pooled, kernels[chosen], 1)
      x, places, side = pooling.pool_rows(x, places, prompt.image_start, side, kernel, weight, max(cfg.kernels[depth]), ceil)
      seen |= {
        f'route_{depth}': jnp.where(pooled, chosen, -1),
        f'probabilities_{depth}': probabilities,
        f'scale_{depth}': jnp.where(pooled, jnp.argmax(probabilities, -1) * probabilities.max(-1), 0.0),
      }
    learning = trained_experts.learning(model, inputs, objective, (places >= 0).sum(-1), x.shape[1])
    x, layers = model.run_layers(i, x, positions, **learning)
    told += layers
  hidden, head = model.llama.output(x)
  return TrainOutput(hidden, head=head, places=places, seen=seen | trained_experts.seen(told))


def losses(
  out: TrainOutput, prompt: Prompt, inputs: TrainInputs, objective: Objective, counts: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """`weight` times the mean over layers of max(0, `target` - mean over rows of the likeliest kernel's number times its likelihood).

  The authors' code takes one hinge of the mean over layers and rows. Of a batch that is computed in parts the hinge is each part's.
  """
  del prompt, inputs
  cfg, terms = objective.dpn, []
  for name, scale in out.seen.items():
    if name.startswith('scale_'):
      pooled = out.seen[name.replace('scale', 'route')] >= 0
      mean = scale.sum() / jnp.maximum(pooled.sum(), 1)
      terms.append(jnp.where(pooled.any(), jnp.maximum(cfg.target - mean, 0.0), 0.0))
  term = sum(terms) / max(len(terms), 1) * counts.share
  return {NAME: cfg.weight * term}, {'routing': term}


TRAINING = Training(name=NAME, forward=forward, draw=draw, losses=losses)
