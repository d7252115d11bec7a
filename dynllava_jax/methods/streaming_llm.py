"""StreamingLLM (arXiv 2309.17453): the first few keys stay, attention sinks, and as many of the last as there is room for.

`Stage(compressor=Piece('streaming_llm', dict(ratio=0.5, over='prompt', rerotate=True)))` is what was published; without
`rerotate` positions stay as they were. Over the image alone first and last are those of the image: a baseline.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.methods import kv_scores
from dynllava_jax.methods.kv_scores import FORCED, Part, at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(kv_scores.Options):
  """Besides what all share: `n_sink`, so many of the first stay."""

  n_sink: int = 4

  def __post_init__(self):
    super().__post_init__()
    at_least(self, n_sink=0)


def score(part: Part, options: Options) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The first before all others, then the later the better."""
  batch, _, kv_heads, _ = part.seen.k.shape
  place = part.place.astype(jnp.float32)
  scores = jnp.where(place < options.n_sink, FORCED * (1 + options.n_sink - place), place)
  return jnp.broadcast_to(scores, (batch, kv_heads, part.size)), {}


COMPRESSOR = kv_scores.compressor(
  score,
  options=Options,
  source='arXiv 2309.17453, NVIDIA/kvpress 0.5.5',
  verified='kvpress, over the prompt: sets, keys, values, logits and tokens, with and without new positions',
)
