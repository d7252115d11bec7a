"""CLIP vision tower (arXiv 2103.00020): pre-LN ViT with class token and quick-GELU.

Axes: B batch, P patches, T = P + 1, D width, N heads, H head dim, F mlp.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax.config import ClipTextConfig, VisionConfig
from dynllava_jax.methods.base import MergedTokens, TowerNeeds, TowerOutput
from dynllava_jax.models.layers import Dense, Dtype, LayerNorm, batch_split, partitioned, scan_layers
from dynllava_jax.ops.full_attention import full_attention, rows_for


def quick_gelu(x: jax.Array) -> jax.Array:
  """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
  return x * jax.nn.sigmoid(1.702 * x)


def grid_embedding(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Initial position embedding: sines and cosines of row and column (arXiv 2205.01580), zeros for the class token.

  Wavelengths run from 2 pi patches to four times the grid, so that small grids are told apart too.
  """
  del key
  tokens, width = shape
  side = round((tokens - 1) ** 0.5)
  frequencies = (2.0 * side / jnp.pi) ** -jnp.linspace(0, 1, width // 4)
  row, column = jnp.divmod(jnp.arange(side * side), side)
  waves = [f(axis[:, None] * frequencies) for axis in (row, column) for f in (jnp.sin, jnp.cos)]
  return jnp.pad(jnp.concatenate(waves, 1), [(1, 0), (0, width % 4)])


def class_attention(q: jax.Array, k: jax.Array) -> jax.Array:
  """What the class token attends to in one block: float32[B, N, P] of queries and keys float[B, P + 1, N, H].

  A softmax over all P + 1 tokens; the class token's own column is cut off, and nothing is scaled back to 1.
  """
  scores = jnp.einsum('bnh,btnh->bnt', q[:, 0], k, precision='highest', preferred_element_type=jnp.float32)
  return jax.nn.softmax(scores * q.shape[-1] ** -0.5, -1)[..., 1:]


def watch(needs: TowerNeeds, cfg: VisionConfig, batch: int, dtype: Dtype) -> dict[str, Any] | None:
  """What travels through the blocks beside the hidden states: the number of the next block, and room for what is asked of some.

  None if nothing is asked: then the blocks are those of a plain tower.
  """
  tokens, head_dim = cfg.num_patches + 1, cfg.hidden_size // cfg.num_heads
  rooms = {
    'class_attention': dict.fromkeys(needs.class_attention, (batch, cfg.num_heads, tokens - 1)),
    'key_mean': dict.fromkeys(needs.key_mean, (batch, tokens, head_dim)),
    'states': dict.fromkeys(needs.states, (batch, tokens, cfg.hidden_size)),
  }
  if not any(rooms.values()):
    return None
  of = {'states': dtype}
  room = lambda name, shape: batch_split(jnp.zeros(shape, of.get(name, jnp.float32)))
  empty = {name: {block: room(name, shape) for block, shape in blocks.items()} for name, blocks in rooms.items()}
  return {'block': jnp.int32(0), **empty}


def seen_by(watched: dict[str, Any], q: jax.Array, k: jax.Array, x: jax.Array) -> dict[str, Any]:
  """`watched` after a block: filled in where something is asked of it.

  Args:
    watched: before the block; q, k: its queries and keys, float[B, T, N, H]; x: float[B, T, D], what it gives.
  """
  here = watched['block']

  def put(name: str, value: Callable[[], jax.Array]):
    return {b: jax.lax.cond(here == b, value, lambda old=old: old) for b, old in watched[name].items()}

  return {
    'block': here + 1,
    'class_attention': put('class_attention', lambda: class_attention(q, k)),
    'key_mean': put('key_mean', lambda: k.astype(jnp.float32).mean(2)),
    'states': put('states', lambda: x),
  }


def next_block(params: dict[str, Any], x: jax.Array, cfg: VisionConfig) -> tuple[jax.Array, jax.Array]:
  """(class token's query float32[B, D], keys float32[B, T, D]) of a block that sees x float[B, T, D], its heads side by side."""
  x = LayerNorm(cfg.layer_norm_eps, jnp.float32, parent=None).apply({'params': params['layer_norm1']}, x)
  weight, bias = (params[name].astype(jnp.float32) for name in ('qkv', 'qkv_bias'))
  project = lambda x, i: jnp.einsum('btd,ndh->btnh', x, weight[i], precision='highest') + bias[i]
  query, keys = project(x[:, :1], 0), project(x, 1)
  return query.reshape(x.shape[0], -1), keys.reshape(x.shape)


class VisionBlock(nn.Module):
  """One encoder layer."""

  cfg: VisionConfig | ClipTextConfig
  dtype: Dtype
  kernel: str = 'xla'  # of `full_attention`; blocks that merge have none
  merge: Callable[..., tuple[jax.Array, MergedTokens]] | None = None
  merged: int = 0  # so many tokens by `merge`
  causal: bool = False

  @nn.compact
  def __call__(self, carry: tuple[jax.Array, dict[str, Any] | MergedTokens | None]):
    """(float[B, T, D], `watch`; with `merge` what the tokens are) -> the same after this block, and None for the scan."""
    (x, watched), cfg, dtype = carry, self.cfg, self.dtype
    head_dim = cfg.hidden_size // cfg.num_heads
    init = nn.initializers.lecun_normal(in_axis=-2, out_axis=(-3, -1), batch_axis=(-4,))
    y = LayerNorm(cfg.layer_norm_eps, dtype, name='layer_norm1')(x)
    length = x.shape[1]
    if more := rows_for(self.kernel, length) - length:
      y = jnp.pad(y, [(0, 0), (0, more), (0, 0)])
    qkv = self.param('qkv', partitioned(init, None, 'heads', 'embed', 'head_dim'), (3, cfg.num_heads, cfg.hidden_size, head_dim))
    bias = self.param('qkv_bias', partitioned(nn.initializers.zeros, None, 'heads', 'head_dim'), (3, cfg.num_heads, head_dim))
    if self.kernel == 'flash':  # takes each of them heads first, so a product of its own writes each as it should lie
      q, k, v = (jnp.einsum('btd,ndh->btnh', y, w) + b for w, b in zip(qkv.astype(dtype), bias.astype(dtype)))
    else:
      q, k, v = jnp.einsum('btd,cndh->cbtnh', y, qkv.astype(dtype)) + bias.astype(dtype)[:, None, None]
    if self.causal:
      y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    elif self.merge is None:
      y = full_attention(q, k, v, length, self.kernel)
    else:
      by_size = jnp.log(watched.size)[:, None, None].astype(dtype)  # a key counts once for each token in it
      y = jax.nn.dot_product_attention(q, k, v, bias=by_size)
    out = self.param(
      'out',
      partitioned(nn.initializers.lecun_normal(in_axis=(-3, -2)), 'heads', 'head_dim', 'embed'),
      (cfg.num_heads, head_dim, cfg.hidden_size),
    )
    out_bias = self.param('out_bias', partitioned(nn.initializers.zeros, None), (cfg.hidden_size,))
    x = x + jnp.einsum('btnh,nhd->btd', y, out.astype(dtype))[:, :length] + out_bias.astype(dtype)
    if self.merge is not None:
      x, watched = self.merge(x, k.astype(jnp.float32).mean(2), watched, self.merged)
    y = LayerNorm(cfg.layer_norm_eps, dtype, name='layer_norm2')(x)
    y = quick_gelu(Dense(cfg.mlp_dim, dtype, ('embed', 'mlp'), name='fc1')(y))
    x = batch_split(x + Dense(cfg.hidden_size, dtype, ('mlp', 'embed'), name='fc2')(y))
    if watched is not None and self.merge is None:
      watched = seen_by(watched, q[:, :length], k[:, :length], x)
    return (x, watched), None


class VisionTower(nn.Module):
  """Patch features of the selected layer; layers above it are not run and have no parameters here."""

  cfg: VisionConfig
  dtype: Dtype
  needs: TowerNeeds = TowerNeeds()
  kernel: str = 'xla'  # of `full_attention`

  @nn.compact
  def __call__(self, pixels: jax.Array) -> TowerOutput:
    """Normalised pixels float[B, R, R, 3] -> features float[B, P, D] (no class token, no final norm) and what `needs` says."""
    cfg, dtype = self.cfg, self.dtype
    side, size = cfg.image_size // cfg.patch_size, cfg.patch_size
    batch = pixels.shape[0]
    patches = pixels.reshape(batch, side, size, side, size, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(batch, side * side, size * size * 3).astype(dtype)
    kernel = self.param(
      'patch_embedding', partitioned(nn.initializers.lecun_normal(), None, 'embed'), (size * size * 3, cfg.hidden_size)
    )
    class_token = self.param('class_embedding', partitioned(nn.initializers.normal(0.02), None), (cfg.hidden_size,))
    positions = self.param('position_embedding', partitioned(grid_embedding, None, 'embed'), (cfg.num_patches + 1, cfg.hidden_size))
    first = jnp.broadcast_to(class_token.astype(dtype), (batch, 1, cfg.hidden_size))
    x = jnp.concatenate([first, patches @ kernel.astype(dtype)], 1) + positions.astype(dtype)
    x = batch_split(LayerNorm(cfg.layer_norm_eps, dtype, name='pre_layernorm')(x))
    if self.needs.merges:
      merged = self._merging(x)
      return TowerOutput(merged[-1][0][:, 1:], class_feature=merged[-1][0][:, 0], merged=merged)
    watched = watch(self.needs, cfg, batch, dtype)
    if cfg.layers_run:
      (x, watched), _ = scan_layers(VisionBlock, cfg.layers_run, ())(cfg, dtype, self.kernel, name='layers')((x, watched))
    watched = watched or {}
    return TowerOutput(
      features=x[:, 1:],
      class_feature=x[:, 0] if self.needs.class_feature or self.needs.next_block else None,
      class_attention=watched.get('class_attention', {}),
      key_mean=watched.get('key_mean', {}),
      states={block: state[:, 1:] for block, state in watched.get('states', {}).items()},
    )

  def _merging(self, x: jax.Array) -> tuple[tuple[jax.Array, MergedTokens], ...]:
    """float[B, P + 1, D] through blocks that merge tokens: no scan, as each sees fewer."""
    batch, count = x.shape[:2]
    every = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
    tokens, blocks = MergedTokens(jnp.ones((batch, count), jnp.float32), every, every - 1), []
    layers = self.variables['params']['layers']
    for i, merged in enumerate(self.needs.merges):
      block = VisionBlock(self.cfg, self.dtype, merge=self.needs.merge, merged=merged, parent=None)
      (x, tokens), _ = block.apply({'params': jax.tree.map(lambda w: w[i], layers)}, (x, tokens))
      blocks.append((x, tokens))
    return tuple(blocks)
