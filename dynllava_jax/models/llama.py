"""LLaMA decoder (arXiv 2302.13971), cut into stages.

Axes: B batch, T query, S key, N heads, K kv heads, H head dim, D width, F mlp, V vocabulary, L layers, C slots.
A stage is one `nn.scan` over its layers. Parameters of stage i live under `stage_{i}`, stacked [L_i, ...];
`cut_layers` and `join_layers` convert from and to the single stack that checkpoints hold.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax.config import LlamaConfig, Stage
from dynllava_jax.models.layers import Dtype, batch_split, partitioned, scan_layers
from dynllava_jax.ops.attention import cached_attention, causal_attention, policy_attention
from dynllava_jax.ops.rope import apply_rope, rope_angles

LINEAR_INIT = nn.initializers.lecun_normal()
HEADS_INIT = nn.initializers.lecun_normal(in_axis=-2, out_axis=(-3, -1))  # [N, D, H]
HEADS_OUT_INIT = nn.initializers.lecun_normal(in_axis=(-3, -2))  # [N, H, D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What every layer of a stage shares.

  Attributes:
    cos, sin: float32[B, T, H/2] rotary angles.
    policy: float[B, T] keep weight per key (training), or None.
    cache_length: int32[B] visible cache slots, or None without a cache.
  """

  cos: jax.Array
  sin: jax.Array
  policy: jax.Array | None = None
  cache_length: jax.Array | None = None


class RMSNorm(nn.Module):
  """Root-mean-square norm in float32."""

  eps: float
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[..., D] -> float[..., D]."""
    scale = self.param('scale', partitioned(nn.initializers.ones, None), (x.shape[-1],))
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
    return x.astype(self.dtype) * scale.astype(self.dtype)


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
  """Normed float[..., D] and float[D, V] -> float32[..., V], multiplied in the dtype of `hidden`."""
  return jnp.einsum('...d,dv->...v', hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


class Block(nn.Module):
  """One decoder layer."""

  cfg: LlamaConfig
  dtype: Dtype

  def _weight(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init=LINEAR_INIT) -> jax.Array:
    return self.param(name, partitioned(init, *axes), shape).astype(self.dtype)

  @nn.compact
  def __call__(self, x: jax.Array, context: Context, cache: tuple[jax.Array, jax.Array] | None):
    """Runs the layer.

    Args:
      x: float[B, T, D].
      context: see `Context`.
      cache: this layer's (k, v), float[B, C, K, H] each, or None.

    Returns:
      (float[B, T, D], (k, v) of the T tokens, float[B, T, K, H] each, keys rotated).
    """
    cfg = self.cfg
    width, heads, kv_heads, head_dim = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    with jax.named_scope('attention'):
      y = RMSNorm(cfg.rms_norm_eps, self.dtype, name='attention_norm')(x)
      # Heads first: no transposed copy of every layer's weights while decoding on TPU.
      kv_shape, kv_axes = (kv_heads, width, head_dim), ('kv_heads', 'embed', 'head_dim')
      q = self._weight('q', (heads, width, head_dim), ('heads', 'embed', 'head_dim'), HEADS_INIT)
      k, v = (self._weight(name, kv_shape, kv_axes, HEADS_INIT) for name in 'kv')
      q, k, v = (jnp.einsum('btd,ndh->btnh', y, w) for w in (q, k, v))
      q, k = apply_rope(q, context.cos, context.sin), apply_rope(k, context.cos, context.sin)
      if cache is not None:
        y = cached_attention(q, k, v, *cache, context.cache_length)
      elif context.policy is not None:
        y = policy_attention(q, k, v, context.policy)
      else:
        y = causal_attention(q, k, v)
      out = self._weight('o', (heads, head_dim, width), ('heads', 'head_dim', 'embed'), HEADS_OUT_INIT)
      x = x + jnp.einsum('btnh,nhd->btd', y, out)
    with jax.named_scope('mlp'):
      y = RMSNorm(cfg.rms_norm_eps, self.dtype, name='mlp_norm')(x)
      gate = y @ self._weight('gate', (width, cfg.mlp_dim), ('embed', 'mlp'))
      up = y @ self._weight('up', (width, cfg.mlp_dim), ('embed', 'mlp'))
      x = x + (jax.nn.silu(gate) * up) @ self._weight('down', (cfg.mlp_dim, width), ('mlp', 'embed'))
    return batch_split(x), (k, v)


class Llama(nn.Module):
  """Embedding, stages, final norm and output head."""

  cfg: LlamaConfig
  stages: tuple[Stage, ...]
  dtype: Dtype
  remat: bool = False

  def setup(self):
    cfg = self.cfg
    self.embedding = self.param(
      'embedding', partitioned(nn.initializers.normal(1.0), 'vocab', 'embed'), (cfg.vocab_size, cfg.hidden_size)
    )
    ends = [s.start for s in self.stages[1:]] + [cfg.num_layers]
    for i, (stage, end) in enumerate(zip(self.stages, ends)):
      block = scan_layers(Block, end - stage.start, (nn.broadcast, 0), self.remat)
      setattr(self, f'stage_{i}', block(cfg, self.dtype))
    self.norm = RMSNorm(cfg.rms_norm_eps, self.dtype)
    if not cfg.tie_embeddings:
      self.head = self.param('head', partitioned(LINEAR_INIT, 'embed', 'vocab'), (cfg.hidden_size, cfg.vocab_size))

  def embed(self, tokens: jax.Array) -> jax.Array:
    """int32[B, T] -> float[B, T, D]."""
    return batch_split(self.embedding.astype(self.dtype)[tokens])

  def run_stage(
    self,
    index: int,
    x: jax.Array,
    positions: jax.Array,
    *,
    policy: jax.Array | None = None,
    cache: tuple[jax.Array, jax.Array] | None = None,
    cache_length: jax.Array | None = None,
  ):
    """Runs the layers of one stage.

    Args:
      index: stage number.
      x: float[B, T, D]; positions: int32[B, T], rotary positions.
      policy: float[B, T] keep weight per key, for training.
      cache, cache_length: (k, v) float[L, B, C, K, H] each and int32[B] visible slots, for decoding.

    Returns:
      (float[B, T, D], (k, v) of these tokens, float[L, B, T, K, H] each).
    """
    cos, sin = rope_angles(positions, self.cfg.head_dim, self.cfg.rope_theta, self.cfg.rope_scaling)
    return getattr(self, f'stage_{index}')(x, Context(cos, sin, policy, cache_length), cache)

  def output(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float[..., D] -> (the same after the final norm, the head float[D, V]); `head_logits` of them are the logits."""
    return self.norm(x), self.embedding.T if self.cfg.tie_embeddings else self.head

  def logits(self, x: jax.Array) -> jax.Array:
    """Final norm and head: float[..., D] -> float32[..., V]."""
    return head_logits(*self.output(x))
