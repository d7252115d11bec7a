"""The training objective: cross-entropy, and what the methods of a run add to it.

Every mean is over the whole batch, also where only some of its rows are at hand, so the losses of parts add up.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dynllava_jax.config import IGNORE, Objective
from dynllava_jax.methods.training import Training
from dynllava_jax.models.batch import Prompt, TrainInputs, TrainOutput
from dynllava_jax.models.layers import batch_split
from dynllava_jax.models.llama import head_logits
from dynllava_jax.ops.layout import gather_rows

CHUNK = 512  # positions of each row whose float32 logits are in memory at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
  """Scalars: `total` is `ce` and the terms of the run's methods; `shown`: what is logged of these, by name."""

  total: jax.Array
  ce: jax.Array
  shown: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
  """What the means of a batch are over; known before the model runs.

  Attributes:
    supervised: tokens with a label that some position predicts.
    more: what the run's methods count besides, by name.
    share: 1 over the number of equal parts that the batch is computed in.
  """

  supervised: jax.Array
  more: dict[str, jax.Array]
  share: float = dataclasses.field(default=1.0, metadata={'static': True})


def count(prompt: Prompt, inputs: TrainInputs, objective: Objective, parts: Sequence[Training], pieces: int = 1) -> Counts:
  """What the means of this batch are over.

  Args:
    prompt, inputs: the batch, with labels int32[B, S].
    objective: settings of the methods; parts: how the run is trained, `models.trained.parts`.
    pieces: number of equal parts that it will be computed in.
  """
  more = {}
  for part in parts:
    more |= part.counts(prompt, inputs, objective)
  return Counts((inputs.labels[:, 1:] != IGNORE).sum(), more, 1 / pieces)


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
  out: TrainOutput,
  prompt: Prompt,
  inputs: TrainInputs,
  objective: Objective,
  parts: Sequence[Training],
  counts: Counts | None = None,
) -> Losses:
  """Losses of one batch, or what some of its rows contribute to them.

  Args:
    out: from `train_forward`.
    prompt, inputs, objective, parts: as in `count`.
    counts: of the whole batch, if these rows are a part of it.
  """
  counts = counts or count(prompt, inputs, objective, parts)
  ce = cross_entropy(out.hidden, remaining(inputs.labels, out.places), out.head, counts.supervised)
  total, shown = ce, {}
  for part in parts:
    terms, told = part.losses(out, prompt, inputs, objective, counts)
    shown |= told
    for term in terms.values():
      total = total + term
  return Losses(total, ce, shown)
