"""Causal attention in which not every query sees the same: of the image what was chosen for it, of text what had not left by then.

Axes: B batch, S sequence, N heads, K kv heads, G query heads per kv head, H head dim, M image tokens. Softmax is in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.ops import layout
from dynllava_jax.ops.attention import causal_blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
  """What queries see of what stands before them.

  Attributes:
    image: of each row the image tokens that it sees, bool[B, S, M], or float[B, S, M] of weights with a gradient; None for all.
    image_start: int32[B], place of the first image token, -1 without image.
    positions: int32[B, S], places in the full sequence, and until: int32[B, S], the last of them that sees a key; None for all.
  """

  image: jax.Array | None = None
  image_start: jax.Array | None = None
  positions: jax.Array | None = None
  until: jax.Array | None = None


def visible_attention(q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible) -> jax.Array:
  """Each query sees itself and, of what stands before it, what `visible` says.

  Scores of a block of queries are made again on the way back, so that no [S, S] matrix is kept.

  Args:
    q: float[B, S, N, H]; k, v: float[B, S, K, H].
    visible: see `Visible`.

  Returns:
    float[B, S, N, H].
  """
  batch, length, _, head_dim = q.shape
  grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
  blocks = []
  for start, end in causal_blocks(length):
    rows = jax.tree.map(lambda x: x if x.ndim == 1 else x[:, start:end], visible)
    keys = None if visible.until is None else visible.until[:, :end]
    block = jax.checkpoint(_attend, static_argnums=(5,))
    blocks.append(block(grouped[:, start:end], k[:, :end], v[:, :end], rows, keys, start))
  return jnp.concatenate(blocks, 1).reshape(q.shape).astype(v.dtype)


def _attend(q, k, v, rows: Visible, until: jax.Array | None, start: int):
  key = jnp.arange(k.shape[1])
  query = start + jnp.arange(q.shape[1])[:, None]
  mask, weight = jnp.broadcast_to(key <= query, (q.shape[0], q.shape[1], k.shape[1])), None
  if until is not None:
    mask &= (rows.positions[:, :, None] <= until[:, None]) | (key == query)
  if rows.image is not None:
    slot, is_image = layout.image_slots(key[None], rows.image_start, rows.image.shape[2])
    spread = jnp.take_along_axis(rows.image, jnp.broadcast_to(slot[:, None], mask.shape), 2, mode='clip')
    if rows.image.dtype == jnp.bool_:
      mask &= spread | ~is_image[:, None] | (key == query)
    else:
      weight = jnp.where(is_image[:, None] & (key != query), spread, 1.0)
  scores = jnp.einsum('btkgh,bskh->bkgts', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
  if weight is not None:
    weights *= weight[:, None, None]
  weights /= weights.sum(-1, keepdims=True)
  return jnp.einsum('bkgts,bskh->btkgh', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def attention_distance(q: jax.Array, k: jax.Array, log_prob: jax.Array, image_start: jax.Array) -> jax.Array:
  """Cross-entropy of a distribution over the image with a layer's own attention to it, its heads' mean weighted by its mass.

  Args:
    q: float[B, S, N, H], k: float[B, S, K, H], rotated.
    log_prob: float32[B, S, M] of each row; image_start: int32[B].

  Returns:
    float32[B, S], without a gradient to q and k.
  """
  batch, length, _, head_dim = q.shape
  grouped = jax.lax.stop_gradient(q.reshape(batch, length, k.shape[2], -1, head_dim))
  k, count = jax.lax.stop_gradient(k), log_prob.shape[2]
  blocks = []
  for start, end in causal_blocks(length):
    visible = jnp.arange(end) <= jnp.arange(start, end)[:, None]
    scores = jnp.einsum('btkgh,bskh->bkgts', grouped[:, start:end], k[:, :end], preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible, scores * head_dim**-0.5, -jnp.inf), -1).mean((1, 2))
    weights = jnp.pad(weights, [(0, 0), (0, 0), (0, length - end)])
    place = jnp.broadcast_to(jnp.maximum(image_start, 0)[:, None, None] + jnp.arange(count), (batch, end - start, count))
    of_image = jnp.take_along_axis(weights, place, 2, mode='clip')
    blocks.append(-(of_image * log_prob[:, start:end]).sum(-1))
  return jnp.concatenate(blocks, 1)
