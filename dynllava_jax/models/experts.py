"""Layers whose MLP is a choice among experts (MoE-LLaVA, arXiv 2401.15947): their weights, and how they are trained.

Axes: B batch, T tokens of a row, L layers, E experts, D width, F mlp.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax.config import LlamaConfig
from dynllava_jax.models.layers import Dtype, partitioned
from dynllava_jax.ops import experts

NOISE = 'experts/noise'  # what is scanned along with layers while their experts are trained
INIT = nn.initializers.lecun_normal(batch_axis=(0,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learning:
  """How experts are trained: `real` bool[B, T], tokens that are no padding; `factor` of the capacity, static."""

  real: jax.Array
  factor: float = dataclasses.field(metadata={'static': True})


def router_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """As torch makes a linear layer: uniform within 1 / sqrt(D)."""
  return jax.random.uniform(key, shape, jnp.float32, -(shape[0] ** -0.5), shape[0] ** -0.5)


class ExpertsMlp(nn.Module):
  """The experts of a layer."""

  cfg: LlamaConfig
  dtype: Dtype

  @nn.compact
  def __call__(
    self, x: jax.Array, router: jax.Array, learning: Learning | None, noise: jax.Array | None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs normed tokens through them.

    Args:
      x: float[B, T, D]; router: float32[D, E].
      learning, noise: in training, the latter float32[B, T, E]; None in use.

    Returns:
      (float[B, T, D], what records and losses look at: `expert_weights` float32[B, T, E], and in training `expert_balance`,
      `expert_load` and `expert_logits`).
    """
    width, mlp, number, top_k = self.cfg.hidden_size, self.cfg.mlp_dim, self.cfg.experts.count, self.cfg.experts.top_k
    of = lambda name, shape, axes: self.param(name, partitioned(INIT, 'expert', *axes), (number, *shape)).astype(self.dtype)
    gate, up = (of(name, (width, mlp), ('embed', 'mlp')) for name in ('gate', 'up'))
    down = of('down', (mlp, width), ('mlp', 'embed'))
    tokens = x.reshape(-1, width)
    logits = jnp.einsum('nd,de->ne', tokens.astype(jnp.float32), router, precision='highest')
    if learning is None:
      routes = experts.used(logits, top_k)
      y, seen = experts.through(tokens, gate, up, down, routes), {}
    else:
      routes = experts.trained(logits, top_k, noise.reshape(-1, number), learning.real.reshape(-1), learning.factor)
      size = experts.places(len(tokens), number, top_k, learning.factor)
      y = experts.through_places(tokens, gate, up, down, routes, size)
      seen = {'expert_balance': routes.balance, 'expert_load': routes.load, 'expert_logits': logits.reshape(*x.shape[:2], -1)}
    spread = (jax.nn.one_hot(routes.expert, number) * routes.weight[..., None]).sum(1)
    return y.reshape(x.shape), seen | {'expert_weights': spread.reshape(*x.shape[:2], -1)}
