"""Dynamic-LLaVA in training (paper section 3.3): keep masks in place of gathers, over sequences of full length.

Masks are drawn by straight-through Gumbel-softmax, and squared distances from the shares to keep are added to the loss.
Axes: B batch, S sequence, P image tokens, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax import methods
from dynllava_jax.config import Objective, SparsityConfig, judges_instructions
from dynllava_jax.methods.training import Drawn, Shape, Training
from dynllava_jax.models import trained_experts
from dynllava_jax.models.batch import InstructRule, Prompt, TrainInputs, TrainOutput, answer_mask, instruct_start_of
from dynllava_jax.ops import layout
from dynllava_jax.ops.selection import gumbel_keep

INSTRUCT = 2**31 + 2  # what the key of the noise for instructions is made with
NAME = 'masks'


def temperature(progress: jax.Array, cfg: SparsityConfig) -> jax.Array:
  """tau = start * (end / start)^(step / steps), as the authors' trainer sets it before each step; `progress` is step / steps."""
  return cfg.tau_start * (cfg.tau_end / cfg.tau_start) ** progress


def instruct_rule(cfg: SparsityConfig) -> InstructRule:
  """Which of an instruction's tokens are judged."""
  return InstructRule(cfg.min_instruct_len, cfg.judge_last_instruct_token)


def draw(key: jax.Array, shape: Shape, progress: jax.Array, objective: Objective) -> Drawn:
  """Gumbel(0, 1) noise, float32[B, P, 2] for the image, [B, S, 2] for the text and once more for instructions; rows run dense."""
  noise_key, dense_key = jax.random.split(key)
  image_key, text_key = jax.random.split(noise_key)
  of_text = shape.rows, shape.positions, 2
  noise = jax.random.gumbel(image_key, (shape.rows, shape.image, 2)), jax.random.gumbel(text_key, of_text)
  if shape.model.predictor is not None and shape.model.predictor.instruct:
    noise = *noise, jax.random.gumbel(jax.random.fold_in(noise_key, INSTRUCT), of_text)
  dense = jax.random.bernoulli(dense_key, objective.sparsity.dense_share, (shape.rows,))
  return Drawn(noise=noise, dense=dense, told={'tau': temperature(progress, objective.sparsity)})


def forward(model: Any, x: jax.Array, prompt: Prompt, inputs: TrainInputs, objective: Objective) -> TrainOutput:
  """The image mask and the mask of the last answer weigh the keys from the dynamic stage on; short answers are kept whole."""
  cfg, drawn = objective.sparsity, inputs.of(NAME)
  noise, tau, answer_start = drawn.noise, drawn.told.get('tau'), inputs.answer_start
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  policy, out, told = None, {}, []
  learning = trained_experts.learning(model, inputs, objective, prompt.length, x.shape[1])
  for i, stage in enumerate(model.stages):
    if methods.get(stage.selector).training:
      image_logits = model.image_predictor(layout.take_image_rows(x, prompt.image_start, model.num_image))
      text_logits = model.text_predictor(x)
      has_image = (prompt.image_start >= 0)[:, None]
      image_mask = jnp.where(has_image, gumbel_keep(image_logits, noise[0], tau), 1.0)
      text_mask = gumbel_keep(text_logits, noise[1], tau)
      slot, is_image = layout.image_slots(positions, prompt.image_start, model.num_image)
      judged = answer_mask(positions, prompt.length, answer_start, cfg.min_answer_len)
      policy = jnp.where(is_image, layout.gather_rows(image_mask, slot), jnp.where(judged, text_mask, 1.0))
      if judges_instructions((stage,)):
        instruct_logits = model.instruct_predictor(x)
        instruct_mask = gumbel_keep(instruct_logits, noise[2], tau)
        policy = jnp.where(instruct_rule(cfg).mask(positions, instruct_start_of(prompt), answer_start), instruct_mask, policy)
        out = dict(instruct_logits=instruct_logits, instruct_mask=instruct_mask)
      dense = jnp.zeros_like(prompt.length, bool) if drawn.dense is None else drawn.dense
      policy = jnp.where(dense[:, None], 1.0, policy)
      out['policy'] = policy
      out |= dict(image_logits=image_logits, text_logits=text_logits, image_mask=image_mask, text_mask=text_mask, dense=dense)
    x, layers = model.run_layers(i, x, positions, policy=policy, **learning)
    told += layers
  hidden, head = model.llama.output(x)
  return TrainOutput(hidden, head=head, seen=trained_experts.seen(told), **out)


