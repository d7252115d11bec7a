"""Runs with a `revisit` stage in training: rows of answers choose among the image tokens, as generated ones do; others see all.

`distil`: nobody is restricted, and every layer tells how far the scores are from its own attention. `gumbel`: masks are drawn,
with the gradient of a sigmoid. `decoder`: the k best, without a gradient to the scores.
Axes: B batch, S sequence, P image tokens, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax.config import IGNORE, Objective
from dynllava_jax.methods import revisit
from dynllava_jax.methods.training import Drawn, Shape, Training
from dynllava_jax.models import reduction, trained_experts
from dynllava_jax.models.batch import Prompt, TrainInputs, TrainOutput
from dynllava_jax.ops.selection import threshold_keep
from dynllava_jax.ops.visibility import Visible

NAME = 'choices'


def draw(key: jax.Array, shape: Shape, progress: jax.Array, objective: Objective) -> Drawn:
  """For `gumbel` noise of a logistic distribution, float32[B, S, P]; rows that see everything."""
  del progress
  noise_key, dense_key = jax.random.split(key)
  noise = None
  if objective.relevance.objective == 'gumbel':
    noise = (jax.random.logistic(noise_key, (shape.rows, shape.positions, shape.image)),)
  return Drawn(noise=noise, dense=jax.random.bernoulli(dense_key, objective.sparsity.dense_share, (shape.rows,)))


def forward(model: Any, x: jax.Array, prompt: Prompt, inputs: TrainInputs, objective: Objective) -> TrainOutput:
  """Rows with a label are answers."""
  drawn, how = inputs.of(NAME), objective.relevance.objective
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  rows = reduction.start(x, prompt.length, model.num_image).rows(prompt.image_start)
  answers = (inputs.labels != IGNORE) & (prompt.image_start >= 0)[:, None]
  answers = answers if drawn.dense is None else answers & ~drawn.dense[:, None]
  visible, target, share, more, told = None, None, 1.0, {}, []
  learning = trained_experts.learning(model, inputs, objective, prompt.length, x.shape[1])
  for i in range(len(model.stages)):
    if choosing := model.chooser_of(i):
      share = choosing.count / model.num_image
      scores = choosing.scores_in_place(x, positions, rows)
      if how == 'distil':
        target = jax.nn.log_softmax(scores, -1)
      else:
        if how == 'gumbel':
          image = threshold_keep(scores + drawn.noise[0])
          more = dict(choice=image)
        else:
          image = revisit.seen(revisit.choose(scores, choosing.count), model.num_image)
        image = jnp.where(answers[..., None], image, jnp.ones_like(image))
        visible = Visible(image, prompt.image_start)
    x, (out,) = model.run_layers(i, x, positions, visible=visible, target=target, rows=None if target is None else rows, **learning)
    told.append(out)
    if target is not None:
      total = out.details['distance'].sum(0)
      more = dict(distance=total if 'distance' not in more else more['distance'] + total)
  hidden, head = model.llama.output(x)
  return TrainOutput(
    hidden, head=head, chooses=answers, dense=drawn.dense, seen=dict(share=jnp.float32(share)) | trained_experts.seen(told), **more
  )


def losses(
  out: TrainOutput, prompt: Prompt, inputs: TrainInputs, objective: Objective, counts: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """What the scores of image tokens are trained by, a mean over supervised tokens: distance, or squared distance from the share."""
  del prompt, inputs
  if out.distance is not None:
    each = out.distance
  elif out.choice is not None:
    each = objective.relevance.weight * jnp.square(out.choice.mean(-1) - out.seen['share'])
  else:
    return {}, {'relevance': jnp.zeros(())}
  term = jnp.where(out.chooses, each, 0).sum() / jnp.maximum(counts.supervised, 1)
  return {'relevance': term}, {'relevance': term}


TRAINING = Training(name=NAME, forward=forward, draw=draw, losses=losses)
