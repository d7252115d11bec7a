"""The training objective (paper section 3.3): cross-entropy plus keep-rate penalties.

Every mean is over the whole batch, also where only some of its rows are at hand, so the losses of parts add up.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.config import IGNORE, SparsityConfig
from dynllava_jax.models.batch import InstructRule, Prompt, TrainOutput, answer_mask, instruct_start_of
from dynllava_jax.models.layers import batch_split
from dynllava_jax.models.llama import head_logits
from dynllava_jax.ops.layout import gather_rows

CHUNK = 512  # positions of each row whose float32 logits are in memory at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
  """Scalars; `total = ce + mask_loss_weight * (image_mask + text_mask + instruct_mask)`. Keep rates are batch means.

  `relevance` is 0 but in a run that is trained by choices, where `with_relevance` adds it.
  Where nothing is judged mask terms are 0 and keep rates 1. A keep rate is NaN if the batch has nothing that it is about.
  """

  total: jax.Array
  ce: jax.Array
  image_mask: jax.Array
  text_mask: jax.Array
  image_keep: jax.Array
  text_keep: jax.Array
  instruct_mask: jax.Array
  instruct_keep: jax.Array
  relevance: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
  """What the means of a batch are over; known before the model runs.

  Attributes:
    supervised: tokens with a label that some position predicts.
    images: rows with an image, answers: rows with a judged answer, rows: all; those run dense are in none of these.
    instructions: rows with a judged instruction.
    share: 1 over the number of equal parts that the batch is computed in.
  """

  supervised: jax.Array
  images: jax.Array
  answers: jax.Array
  rows: jax.Array
  instructions: jax.Array
  share: float = dataclasses.field(default=1.0, metadata={'static': True})


def count(
  prompt: Prompt, labels: jax.Array, answer_start: jax.Array, dense: jax.Array | None, cfg: SparsityConfig, parts: int = 1
) -> Counts:
  """What the means of this batch are over.

  Args:
    prompt: the batch; labels: int32[B, S]; answer_start: int32[B].
    dense: bool[B], rows that are run dense; None if there are none.
    cfg: the threshold for judged answers.
    parts: number of equal parts that it will be computed in.
  """
  sparse = jnp.ones_like(prompt.length, bool) if dense is None else ~dense
  judged = _judged(prompt, labels, answer_start, cfg)
  return Counts(
    supervised=(labels[:, 1:] != IGNORE).sum(),
    images=((prompt.image_start >= 0) & sparse).sum(),
    answers=(judged.any(-1) & sparse).sum(),
    rows=sparse.sum(),
    instructions=(_judged_instruction(prompt, labels, answer_start, cfg).any(-1) & sparse).sum(),
    share=1 / parts,
  )


def _judged(prompt: Prompt, labels: jax.Array, answer_start: jax.Array, cfg: SparsityConfig) -> jax.Array:
  return answer_mask(jnp.arange(labels.shape[1])[None], prompt.length, answer_start, cfg.min_answer_len)


def instruct_rule(cfg: SparsityConfig) -> InstructRule:
  """Which of an instruction's tokens are judged."""
  return InstructRule(cfg.min_instruct_len, cfg.judge_last_instruct_token)


def _judged_instruction(prompt: Prompt, labels: jax.Array, answer_start: jax.Array, cfg: SparsityConfig) -> jax.Array:
  positions = jnp.arange(labels.shape[1])[None]
  if prompt.instruct_start is None:
    return jnp.zeros((labels.shape[0], labels.shape[1]), bool)
  return instruct_rule(cfg).mask(positions, instruct_start_of(prompt), answer_start)


def cross_entropy(
  hidden: jax.Array, labels: jax.Array, head: jax.Array | None = None, supervised: jax.Array | None = None
) -> jax.Array:
  """Mean over all supervised tokens of the batch; position t predicts label t + 1.

  Args:
    hidden: float[B, S, D], or logits float32[B, S, V] if there is no `head`.
    labels: int32[B, S], `IGNORE` where not supervised.
    head: float[D, V].
    supervised: what to divide the sum by; the number of supervised tokens in `labels` if None.
  """
  targets = labels[:, 1:]
  supervised = (targets != IGNORE).sum() if supervised is None else supervised
  return _cross_entropy(hidden[:, :-1], head, targets, supervised.astype(jnp.float32))


@jax.custom_vjp
def _cross_entropy(hidden, head, targets, supervised):
  """Sum of the targets' negative log-probabilities over `supervised`, chunk by chunk."""

  def add(total, chunk):
    return total + _chunk_loss(head, *chunk)[0], None

  return jax.lax.scan(add, jnp.zeros(()), _chunks(hidden, targets))[0] / supervised


def _with_gradient(hidden, head, targets, supervised):
  """The loss and, from the same logits, its gradients: nothing of a chunk is kept or computed again for the way back."""

  def add(carry, chunk):
    total, head_gradient = carry
    x, target = chunk
    loss, exponentials, normalizer = _chunk_loss(head, x, target)
    weight = ((target != IGNORE) / supervised)[..., None]
    right = jnp.arange(exponentials.shape[-1]) == target[..., None]
    gradient = (exponentials * (weight / normalizer) - jnp.where(right, weight, 0)).astype(x.dtype)
    if head is None:
      return (total + loss, None), gradient
    head_gradient += jnp.einsum('bsd,bsv->dv', x, gradient, preferred_element_type=jnp.float32)
    return (total + loss, head_gradient), batch_split(jnp.einsum('bsv,dv->bsd', gradient, head.astype(x.dtype)))

  start = (jnp.zeros(()), None if head is None else jnp.zeros(head.shape, jnp.float32))
  (total, head_gradient), gradients = jax.lax.scan(add, start, _chunks(hidden, targets))
  joined = gradients.swapaxes(0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, : hidden.shape[1]]
  return total / supervised, (joined, head_gradient if head is None else head_gradient.astype(head.dtype))


