"""TOVA (arXiv 2401.06104): keys stay that the last query of the prompt looks at; one set for all kv heads.

`Stage(compressor=Piece('tova', dict(ratio=0.75)))`.
"""

import jax
import jax.numpy as jnp

from dynllava_jax.methods import kv_scores
from dynllava_jax.methods.base import row_flops
from dynllava_jax.methods.kv_scores import Options, Part, last_ones, looked_at


def score(part: Part, options: Options) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Softmax of the last query, averaged over all query heads. Over the prompt its own key stays."""
  seen = part.seen
  everyone = looked_at(seen, 1, 1).mean(1, keepdims=True)
  scores = part.columns(jnp.broadcast_to(everyone, (everyone.shape[0], seen.k.shape[2], everyone.shape[2])))
  last = (part.place == seen.rows.length[:, None] - 1)[:, None] & part.whole
  return last_ones(part, last, scores), {}


COMPRESSOR = kv_scores.compressor(
  score,
  flops=lambda llama, text, image, options: row_flops(llama, 1, text + image),
  options=Options,
  source='arXiv 2401.06104, NVIDIA/kvpress 0.5.5',
  verified='kvpress, over the prompt: scores, sets, keys, values, logits and tokens',
)
