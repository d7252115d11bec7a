"""KeyDiff (arXiv 2504.15364): keys stay that are least like the average key of their head.

`Stage(compressor=Piece('keydiff', dict(ratio=0.5)))`. Over the image alone the average is that of the image's keys.
"""

import jax
import jax.numpy as jnp

from dynllava_jax.methods import kv_scores
from dynllava_jax.methods.kv_scores import Options, Part


def score(part: Part, options: Options) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Minus the cosine between a rotated key and the mean of the unit keys."""
  k = part.heads(part.seen.k)
  unit = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)
  anchor = jnp.where(part.real[..., None], unit, 0.0).sum(2, keepdims=True) / jnp.maximum(part.count, 1)[:, None, None, None]
  anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-8)
  return -(unit * anchor).sum(-1), {}


COMPRESSOR = kv_scores.compressor(
  score,
  options=Options,
  source='arXiv 2504.15364, NVIDIA/kvpress 0.5.5',
  verified='kvpress, over the prompt: scores, sets, keys, values, logits and tokens',
)
