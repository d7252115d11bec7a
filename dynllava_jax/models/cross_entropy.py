"""Cross-entropy of next tokens, some positions at a time, so that the logits of all are never in memory.

Axes: B batch, S sequence, D width, V vocabulary, N chunks, C positions of a chunk.
"""

import jax
import jax.numpy as jnp

from dynllava_jax.config import IGNORE
from dynllava_jax.models.layers import batch_split
from dynllava_jax.models.llama import head_logits

CHUNK = 512  # positions of each row whose float32 logits are in memory at a time


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
