"""Keep/drop predictors of Dynamic-LLaVA (arXiv 2412.00876 section 3.2; structure as in the authors' weights).

Both return logits float[..., 2]: column 0 = keep, column 1 = drop.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax.config import PredictorConfig
from dynllava_jax.models.layers import Dense, Dtype, LayerNorm, batch_split, gelu, partitioned, scan_layers

EPS = 1e-5


class Head(nn.Module):
  """d -> d/2 -> d/4 -> 2 with GELU between."""

  d_model: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[..., d] -> float[..., 2]."""
    x = gelu(Dense(self.d_model // 2, self.dtype, name='linear_0')(x))
    x = gelu(Dense(self.d_model // 4, self.dtype, name='linear_1')(x))
    return Dense(2, self.dtype, name='linear_2')(x)


class PredictorBlock(nn.Module):
  """Pre-norm encoder block: fused qkv without bias, projection with bias."""

  cfg: PredictorConfig
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array):
    """float[B, P, d] -> (float[B, P, d], None)."""
    cfg, dtype = self.cfg, self.dtype
    head_dim = cfg.d_model // cfg.num_heads
    init = nn.initializers.lecun_normal(in_axis=-2, out_axis=(-3, -1), batch_axis=(-4,))
    qkv = self.param('qkv', partitioned(init, None, None, 'embed', 'head_dim'), (3, cfg.num_heads, cfg.d_model, head_dim))
    y = LayerNorm(EPS, dtype, name='norm1')(x)
    q, k, v = jnp.einsum('bpd,cndh->cbpnh', y, qkv.astype(dtype))
    y = jax.nn.dot_product_attention(q, k, v)
    x = x + Dense(cfg.d_model, dtype, name='proj')(y.reshape(x.shape))
    y = gelu(Dense(cfg.mlp_dim, dtype, ('embed', 'mlp'), name='fc1')(LayerNorm(EPS, dtype, name='norm2')(x)))
    return batch_split(x + Dense(cfg.d_model, dtype, ('mlp', 'embed'), name='fc2')(y)), None


class ImagePredictor(nn.Module):
  """Scores image tokens from their hidden states; each sees the other image tokens, no text."""

  cfg: PredictorConfig
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[B, P, D] -> float[B, P, 2]."""
    cfg, dtype = self.cfg, self.dtype
    x = LayerNorm(EPS, dtype, name='norm')(x)
    x = gelu(batch_split(Dense(cfg.d_model, dtype, ('embed', None), name='down')(x)))
    x, _ = scan_layers(PredictorBlock, cfg.num_layers, ())(cfg, dtype, name='blocks')(x)
    local, shared = jnp.split(x, 2, axis=-1)
    x = jnp.concatenate([local, jnp.broadcast_to(shared.mean(1, keepdims=True), shared.shape)], -1)
    return Head(cfg.d_model, dtype, name='head')(x)


class TextPredictor(nn.Module):
  """Scores generated tokens one by one."""

  cfg: PredictorConfig
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[..., D] -> float[..., 2]."""
    x = LayerNorm(EPS, self.dtype, name='norm')(x)
    x = gelu(batch_split(Dense(self.cfg.d_model, self.dtype, ('embed', None), name='down')(x)))
    return Head(self.cfg.d_model, self.dtype, name='head')(x)