def _backward(gradients, g):
  hidden, head = jax.tree.map(lambda x: (x * g).astype(x.dtype), gradients)
  return hidden, head, None, None


_cross_entropy.defvjp(_with_gradient, _backward)


def _chunks(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """float[B, S, D], int32[B, S] -> the same in N chunks of positions, [N, B, C, ...]; the last one is padded."""
  length = hidden.shape[1]
  number = -(-length // CHUNK)
  size = -(-length // number)
  more = [(0, 0), (0, number * size - length)]
  hidden, targets = jnp.pad(hidden, [*more, (0, 0)]), jnp.pad(targets, more, constant_values=IGNORE)
  cut = lambda x: x.reshape(x.shape[0], number, size, *x.shape[2:]).swapaxes(0, 1)
  return cut(hidden), cut(targets)


def _chunk_loss(head: jax.Array | None, x: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(summed loss of a chunk, and what the softmax is made of: float32[B, C, V] exponentials and their sums [B, C, 1])."""
  logits = x if head is None else head_logits(batch_split(x), head)
  shifted = logits - logits.max(-1, keepdims=True)
  exponentials = jnp.exp(shifted)
  normalizer = exponentials.sum(-1, keepdims=True)
  supervised = target != IGNORE
  right = jnp.take_along_axis(shifted, jnp.where(supervised, target, 0)[..., None], -1) - jnp.log(normalizer)
  return -jnp.where(supervised, right[..., 0], 0).sum(), exponentials, normalizer


def remaining(labels: jax.Array, places: jax.Array | None) -> jax.Array:
  """Labels int32[B, S] of the rows at `places` int32[B, S'], as `TrainOutput` has them."""
  return labels if places is None else jnp.where(places >= 0, gather_rows(labels, jnp.maximum(places, 0)), IGNORE)


def training_losses(
  out: TrainOutput, prompt: Prompt, labels: jax.Array, answer_start: jax.Array, cfg: SparsityConfig, counts: Counts | None = None
) -> Losses:
  """Losses of one batch, or what some of its rows contribute to them.

  The image term is the mean over rows with an image of (rate - mean mask)^2, the text term the same over
  last answers; answers shorter than `min_answer_len` contribute 0 but count in the mean. The instruction term is made like the
  image's, of instructions, and short ones contribute 0 but count. Rows run dense are in none.

  Args:
    out: from `train_forward`.
    prompt: the batch; labels: int32[B, S]; answer_start: int32[B].
    cfg: rates, weight and threshold.
    counts: of the whole batch, if these rows are a part of it.
  """
  counts = counts or count(prompt, labels, answer_start, out.dense, cfg)
  ce = cross_entropy(out.hidden, remaining(labels, out.places), out.head, counts.supervised)
  if out.image_mask is None:
    zero, one = jnp.zeros(()), jnp.full((), counts.share)
    return Losses(ce, ce, zero, zero, one, one, zero, one, zero)
  has_image = (prompt.image_start >= 0) & ~out.dense
  image_means = out.image_mask.mean(-1)
  image_term = jnp.where(has_image, jnp.square(cfg.image_keep_rate - image_means), 0).sum() / jnp.maximum(counts.images, 1)
  judged = _judged(prompt, labels, answer_start, cfg) & ~out.dense[:, None]
  lengths = judged.sum(-1)
  text_means = jnp.where(judged, out.text_mask, 0).sum(-1) / jnp.maximum(lengths, 1)
  text_term = jnp.where(lengths > 0, jnp.square(cfg.text_keep_rate - text_means), 0).sum() / jnp.maximum(counts.rows, 1)
  instruct_term, instruct_keep = jnp.zeros(()), jnp.full((), counts.share)
  if out.instruct_mask is not None:
    judged = _judged_instruction(prompt, labels, answer_start, cfg) & ~out.dense[:, None]
    found = judged.any(-1)
    means = jnp.where(judged, out.instruct_mask, 0).sum(-1) / jnp.maximum(judged.sum(-1), 1)
    squares = jnp.where(found, jnp.square(cfg.instruct_keep_rate - means), 0)
    instruct_term = squares.sum() / jnp.maximum(counts.images, 1)
    instruct_keep = jnp.where(found, means, 0).sum() / counts.instructions
  return Losses(
    total=ce + cfg.mask_loss_weight * (image_term + text_term + instruct_term),
    ce=ce,
    image_mask=image_term,
    text_mask=text_term,
    image_keep=jnp.where(has_image, image_means, 0).sum() / counts.images,
    text_keep=jnp.where(lengths > 0, text_means, 0).sum() / counts.answers,
    instruct_mask=instruct_term,
    instruct_keep=instruct_keep,
    relevance=jnp.zeros(()),
  )


def with_relevance(losses: Losses, out: TrainOutput, keep: float, weight: float, counts: Counts) -> Losses:
  """Adds what the scores of image tokens are trained by, a mean over supervised tokens.

  Args:
    losses, counts: of the batch, or of a part of it; out: from `train_forward`.
    keep: share of the image tokens that a generated token sees; weight: of the squared distance from it.
  """
  if out.distance is not None:
    each = out.distance
  elif out.choice is not None:
    each = weight * jnp.square(out.choice.mean(-1) - keep)
  else:
    return losses
  term = jnp.where(out.chooses, each, 0).sum() / jnp.maximum(counts.supervised, 1)
  return dataclasses.replace(losses, relevance=term, total=losses.total + term)
