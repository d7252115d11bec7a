"""LagKV (arXiv 2504.04704): keys and values stay that stand out in the light of the tokens that come after them.

`Stage(compressor=Piece('lagkv', dict(ratio=0.5, lag=32)))`. Behind the sinks tokens are cut into partitions of `lag`. What is
scored is how a token spreads over its channels once these are scaled by the range of the next partition. The last full partition,
which has none, and what is left over stay. Over the image alone the image is what is cut, and has no sinks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.methods import kv_scores
from dynllava_jax.methods.kv_scores import Part, at_least, first_ones, last_ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(kv_scores.Options):
  """Besides what all share.

  Attributes:
    n_sink: so many of the first tokens of the prompt stay.
    lag: tokens of a partition.
    cross_scoring: whether scores of different partitions are compared as they are; else by their rank inside their partition.
  """

  n_sink: int = 4
  lag: int = 128
  cross_scoring: bool = False

  def __post_init__(self):
    super().__post_init__()
    at_least(self, n_sink=0, lag=2)


def score(part: Part, options: Options) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean of what keys and values say, ranked; where there are no two partitions, the later the better."""
  sinks = options.n_sink if part.whole else 0
  full = jnp.maximum(part.count - sinks, 0) // options.lag
  end = (sinks + (full - 1) * options.lag)[:, None]
  late = (part.place - sinks) / jnp.maximum(part.count - sinks, 1)[:, None].astype(jnp.float32)
  k, v = part.heads(part.seen.k), part.heads(part.seen.v)
  partitions = jnp.zeros((*k.shape[:2], 0, options.lag), jnp.float32)
  scores = jnp.zeros(k.shape[:3], jnp.float32)
  if part.size >= sinks + 2 * options.lag:
    partitions = (standing_out(k, sinks, options.lag) + standing_out(v, sinks, options.lag)) / 2
    scored = partitions
    if not options.cross_scoring:
      better = jnp.argsort(jnp.argsort(-partitions, -1, stable=True), -1, stable=True)
      scored = (options.lag - 1 - better) / jnp.float32(options.lag)
    scored = scored.reshape(*k.shape[:2], -1)
    scores = scores.at[..., sinks : sinks + scored.shape[-1]].set(scored)
  scored = (full >= 2)[:, None]
  scores = jnp.where(scored[:, None], scores, late[:, None])
  scores = last_ones(part, (scored & (part.place >= end))[:, None], scores)
  return first_ones(part, sinks, scores), {'partition_scores': partitions}


def standing_out(x: jax.Array, sinks: int, lag: int) -> jax.Array:
  """float32[B, K, M, H] -> float32[B, K, G - 1, lag] of the first G - 1 of G full partitions, softmax inside each."""
  count = (x.shape[2] - sinks) // lag
  x = x[:, :, sinks : sinks + count * lag].reshape(*x.shape[:2], count, lag, x.shape[3])
  lowest, highest = (f(x[:, :, 1:], axis=3, keepdims=True) for f in (jnp.min, jnp.max))
  spread = highest - lowest
  scaled = jnp.where(spread > 0, (x[:, :, :-1] - lowest) / jnp.where(spread > 0, spread, 1.0), 0.0)
  return jax.nn.softmax(jnp.std(scaled, axis=-1, ddof=1), -1)


COMPRESSOR = kv_scores.compressor(
  score,
  options=Options,
  source='arXiv 2504.04704, NVIDIA/kvpress 0.5.5',
  verified='kvpress, over the prompt: scores inside partitions and their ranks, sets, keys, values, logits and tokens',
)
