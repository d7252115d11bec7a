"""Routers of a Dynamic Pyramid Network (`methods.dpn`): how likely each kernel is, by the hidden state of the router token.

Axes: B batch, S sequence, D width, E kernels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax.config import PyramidConfig
from dynllava_jax.models.batch import Prompt
from dynllava_jax.models.layers import LayerNorm, gelu, partitioned
from dynllava_jax.ops import layout

EPS = 1e-5
INIT = nn.initializers.lecun_normal()


class Router(nn.Module):
  """LayerNorm, a quarter of the width, GELU, a number per kernel; in float32."""

  kernels: int
  temperature: float

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:
    """float[B, D] -> float32[B, E], probabilities."""
    width = hidden.shape[-1]
    x = LayerNorm(EPS, jnp.float32, name='norm')(hidden)
    x = gelu(x @ self.param('down', partitioned(INIT, 'embed', None), (width, width // 4)))
    logits = x @ self.param('predictor', partitioned(INIT, None, None), (width // 4, self.kernels))
    return jax.nn.softmax(logits / self.temperature, -1)


class Pyramid(nn.Module):
  """The routers of all layers that tokens are pooled in front of."""

  cfg: PyramidConfig

  @nn.compact
  def __call__(self, hidden: jax.Array) -> dict[int, jax.Array]:
    """float[B, D] -> by layer, float32[B, E]; what is not looked at is not computed."""
    layers = zip(self.cfg.layers, self.cfg.kernels, strict=True)
    return {layer: Router(len(kernels), self.cfg.temperature, name=f'router_{layer}')(hidden) for layer, kernels in layers}


def first_router(x: jax.Array, places: jax.Array, prompt: Prompt, router_id: int, num_image: int) -> jax.Array:
  """The hidden state of each row's first router token behind its image; arbitrary where there is none.

  Args:
    x: float[B, S, D]; places: int32[B, S], where each row stood in the full sequence, -1 for padding.
    prompt: the batch; router_id: the token; num_image: image tokens of the full sequence.

  Returns:
    float[B, D].
  """
  token = layout.gather_rows(prompt.tokens, jnp.maximum(places, 0))
  found = (token == router_id) & (places >= prompt.image_start[:, None] + num_image)
  return layout.gather_rows(x, jnp.argmax(found, axis=-1)[:, None])[:, 0]
