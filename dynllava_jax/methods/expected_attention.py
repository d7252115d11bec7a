"""Expected attention (arXiv 2510.00636): keys stay that queries to come would look at, if they were spread as the prompt's are.

`Stage(compressor=Piece('expected_attention', dict(ratio=0.5)))`. Mean and covariance of the prompt's queries before rotation are
rotated by the average of the rotations of the positions to come; the weight that a Gaussian query gives to a key then has a closed
form. The first tokens, attention sinks, take no part in it and stay.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.config import LlamaConfig
from dynllava_jax.methods import kv_scores
from dynllava_jax.methods.base import Rotation
from dynllava_jax.methods.kv_scores import Part, at_least, first_ones, group_mean
from dynllava_jax.ops.rope import apply_rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(kv_scores.Options):
  """Besides what all share.

  Attributes:
    n_future: positions to come over which rotations are averaged.
    n_sink: so many of the first tokens of the prompt stay.
    covariance: whether the spread of the queries counts, or their mean alone.
    value_norm: whether a weight counts times the norm of its value; epsilon: what is added to the weight before.
  """

  n_future: int = 512
  n_sink: int = 4
  covariance: bool = True
  value_norm: bool = True
  epsilon: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    at_least(self, n_future=1, n_sink=0)


def score(part: Part, options: Options) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Expected softmax weights over all keys but the sinks, averaged over a group, times the norm of the value."""
  seen = part.seen
  batch, size, kv_heads, head_dim = seen.k.shape
  counts = (seen.rows.is_real(size) & (jnp.arange(size) >= options.n_sink))[:, None, :]
  k = seen.k.swapaxes(1, 2).astype(jnp.float32)[:, :, None]  # [B, K, 1, S, H]
  q = seen.unrotated.swapaxes(1, 2).astype(jnp.float32)  # [B, N, S, H]
  mean, spread = statistics(q, counts)
  turn = average_rotation(seen.rotation, options.n_future)
  grouped = lambda x: x.reshape(batch, kv_heads, -1, *x.shape[2:])
  logits = jnp.einsum('bkgh,bkgsh->bkgs', grouped(turn(mean)), k, precision='highest') * head_dim**-0.5
  if options.covariance:
    spread = turn(turn(spread).swapaxes(-1, -2))
    along = jnp.einsum('bkgsh,bkghj->bkgsj', k, grouped(spread), precision='highest')
    logits = logits + (along * k).sum(-1) / (2 * head_dim)
  weights = jax.nn.softmax(jnp.where(counts[:, :, None], logits, jnp.finfo(jnp.float32).min), -1)
  scores = group_mean(weights.reshape(batch, -1, size), kv_heads)
  if options.value_norm:
    scores = (scores + options.epsilon) * jnp.linalg.norm(seen.v.swapaxes(1, 2).astype(jnp.float32), axis=-1)
  return first_ones(part, options.n_sink, part.columns(scores)), {}


def statistics(q: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean float32[B, N, H] and covariance float32[B, N, H, H] of the queries float32[B, N, S, H] that bool[B, 1, S] `counts`."""
  number = jnp.maximum(counts.sum(-1), 1)[..., None]
  mean = jnp.where(counts[..., None], q, 0.0).sum(2) / number
  centred = jnp.where(counts[..., None], q - mean[:, :, None], 0.0)
  return mean, jnp.einsum('bnsh,bnsj->bnhj', centred, centred, precision='highest') / number[..., None]


def average_rotation(rotation: Rotation, count: int):
  """The mean of the rotations of the next `count` positions, as a function on float32[B, N, ..., H]."""
  angles = rotation.angles(rotation.next[:, None] + jnp.arange(count))
  cos, sin = (x.mean(1, keepdims=True) for x in angles)  # [B, 1, H/2]

  def turn(x):
    return apply_rope(x.reshape(x.shape[0], 1, -1, x.shape[-1]), cos, sin).reshape(x.shape)

  return turn


def flops(llama: LlamaConfig, text: int, image: int, options: Options) -> float:
  """The mean query to each key, and the spread of all queries, its rotation apart, to each key."""
  rows = (text + image) * llama.num_heads * llama.head_dim
  return 2 * rows + (4 * rows * llama.head_dim if options.covariance else 0)


COMPRESSOR = kv_scores.compressor(
  score,
  flops=flops,
  options=Options,
  source='arXiv 2510.00636, NVIDIA/kvpress 0.5.5',
  verified='kvpress, over the prompt: scores, sets, keys, values, logits and tokens',
)
