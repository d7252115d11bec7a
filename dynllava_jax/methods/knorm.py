"""K-norm (arXiv 2406.11430): keys of small norm stay.

`Stage(compressor=Piece('knorm', dict(ratio=0.5)))`. Nothing but the keys is looked at.
"""

import jax
import jax.numpy as jnp

from dynllava_jax.methods import kv_scores
from dynllava_jax.methods.kv_scores import Options, Part


def score(part: Part, options: Options) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Minus the norm, which is the same before and after rotation."""
  return -jnp.linalg.norm(part.heads(part.seen.k), axis=-1), {}


COMPRESSOR = kv_scores.compressor(
  score,
  options=Options,
  source='arXiv 2406.11430, NVIDIA/kvpress 0.5.5',
  verified='kvpress over the prompt, an independent program over the image: scores, sets, keys, values, logits and tokens',
)
