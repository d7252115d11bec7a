"""Observed attention: keys stay that those who see them look at most; H2O's idea (arXiv 2306.14048), of a prompt as a whole.

`Stage(compressor=Piece('observed_attention', dict(ratio=0.5)))`. H2O adds up; here the sum is divided by how many queries see the
key, else the first keys of a prompt would win by their age alone.
"""

import jax
import jax.numpy as jnp

from dynllava_jax.methods import kv_scores
from dynllava_jax.methods.base import row_flops
from dynllava_jax.methods.kv_scores import Options, Part, group_mean
from dynllava_jax.ops.attention import attention_received


def score(part: Part, options: Options) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The mean weight that a key gets, over the queries that see it and the query heads of a group."""
  seen = part.seen
  size, length = seen.k.shape[1], seen.rows.length
  received = attention_received(seen.q, seen.k, seen.rows.is_real(size).astype(jnp.float32))
  viewers = jnp.maximum(length[:, None] - jnp.arange(size), 1)[:, None]
  return part.columns(group_mean(received, seen.k.shape[2]) / viewers), {}


COMPRESSOR = kv_scores.compressor(
  score,
  flops=lambda llama, text, image, options: row_flops(llama, (text + image + 1) / 2, text + image),
  options=Options,
  source='arXiv 2306.14048, NVIDIA/kvpress 0.5.5',
  verified='kvpress, over the prompt: scores, sets, keys, values, logits and tokens',
)
