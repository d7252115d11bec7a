"""Baseline: the mean over squares of neighbouring patches, 2 x 2 of them."""

import dataclasses

import jax.numpy as jnp

from dynllava_jax.config import ModelConfig
from dynllava_jax.config.parsing import require
from dynllava_jax.methods.base import Reduced, Reducer, TowerOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """`window`: patches along the side of a square. Where squares do not divide the grid, those at its right and lower edge are cut
  off by it: the mean is over the patches that there are."""

  window: int = 2

  def __post_init__(self):
    require(self.window > 0, f'window is {self.window}, expected a positive number of patches')


def num_tokens(model: ModelConfig, options: Options) -> int:
  """Squares that cover the grid."""
  return (-(-model.vision.image_size // model.vision.patch_size // options.window)) ** 2


def reduce(tower: TowerOutput, project, options: Options) -> Reduced:
  """Means of tower features, projected; each stands for the first patch of its square."""
  batch, patches, width = tower.features.shape
  side, size = round(patches**0.5), options.window
  squares = -(-side // size)
  spare = squares * size - side
  grid = jnp.pad(tower.features.astype(jnp.float32).reshape(batch, side, side, width), [(0, 0), (0, spare), (0, spare), (0, 0)])
  sums = grid.reshape(batch, squares, size, squares, size, width).sum((2, 4))
  along = jnp.minimum(size, side - size * jnp.arange(squares))  # patches of a square along one side
  means = (sums / (along[:, None] * along)[..., None]).reshape(batch, squares**2, width)
  first = (size * jnp.arange(squares, dtype=jnp.int32)[:, None] * side + size * jnp.arange(squares, dtype=jnp.int32)).reshape(-1)
  return Reduced(project(means.astype(tower.features.dtype)), jnp.broadcast_to(first, (batch, squares**2)))


REDUCER = Reducer(reduce=reduce, num_tokens=num_tokens, options=Options)
