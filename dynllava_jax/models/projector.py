"""Projectors from vision features to the decoder's width: `linear` and `mlpNx_gelu` (LLaVA-1.5, arXiv 2310.03744), `tokenpacker`.

TokenPacker (arXiv 2407.02392; compared with the authors' code at 771a16e): every image token stands for a region of s x s patches.
It is a query of the coarse grid that attends to them, and to nothing else.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax.config import ModelConfig
from dynllava_jax.methods.base import TowerOutput
from dynllava_jax.models.layers import Dense, Dtype, LayerNorm, batch_split, gelu, partitioned

PACKER_EPS = 1e-6
PACKER_INIT = nn.initializers.normal(0.02)


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


class TokenPacker(nn.Module):
  """One token per region of patches; the query enters through the attention weights alone, there is no residual."""

  cfg: ModelConfig
  dtype: Dtype

  @nn.compact
  def __call__(self, tower: TowerOutput) -> jax.Array:
    """Features of all patches and the states `levels` -> float[B, M, D], row by row of the coarse grid."""
    vision, packer, dtype = self.cfg.vision, self.cfg.packer, self.dtype
    scale, width, heads = packer.scale_factor, vision.hidden_size, packer.num_heads
    coarse = vision.image_size // vision.patch_size // scale

    def dense(name: str, size: int) -> Dense:
      return Dense(size, dtype, ('embed', 'mlp'), init=PACKER_INIT, name=name)

    query = shrink(regions(tower.features, coarse, scale))
    kernel = self.param('query', partitioned(PACKER_INIT, 'embed', 'mlp'), (width, width))
    query = LayerNorm(PACKER_EPS, dtype, name='query_norm')(query @ kernel.astype(dtype))
    joined = jnp.concatenate([tower.states[level - 1] for level in packer.levels], -1)
    of = {}
    for name in ('key', 'value'):
      x = dense(f'{name}_1', width)(gelu(dense(f'{name}_0', width)(joined)))
      of[name] = regions(batch_split(LayerNorm(PACKER_EPS, dtype, name=f'{name}_norm')(x)), coarse, scale)
    shape = (3, heads, width, width // heads)
    qkv = self.param('qkv', partitioned(PACKER_INIT, None, 'heads', 'embed', 'head_dim'), shape).astype(dtype)
    bias = self.param('qkv_bias', partitioned(nn.initializers.zeros, None, 'heads', 'head_dim'), (3, heads, width // heads))
    bias = bias.astype(dtype)
    q = jnp.einsum('bmd,ndh->bmnh', query, qkv[0]) + bias[0]
    k, v = (jnp.einsum('bmrd,ndh->bmrnh', of[name], qkv[i]) + bias[i] for i, name in ((1, 'key'), (2, 'value')))
    seen = attend(q, k, v)
    out = self.param('out', partitioned(PACKER_INIT, 'heads', 'head_dim', 'embed'), (heads, width // heads, width))
    out_bias = self.param('out_bias', partitioned(nn.initializers.zeros, None), (width,))
    x = batch_split(jnp.einsum('bmnh,nhd->bmd', seen, out.astype(dtype)) + out_bias.astype(dtype))
    size = self.cfg.llama.hidden_size
    return batch_split(dense('linear_1', size)(gelu(dense('linear_0', size)(x))))


def regions(x: jax.Array, coarse: int, scale: int) -> jax.Array:
  """Patches float[B, (G s)^2, C] of a square image, G = `coarse` and s = `scale` -> float[B, G^2, s^2, C], region by region."""
  x = x.reshape(x.shape[0], coarse, scale, coarse, scale, -1).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(x.shape[0], coarse**2, scale**2, -1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Every token to its own region: queries float[B, M, N, H], keys and values float[B, M, R, N, H] -> float[B, M, N, H]."""
  scores = jnp.einsum('bmnh,bmrnh->bmnr', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  return jnp.einsum('bmnr,bmrnh->bmnh', jax.nn.softmax(scores, -1).astype(v.dtype), v)


def shrink(x: jax.Array) -> jax.Array:
  """Bilinear interpolation to one value per region, in float32: float[B, M, s^2, C] -> float[B, M, C].

  It looks at the middle of a region alone: at four patches of an even side, at one of an odd side.
  """
  scale = round(x.shape[2] ** 0.5)
  x = x.reshape(*x.shape[:2], scale, scale, -1)
  middle = slice((scale - 1) // 2, scale // 2 + 1)
  return x[:, :, middle, middle].astype(jnp.float32).mean((2, 3)).astype(x.dtype)
