"""Small Linen building blocks shared by the towers. Parameters carry logical axis names (see sharding.py)."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = jnp.dtype | type


def partitioned(init: Callable, *names: str | None) -> Callable:
  """An initialiser whose result is annotated with logical axis names."""
  return nn.with_logical_partitioning(init, names)


def batch_split(x: jax.Array) -> jax.Array:
  """float[B, ...] -> the same, its rows on the mesh's devices as those of a batch.

  XLA would rather follow the split of the weights: every device would then compute all rows, from a part of the width each.
  """
  return nn.with_logical_constraint(x, ('batch',) + (None,) * (x.ndim - 1))


class Dense(nn.Module):
  """y = x W + b with W: [in, out]. `axes` names W's two axes, `init` makes it."""

  features: int
  dtype: Dtype
  axes: tuple[str | None, str | None] = (None, None)
  init: Callable = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[..., in] -> float[..., out]."""
    kernel = self.param('kernel', partitioned(self.init, *self.axes), (x.shape[-1], self.features))
    bias = self.param('bias', partitioned(nn.initializers.zeros, self.axes[1]), (self.features,))
    return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class LayerNorm(nn.Module):
  """LayerNorm over the last axis, computed in float32."""

  eps: float
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[..., D] -> float[..., D]."""
    scale = self.param('scale', partitioned(nn.initializers.ones, None), (x.shape[-1],))
    bias = self.param('bias', partitioned(nn.initializers.zeros, None), (x.shape[-1],))
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
    return (normed * scale + bias).astype(self.dtype)


def gelu(x: jax.Array) -> jax.Array:
  """The exact (erf) GELU, as torch's default."""
  return jax.nn.gelu(x, approximate=False)


# What of a block is kept for the way back, by `TrainConfig.remat`; the rest is computed again.
REMAT = {
  'block': None,  # its input alone
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'offload': jax.checkpoint_policies.offload_dot_with_no_batch_dims('device', 'pinned_host'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
  """A weight that every decoder layer has: its shape there, the logical names of its axes, how it is made."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Callable[..., jax.Array] = nn.initializers.lecun_normal()


def scan_layers(block: type[nn.Module], length: int, in_axes, remat: str = 'none') -> type[nn.Module]:
  """`block` repeated `length` times over stacked parameters [length, ...]."""
  if remat != 'none':
    block = nn.remat(block, prevent_cse=False, policy=REMAT[remat])
  return nn.scan(
    block,
    variable_axes={'params': 0, 'adapters': 0, 'scales': 0},  # the last two where a run has them
    split_rngs={'params': True},
    in_axes=in_axes,
    length=length,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )
