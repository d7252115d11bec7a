"""The matrices of a decoder layer: their axes, and their form as int8 with one scale per output.

The group `scales` holds what int8 weights are multiplied with: `scales/layers/q` float32[L, N, H]. It is cut for stages like the
weights, and while a model runs it is a collection of its own, which `Block` looks into.
Axes: L layers, D width, N heads, K kv heads, H head dim, F mlp.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax.config import LlamaConfig

SCALES = 'scales'


@dataclasses.dataclass(frozen=True)
class Matrix:
  """One of a layer's matrices: its axes by letter and by logical name, and which of them the input has."""

  letters: str
  names: tuple[str, ...]
  inner: str

  @property
  def outer(self) -> str:
    return ''.join(c for c in self.letters if c not in self.inner)

  def names_of(self, letters: str) -> tuple[str, ...]:
    return tuple(self.names[self.letters.index(c)] for c in letters)

  def sizes(self, letters: str, cfg: LlamaConfig) -> tuple[int, ...]:
    return tuple(
      dict(heads=cfg.num_heads, kv_heads=cfg.num_kv_heads, embed=cfg.hidden_size, head_dim=cfg.head_dim, mlp=cfg.mlp_dim)[n]
      for n in self.names_of(letters)
    )


KEY = Matrix('ndh', ('kv_heads', 'embed', 'head_dim'), 'd')
UP = Matrix('df', ('embed', 'mlp'), 'd')
MATRICES = {
  'q': Matrix('ndh', ('heads', 'embed', 'head_dim'), 'd'),
  'k': KEY,
  'v': KEY,
  'o': Matrix('nhd', ('heads', 'head_dim', 'embed'), 'nh'),
  'gate': UP,
  'up': UP,
  'down': Matrix('fd', ('mlp', 'embed'), 'f'),
}


def abstract_scales(cfg: LlamaConfig) -> dict[str, Any]:
  """Shapes of the scales that `to_int8` makes, with axis names."""

  def of(matrix: Matrix):
    shape = jax.ShapeDtypeStruct((cfg.num_layers, *matrix.sizes(matrix.outer, cfg)), jnp.float32)
    return nn.LogicallyPartitioned(shape, ('layers', *matrix.names_of(matrix.outer)))

  return {'layers': {name: of(matrix) for name, matrix in MATRICES.items()}}


def smaller(llama: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """(the decoder with its matrices as int8, the scales): the largest entry of each output becomes 127.

  Takes it in checkpoint form, or cut for stages with their layers stacked. `llama` is consumed: each matrix is given up once its
  int8 form is there.
  """
  small, scales = {}, {}
  for group in list(llama):
    layers = llama.pop(group)
    small[group] = layers
    if group == 'layers' or group.startswith('stage_'):
      small[group], scales[group] = {}, {}
      for name in list(layers):
        small[group][name] = layers.pop(name)
        if name in MATRICES:
          small[group][name], scales[group][name] = to_int8(name, small[group][name], 1)
  return small, scales


def to_int8(name: str, weight: jax.Array, stacked: int) -> tuple[jax.Array, jax.Array]:
  """(int8, float32 scales, one per output) of the matrix `name`, behind so many axes of layers."""
  return _to_int8(weight, tuple(axis + stacked for axis in inner_axes(name)))


@functools.partial(jax.jit, static_argnums=1)
def _to_int8(weight: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  largest = jnp.abs(weight).max(axes, keepdims=True).astype(jnp.float32)
  scale = jnp.where(largest != 0, largest, 1) / 127  # of NaN it is NaN, which who looks for numbers finds
  return jnp.round(weight / scale).astype(jnp.int8), scale.squeeze(axes)


def plain(layer: dict[str, Any], scales: dict[str, Any] | None, dtype: Any) -> dict[str, Any]:
  """A layer's matrices as they multiply, in `dtype`: of int8 ones the product with their scales."""

  def of(name: str, weight: jax.Array) -> jax.Array:
    if not scales or name not in scales:
      return weight.astype(dtype)
    axes = inner_axes(name)
    return (weight * jnp.expand_dims(scales[name], axes)).astype(dtype)

  return {name: of(name, weight) if is_matrix(name) else weight for name, weight in layer.items()}


def is_matrix(name: str) -> bool:
  """Whether a layer's parameter of this name is one of its matrices, or q, k and v as one, as `arrangement` may have them."""
  return name in MATRICES or name == 'qkv'


def inner_axes(name: str) -> tuple[int, ...]:
  """Which axes of a matrix are summed over."""
  return (0,) if name == 'qkv' else tuple(MATRICES[name].letters.index(c) for c in MATRICES[name].inner)


def check_scales(llama: dict[str, Any], scales: dict[str, Any]) -> None:
  """Raises ValueError unless each int8 matrix of the decoder, in any form, has its scales, and nothing else has any."""
  for group, layers in llama.items():
    for name, weight in layers.items() if isinstance(layers, dict) else ():
      stated = scales.get(group, {}).get(name)
      if not is_matrix(name) or weight.dtype != jnp.int8:
        if stated is not None:
          raise ValueError(f'params: scales/{group}/{name} is given, but llama/{group}/{name} is no int8 matrix')
        continue
      stacked = weight.ndim - (2 if name == 'qkv' else len(MATRICES[name].letters))
      inner = [axis + stacked for axis in inner_axes(name)]
      expected = tuple(n for axis, n in enumerate(weight.shape) if axis not in inner)
      if stated is None or tuple(stated.shape) != expected:
        found = 'none are there' if stated is None else f'found {"x".join(map(str, stated.shape))}'
        raise ValueError(f'params: llama/{group}/{name} is int8 and needs scales of {"x".join(map(str, expected))}; {found}')
