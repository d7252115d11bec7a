"""Projector from vision features to the decoder's width: `linear` or `mlpNx_gelu` (LLaVA-1.5, arXiv 2310.03744)."""

import flax.linen as nn
import jax

from dynllava_jax.config import ModelConfig
from dynllava_jax.models.layers import Dense, Dtype, batch_split, gelu


class Projector(nn.Module):
  """`projector_depth` linear layers with erf-GELU between them."""

  cfg: ModelConfig
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[B, P, vision width] -> float[B, P, D]."""
    for i in range(self.cfg.projector_depth):
      x = batch_split(Dense(self.cfg.llama.hidden_size, self.dtype, ('mlp', 'embed'), name=f'linear_{i}')(gelu(x) if i else x))
    return x
