"""Forward passes of training over sequences of full length: keep masks in place of gathers, a choice for every query row, or cuts.

Axes: B batch, S sequence, P image tokens, D width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax import methods
from dynllava_jax.config import IGNORE, judges_instructions
from dynllava_jax.methods import revisit
from dynllava_jax.models import reduction
from dynllava_jax.models.batch import InstructRule, Prompt, TrainOutput, answer_mask, instruct_start_of
from dynllava_jax.ops import layout
from dynllava_jax.ops.selection import gumbel_keep, threshold_keep
from dynllava_jax.ops.visibility import Visible


def with_masks(
  model: Any,
  x: jax.Array,
  prompt: Prompt,
  answer_start: jax.Array,
  min_answer_len: int,
  noise: tuple[jax.Array, ...] | None,
  tau: jax.Array | None,
  dense: jax.Array | None,
  instruct: InstructRule | None,
) -> TrainOutput:
  """Masks weigh the keys of a dynamic stage; x is float[B, S, D], embedded, the rest as in `DynLlava.train_forward`."""
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  policy, out = None, {}
  for i, stage in enumerate(model.stages):
    if methods.get(stage.selector).training:
      image_logits = model.image_predictor(layout.take_image_rows(x, prompt.image_start, model.num_image))
      text_logits = model.text_predictor(x)
      has_image = (prompt.image_start >= 0)[:, None]
      image_mask = jnp.where(has_image, gumbel_keep(image_logits, noise[0], tau), 1.0)
      text_mask = gumbel_keep(text_logits, noise[1], tau)
      slot, is_image = layout.image_slots(positions, prompt.image_start, model.num_image)
      judged = answer_mask(positions, prompt.length, answer_start, min_answer_len)
      policy = jnp.where(is_image, layout.gather_rows(image_mask, slot), jnp.where(judged, text_mask, 1.0))
      if judges_instructions((stage,)):
        instruct_logits = model.instruct_predictor(x)
        instruct_mask = gumbel_keep(instruct_logits, noise[2], tau)
        policy = jnp.where(
          (instruct or InstructRule()).mask(positions, instruct_start_of(prompt), answer_start), instruct_mask, policy
        )
        out = dict(instruct_logits=instruct_logits, instruct_mask=instruct_mask)
      dense = jnp.zeros_like(prompt.length, bool) if dense is None else dense
      policy = jnp.where(dense[:, None], 1.0, policy)
      out['policy'] = policy
      out |= dict(image_logits=image_logits, text_logits=text_logits, image_mask=image_mask, text_mask=text_mask, dense=dense)
    x, _ = model.run_layers(i, x, positions, policy=policy)
  hidden, head = model.llama.output(x)
  return TrainOutput(hidden, head=head, **out)


def with_choices(
  model: Any,
  x: jax.Array,
  prompt: Prompt,
  labels: jax.Array,
  objective: str,
  noise: tuple[jax.Array, ...] | None,
  dense: jax.Array | None,
) -> TrainOutput:
  """Rows of answers choose among the image tokens, as generated ones do; all others see everything.

  `distil`: nobody is restricted, and every layer tells how far the scores are from its own attention. `gumbel`: masks are drawn,
  with the gradient of a sigmoid. `decoder`: the k best, without a gradient to the scores.

  Args:
    model: the `DynLlava`; x: float[B, S, D], embedded.
    prompt: the batch; labels: int32[B, S], rows that have one are answers.
    objective: see above; noise: of `gumbel`, float32[B, S, P] of a logistic distribution.
    dense: bool[B], rows that see everything; none if None.
  """
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  rows = reduction.start(x, prompt.length, model.num_image).rows(prompt.image_start)
  answers = (labels != IGNORE) & (prompt.image_start >= 0)[:, None]
  answers = answers if dense is None else answers & ~dense[:, None]
  visible, target, more = None, None, {}
  for i in range(len(model.stages)):
    if choosing := model.chooser_of(i):
      scores = choosing.scores_in_place(x, positions, rows)
      if objective == 'distil':
        target = jax.nn.log_softmax(scores, -1)
      else:
        if objective == 'gumbel':
          image = threshold_keep(scores + noise[0])
          more = dict(choice=image)
        else:
          image = revisit.seen(revisit.choose(scores, choosing.count), model.num_image)
        image = jnp.where(answers[..., None], image, jnp.ones_like(image))
        visible = Visible(image, prompt.image_start)
    x, out = model.run_layers(i, x, positions, visible=visible, target=target, rows=None if target is None else rows)
    if target is not None:
      total = out.details['distance'].sum(0)
      more = dict(distance=total if 'distance' not in more else more['distance'] + total)
  hidden, head = model.llama.output(x)
  return TrainOutput(hidden, head=head, chooses=answers, dense=dense, **more)


def with_cuts(model: Any, x: jax.Array, prompt: Prompt, labels: jax.Array) -> TrainOutput:
  """A sequence that is cut at each stage as in a prefill; answers are part of the prompt then. Arguments as in `with_choices`."""
  state, weights, kept = model.start(x, prompt, None), {}, []
  for i, stage in enumerate(model.stages):
    selector, options = methods.selector_of(stage)
    weights[i] = selector.training_weight(labels, options) if selector.training_weight else None
    state, _, _ = model.reduce(i, state, prompt, None, weights, answer_start=None)
    kept.append(state.image_index)
    x, _ = model.run_layers(i, state.x, state.rotary)
    state = dataclasses.replace(state, x=x)
  hidden, head = model.llama.output(state.x)
  real = jnp.arange(hidden.shape[1]) < state.length[:, None]
  return TrainOutput(hidden, head=head, places=jnp.where(real, state.positions, -1), kept_image=tuple(kept))
