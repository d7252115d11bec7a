"""SparseVLM (arXiv 2410.04417, version 1_0): text that matches the image rates its tokens; some of what leaves comes back as means.

The authors cut the output of layers 2, 6 and 15: here stages that start at 3, 7 and 16, `Stage(start=3, selector='sparsevlm',
image_tokens=300)` and so on, with their budgets. A stage holds more than its budget, by the means. Positions are numbered anew.
The authors add noise to break ties, here they go to the lower index. What they leave open: if no text behind the image is above
the mean, all of it rates; if the budget is all that is there, nothing is cut.
"""

import jax
import jax.numpy as jnp

from dynllava_jax.config import LlamaConfig
from dynllava_jax.methods.base import Chosen, Rows, Selector, SelectorInputs
from dynllava_jax.ops import layout
from dynllava_jax.ops.selection import top_indices

RECYCLED = 0.3  # share of the dropped tokens that come back
CLUSTER = 10  # of them to a mean, about
EPS = 1e-6


def behind_image(rows: Rows, size: int) -> jax.Array:
  """bool[B, size], text behind the image; none in rows without image."""
  end = (rows.image_start + rows.num_image)[:, None]
  return rows.is_real(size) & (rows.image_start >= 0)[:, None] & (jnp.arange(size) >= end)


def rater_scores(embeddings: jax.Array, rows: Rows) -> jax.Array:
  """How well each text token behind the image matches it: float32[B, S], 0 elsewhere.

  Args:
    embeddings: float[B, S, D], what enters the decoder; rows: of the whole prompt.
  """
  behind = behind_image(rows, embeddings.shape[1])
  image = layout.take_image_rows(embeddings, rows.image_start, rows.num_image)
  match = jnp.einsum('bpd,bsd->bps', image, embeddings, preferred_element_type=jnp.float32, precision='highest')
  shares = jax.nn.softmax(jnp.where(behind[:, None], match, jnp.finfo(jnp.float32).min), -1)
  return jnp.where(behind, shares.mean(1), 0.0)


def rater_weights(embeddings: jax.Array, rows: Rows, options) -> jax.Array:
  """The text tokens above the mean score count alike: float32[B, S], 1 in all, 0 without text behind the image."""
  scores, behind = rater_scores(embeddings, rows), behind_image(rows, embeddings.shape[1])
  above = behind & (scores > scores.sum(-1, keepdims=True) / jnp.maximum(behind.sum(-1, keepdims=True), 1))
  raters = jnp.where(above.any(-1, keepdims=True), above, behind)
  return raters / jnp.maximum(raters.sum(-1, keepdims=True), 1).astype(jnp.float32)


def num_recycled(dropped: int) -> tuple[int, int]:
  """Of so many dropped tokens: (those that come back, the means that they come back as)."""
  recycled = int(dropped * RECYCLED) + 1 if dropped else 0
  return recycled, recycled // CLUSTER + 1 if dropped else 0


def cluster(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Density peaks: tokens that are dense, and far from denser ones, are centres.

  Args:
    x: float32[B, Q, D]; count: C.

  Returns:
    (int32[B, C] centres, the best first; int32[B, Q] the nearest of them, by its number).
  """
  batch, size, width = x.shape
  # Differences, not products: what is near must not drown in what is large, and two tokens are as far from each other either way.
  distance = jnp.sqrt(jnp.square(x[:, :, None] - x[:, None]).sum(-1)) / width**0.5
  nearest = -jax.lax.top_k(-distance, count)[0]
  density = jnp.exp(-jnp.square(nearest).mean(-1))
  mine, other, order = density[:, :, None], density[:, None], jnp.arange(size)
  denser = (other > mine) | ((other == mine) & (order < order[:, None]))
  separation = jnp.where(denser, distance, distance.max((1, 2), keepdims=True)).min(-1)
  centers = jax.lax.top_k(separation * density, count)[1].astype(jnp.int32)
  assign = layout.gather_rows(distance, centers).argmin(1).astype(jnp.int32)
  return centers, assign.at[jnp.arange(batch)[:, None], centers].set(jnp.arange(count, dtype=jnp.int32))


def select(inputs: SelectorInputs, budget: int, options) -> Chosen:
  """The `budget` best rated image tokens, and means of the best of the others."""
  scores = inputs.attention.mean(1)
  batch, reached = scores.shape
  kept = top_indices(scores, budget)
  recycled, means = num_recycled(reached - budget)
  if not means:
    return Chosen(index=kept, details={'scores': scores, 'kept': kept})
  left = scores.at[jnp.arange(batch)[:, None], kept].set(-jnp.inf)
  recycled = jax.lax.top_k(left, recycled)[1].astype(jnp.int32)
  x = layout.gather_rows(inputs.image_hidden, recycled).astype(jnp.float32)
  centers, assign = cluster(x, means)
  member = (assign[:, None] == jnp.arange(means)[:, None]).astype(jnp.float32)
  total = jnp.einsum('bcq,bqd->bcd', member, x, precision='highest')
  merged = total / (member.sum(-1, keepdims=True) + EPS)
  return Chosen(
    index=kept,
    more=merged,
    more_index=layout.gather_rows(recycled, centers),
    details=dict(scores=scores, kept=kept, recycled=recycled, centers=centers, assign=assign, merged=merged),
  )


def flops(llama: LlamaConfig, rows: int, reached: int, budget: int, options) -> float:
  """How well text matches the image, and the means of what comes back; distances are no products."""
  del options
  recycled, means = num_recycled(reached - budget)
  return 2 * llama.hidden_size * (rows * reached + means * recycled)


SELECTOR = Selector(
  select=select,
  attention='previous',
  query_weight=rater_weights,
  renumbers=lambda options: True,
  flops=flops,
  num_more=lambda reached, budget, options: num_recycled(reached - budget)[1],
  source='arXiv 2410.04417, Gumpest/SparseVLMs 26a5f48, version 1_0',
  verified="the authors' code without its noise: raters, scores, sets, clusters, means, cache lengths, logits and tokens; not 2_0",
)