def counts(prompt: Prompt, inputs: TrainInputs, objective: Objective) -> dict[str, jax.Array]:
  """images: rows with an image, answers: rows with a judged answer, rows: all; those run dense are in none of these.

  instructions: rows with a judged instruction.
  """
  dense = inputs.of(NAME).dense
  sparse = jnp.ones_like(prompt.length, bool) if dense is None else ~dense
  judged, instructions = _judged(prompt, inputs, objective), _judged_instruction(prompt, inputs, objective)
  return dict(
    images=((prompt.image_start >= 0) & sparse).sum(),
    answers=(judged.any(-1) & sparse).sum(),
    rows=sparse.sum(),
    instructions=(instructions.any(-1) & sparse).sum(),
  )


def _judged(prompt: Prompt, inputs: TrainInputs, objective: Objective) -> jax.Array:
  positions = jnp.arange(prompt.tokens.shape[1])[None]
  return answer_mask(positions, prompt.length, inputs.answer_start, objective.sparsity.min_answer_len)


def _judged_instruction(prompt: Prompt, inputs: TrainInputs, objective: Objective) -> jax.Array:
  if prompt.instruct_start is None:
    return jnp.zeros(prompt.tokens.shape, bool)
  positions = jnp.arange(prompt.tokens.shape[1])[None]
  return instruct_rule(objective.sparsity).mask(positions, instruct_start_of(prompt), inputs.answer_start)


def losses(
  out: TrainOutput, prompt: Prompt, inputs: TrainInputs, objective: Objective, counts: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """({'masks': `mask_loss_weight` times the sum of the terms}, the terms `*_mask` and the keep rates `*_keep`, batch means).

  The image term is the mean over rows with an image of (rate - mean mask)^2, the text term the same over
  last answers; answers shorter than `min_answer_len` contribute 0 but count in the mean. The instruction term is made like the
  image's, of instructions, and short ones contribute 0 but count. Rows run dense are in none. A keep rate is NaN if the batch has
  nothing that it is about.
  """
  cfg, of = objective.sparsity, counts.more
  has_image = (prompt.image_start >= 0) & ~out.dense
  image_means = out.image_mask.mean(-1)
  image_term = jnp.where(has_image, jnp.square(cfg.image_keep_rate - image_means), 0).sum() / jnp.maximum(of['images'], 1)
  judged = _judged(prompt, inputs, objective) & ~out.dense[:, None]
  lengths = judged.sum(-1)
  text_means = jnp.where(judged, out.text_mask, 0).sum(-1) / jnp.maximum(lengths, 1)
  text_term = jnp.where(lengths > 0, jnp.square(cfg.text_keep_rate - text_means), 0).sum() / jnp.maximum(of['rows'], 1)
  instruct_term, instructions = jnp.zeros(()), {}
  if out.instruct_mask is not None:
    judged = _judged_instruction(prompt, inputs, objective) & ~out.dense[:, None]
    found = judged.any(-1)
    means = jnp.where(judged, out.instruct_mask, 0).sum(-1) / jnp.maximum(judged.sum(-1), 1)
    squares = jnp.where(found, jnp.square(cfg.instruct_keep_rate - means), 0)
    instruct_term = squares.sum() / jnp.maximum(of['images'], 1)
    instructions = dict(instruct_mask=instruct_term, instruct_keep=jnp.where(found, means, 0).sum() / of['instructions'])
  shown = dict(
    image_mask=image_term,
    text_mask=text_term,
    image_keep=jnp.where(has_image, image_means, 0).sum() / of['images'],
    text_keep=jnp.where(lengths > 0, text_means, 0).sum() / of['answers'],
  )
  return {NAME: cfg.mask_loss_weight * (image_term + text_term + instruct_term)}, shown | instructions


TRAINING = Training(name=NAME, forward=forward, draw=draw, counts=counts, losses=losses)
