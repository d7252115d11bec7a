"""Low-rank adapters (arXiv 2106.09685) beside the decoder's matrices: y = x W + alpha / rank * dropout(x) A B.

The group `adapters` holds A and B of each layer like the decoder's own weights, stacked: `adapters/layers/q/a` float[L, D, R],
`b` float[L, R, N, H]. While a model runs, it is a collection of its own, which `Block` looks into.
Axes: B batch, T positions, L layers, D width, N heads, H head dim, F mlp, R rank.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax.config import LlamaConfig, LoraConfig, Stage
from dynllava_jax.models.matrices import MATRICES, SCALES, Matrix

ADAPTERS = 'adapters'
DROPOUT = 'dropout'  # beside the adapters of a layer: keys of the rows, and the rate


def init_adapters(cfg: LlamaConfig, lora: LoraConfig, key: jax.Array) -> dict[str, Any]:
  """New adapters in checkpoint form, with axis names: A at random as PEFT draws it, B zero."""
  layers = {}
  for target, matrix_key in zip(lora.targets, jax.random.split(key, len(lora.targets))):
    matrix = MATRICES[target]
    inner, outer = (matrix.sizes(letters, cfg) for letters in (matrix.inner, matrix.outer))
    bound = math.prod(inner) ** -0.5
    a = jax.random.uniform(matrix_key, (cfg.num_layers, *inner, lora.rank), jnp.float32, -bound, bound)
    b = jnp.zeros((cfg.num_layers, lora.rank, *outer))
    layers[target] = {
      'a': nn.LogicallyPartitioned(a, ('layers', *matrix.names_of(matrix.inner), None)),
      'b': nn.LogicallyPartitioned(b, ('layers', None, *matrix.names_of(matrix.outer))),
    }
  return {'layers': layers}


def abstract_adapters(cfg: LlamaConfig, lora: LoraConfig) -> dict[str, Any]:
  """Shapes of `init_adapters`."""
  return jax.eval_shape(lambda: init_adapters(cfg, lora, jax.random.key(0)))


def as_variables(
  groups: dict[str, Any], lora: LoraConfig | None, stages: tuple[Stage, ...], keys: jax.Array | None
) -> dict[str, Any]:
  """What `Module.apply` takes, from parameter groups in run form.

  Args:
    groups: all of them; with LoRA `adapters` and, if the decoder is int8, `scales` among them.
    lora: how the adapters are used; None if there are none.
    stages: which the groups are cut for.
    keys: uint32[B, 2], data of one random key per row, for dropout; None without it.
  """
  variables = {'params': {k: v for k, v in groups.items() if k not in (ADAPTERS, SCALES)}}
  if SCALES in groups:
    variables[SCALES] = {'llama': groups[SCALES]}
  if lora is None:
    return variables
  scaled = lambda name, x: x * lora.scale if name == 'b' else x
  adapters = {
    stage: {target: {n: scaled(n, x) for n, x in pair.items()} for target, pair in layers.items()}
    for stage, layers in groups[ADAPTERS].items()
  }
  if keys is not None:
    for i, stage in enumerate(stages):
      layers = adapters[f'stage_{i}']
      numbers = stage.start + jnp.arange(next(iter(layers.values()))['a'].shape[0])
      of_rows = jax.vmap(lambda n: jax.vmap(lambda k: _fold(k, n))(keys))(numbers)
      layers[DROPOUT] = {'keys': of_rows, 'rate': jnp.full(numbers.shape, lora.dropout)}
  variables[ADAPTERS] = {'llama': adapters}
  return variables


def _fold(key_data: jax.Array, number: jax.Array) -> jax.Array:
  return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key_data), number))


def multiply(block: nn.Module, name: str, equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """`einsum(equation, x, weight)` for the matrix `name` of a decoder layer, with its scale and its adapter if it has them."""
  return adapted(block, name, x, product(block, name, equation, x, weight))


def product(block: nn.Module, name: str, equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """The same with its scale alone."""
  y = jnp.einsum(equation, x, weight)
  if block.has_variable(SCALES, name):
    y = (y * block.get_variable(SCALES, name)).astype(y.dtype)  # by the scale itself, not as 16 bits have it
  return y


def adapted(block: nn.Module, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """`y`, the product of `x` and the matrix `name` of a decoder layer, with what its adapter adds if it has one."""
  if block.has_variable(ADAPTERS, name):
    adapter, letters = block.get_variable(ADAPTERS, name), MATRICES[name]
    a, b = (adapter[n].astype(x.dtype) for n in 'ab')
    if block.has_variable(ADAPTERS, DROPOUT):
      x = _dropped(x, name, **block.get_variable(ADAPTERS, DROPOUT))
    low = jnp.einsum(f'bt{letters.inner},{letters.inner}r->btr', x, a)
    y = y + jnp.einsum(f'btr,r{letters.outer}->bt{letters.outer}', low, b)
  return y


def _dropped(x: jax.Array, name: str, keys: jax.Array, rate: jax.Array) -> jax.Array:
  """Each row by its own key, so that it does not matter with which others it is computed."""
  number = list(MATRICES).index(name)
  draw = lambda key: jax.random.bernoulli(jax.random.wrap_key_data(_fold(key, number)), 1 - rate, x.shape[1:])
  return jnp.where(jax.vmap(draw)(keys), x / (1 - rate).astype(x.dtype), 0)


def merged(llama: dict[str, Any], adapters: dict[str, Any], scale: float) -> dict[str, Any]:
  """The decoder, in checkpoint or run form, with `scale * A B` added, in its own dtype; one layer in float32 at a time."""
  result = dict(llama)
  for group, targets in adapters.items():
    result[group] = dict(llama[group])
    for name, pair in targets.items():
      result[group][name] = _merge(result[group][name], pair['a'], pair['b'], MATRICES[name], scale)
  return result


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _merge(weight: jax.Array, a: jax.Array, b: jax.Array, matrix: Matrix, scale: float) -> jax.Array:
  def of_layer(layer):
    w, a, b = (x.astype(jnp.float32) for x in layer)
    product = jnp.einsum(f'{matrix.inner}r,r{matrix.outer}->{matrix.letters}', a, b, precision='highest')
    return (w + scale * product).astype(weight.dtype)

  return jax.lax.map(of_layer, (weight, a, b))
