"""Memory tokens (`methods.icae`): their vectors, the adapter that reads a context for them, and the pass that fills them.

Axes: B batch, P context tokens, M slots, D width, R rank.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import methods
from dynllava_jax.config import MemoryConfig, ModelConfig
from dynllava_jax.methods import icae
from dynllava_jax.models.layers import Leaf, partitioned
from dynllava_jax.models.lora import ADAPTERS, MATRICES


class MemoryTokens(nn.Module):
  """Vectors of the memory tokens, and behind them those of the tasks, in the order of `icae.TASKS`."""

  memory: MemoryConfig
  width: int

  @nn.compact
  def __call__(self) -> jax.Array:
    """float[slots + 3, D]."""
    shape = self.memory.slots + len(icae.TASKS), self.width
    return self.param('embedding', partitioned(nn.initializers.normal(1.0), None, 'embed'), shape)


def adapter_leaves(cfg: ModelConfig) -> Mapping[str, Leaf]:
  """`q_a` float[D, R], `q_b` float[R, N, H] and so on, of a layer: A at random as PEFT draws it, B zero."""
  leaves = {}
  for target in cfg.memory.targets:
    matrix = MATRICES[target]
    inner, outer = (matrix.sizes(letters, cfg.llama) for letters in (matrix.inner, matrix.outer))
    bound = math.prod(inner) ** -0.5
    uniform = lambda key, shape, bound=bound: jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    leaves[f'{target}_a'] = Leaf(shape=(*inner, cfg.memory.rank), axes=(*matrix.names_of(matrix.inner), None), init=uniform)
    leaves[f'{target}_b'] = Leaf(
      shape=(cfg.memory.rank, *outer), axes=(None, *matrix.names_of(matrix.outer)), init=nn.initializers.zeros
    )
  return leaves


def compress(model: Any, context: jax.Array) -> jax.Array:
  """Context float[B, P, D] -> slots float[B, M, D]: each segment alone, positions from 0, behind the decoder's final norm."""
  memory, batch = model.cfg.memory, context.shape[0]
  vectors = model.memory()[: memory.slots].astype(context.dtype)
  parts = icae.segments(context.shape[1], memory)
  size = len(parts[0]) + memory.slots
  place, own = np.zeros((len(parts), size), np.int32), np.zeros((len(parts), memory.slots), np.int32)
  for row, part in enumerate(parts):  # memory tokens follow a shorter segment at once
    own[row] = len(part) + np.arange(memory.slots)
    place[row, : len(part)], place[row, own[row]] = part, context.shape[1] + np.arange(memory.slots)
  everything = jnp.concatenate([context, jnp.broadcast_to(vectors, (batch, *vectors.shape))], 1)
  x = everything[:, place].reshape(batch * len(parts), size, -1)
  positions = jnp.broadcast_to(jnp.arange(size), x.shape[:2])
  llama, variables = model.llama.unbind()
  variables = dict(variables) | {ADAPTERS: adapters(model)}
  for i in range(len(model.stages)):
    x, _ = llama.apply(variables, i, x, positions, method='run_stage')
  x = x.reshape(batch, len(parts), size, -1)
  slots = jnp.take_along_axis(x, jnp.asarray(own)[None, :, :, None], 2).reshape(batch, -1, x.shape[-1])
  return llama.apply(variables, slots, method='output')[0]


def adapters(model: Any) -> dict[str, Any]:
  """The adapter as the decoder's layers look for it (`models.lora`), scaled."""
  memory, found = model.cfg.memory, {}
  for i, rows in enumerate(model.memory_adapter()):
    scaled = {name: rows[name] * (memory.alpha / memory.rank if name.endswith('_b') else 1) for name in rows}
    stage = {target: {n: scaled[f'{target}_{n}'] for n in 'ab'} for target in memory.targets}
    if model.arrangement.apart:
      layers = next(iter(rows.values())).shape[0]
      found |= {f'stage_{i}_{j}': jax.tree.map(lambda x, j=j: x[j], stage) for j in range(layers)}
    else:
      found[f'stage_{i}'] = stage
  return found


def compressed(model: Any, reduced: methods.Reduced, options: icae.Options) -> methods.Reduced:
  """The image tokens of a run with memory tokens; each stands for many patches."""
  tokens = compress(model, reduced.tokens)
  if options.task:
    vector = model.memory()[model.cfg.memory.slots + icae.TASKS.index(options.task)].astype(tokens.dtype)
    tokens = jnp.concatenate([tokens, jnp.broadcast_to(vector, (tokens.shape[0], 1, vector.shape[0]))], 1)
  return methods.Reduced(tokens, jnp.full(tokens.shape[:2], -1, jnp.int32))
