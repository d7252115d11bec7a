"""What the parameter groups that methods bring (`config/groups.py`, under the same names) are made of: Linen modules.

Axes: B batch, P image tokens, D width, L layers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax import methods
from dynllava_jax.config import DENSE, ModelConfig, Stage
from dynllava_jax.config.groups import GROUPS, groups_of
from dynllava_jax.models.exiting import ExitHead, as_final_head
from dynllava_jax.models.layers import Dtype, Leaf, partitioned
from dynllava_jax.models.memory import MemoryTokens, adapter_leaves
from dynllava_jax.models.predictors import ImagePredictor, TextPredictor
from dynllava_jax.models.pyramid import Pyramid
from dynllava_jax.models.revisiting import Relevance
from dynllava_jax.sharding import unboxed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brought:
  """A group's module, or what decoder layers have of it.

  Attributes:
    make: (model, dtype) -> the module; None for a layered group.
    inputs: model -> what it is called with when its parameters are made; only shapes count.
    like: (parameters of a model in checkpoint form) -> those of the group where it is new, if it begins as others do.
    leaves: of a layered group, model -> its weights by name.
  """

  make: Callable[[ModelConfig, Dtype], nn.Module] | None = None
  inputs: Callable[[ModelConfig], tuple[jax.Array, ...]] = lambda cfg: ()
  like: Callable[[Any], Any] | None = None
  leaves: Callable[[ModelConfig], Mapping[str, Leaf]] | None = None

  def module(self, cfg: ModelConfig, dtype: Dtype, stages: tuple[Stage, ...] = DENSE) -> nn.Module:
    """For one model, cut into `stages`."""
    if self.leaves is None:
      return self.make(cfg, dtype)
    return LayerWeights(self.leaves(cfg), tuple(s.start for s in stages), cfg.llama.num_layers)


class LayerWeights(nn.Module):
  """Weights beside the decoder's blocks, one row per layer; of stage i in `stage_i` while a model runs.

  They are scanned along with the blocks, where a `LayerKind` finds those of its layer among the flags, as `GROUP/LEAF`.
  """

  leaves: Mapping[str, Leaf]
  starts: tuple[int, ...]
  num_layers: int

  def setup(self):
    ends = [*self.starts[1:], self.num_layers]
    for i, (start, end) in enumerate(zip(self.starts, ends)):
      setattr(self, f'stage_{i}', _Rows(self.leaves, end - start))

  def __call__(self) -> tuple[dict[str, jax.Array], ...]:
    """Per stage, by name, float[L, ...]."""
    return tuple(getattr(self, f'stage_{i}')() for i in range(len(self.starts)))


class _Rows(nn.Module):
  leaves: Mapping[str, Leaf]
  layers: int

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    rows = lambda leaf: lambda key, shape: jax.vmap(lambda k: leaf.init(k, leaf.shape))(jax.random.split(key, self.layers))
    return {
      name: self.param(name, partitioned(rows(leaf), 'layers', *leaf.axes), (self.layers, *leaf.shape))
      for name, leaf in self.leaves.items()
    }


def _image_rows(cfg: ModelConfig) -> tuple[jax.Array, ...]:
  return (jnp.zeros((1, methods.num_image_tokens(cfg), cfg.llama.hidden_size)),)


def _router(cfg: ModelConfig) -> dict[str, Leaf]:
  start = methods.get(cfg.routers.method, 'layers').routing.start
  init = nn.initializers.normal(start * cfg.llama.hidden_size**-0.5)
  kernel = Leaf(shape=(cfg.llama.hidden_size,), axes=('embed',), init=init)
  return {'kernel': kernel} | ({'bias': Leaf(shape=(), axes=(), init=nn.initializers.zeros)} if cfg.routers.bias else {})


def _interactions(cfg: ModelConfig) -> dict[str, Leaf]:
  width, dim, bias = cfg.llama.hidden_size, cfg.pruning.dim, cfg.pruning.bias
  linear = Leaf(shape=(width, dim), axes=('embed', None), init=nn.initializers.normal(width**-0.5))
  return {'q': linear, 'k': linear, 'bias': Leaf(shape=(1,), axes=(None,), init=nn.initializers.constant(bias))}


MODULES: dict[str, Brought] = {
  'image_predictor': Brought(make=lambda cfg, dtype: ImagePredictor(cfg.predictor, dtype), inputs=_image_rows),
  'text_predictor': Brought(make=lambda cfg, dtype: TextPredictor(cfg.predictor, dtype), inputs=_image_rows),
  'instruct_predictor': Brought(make=lambda cfg, dtype: TextPredictor(cfg.predictor, dtype), inputs=_image_rows),
  'routers': Brought(leaves=_router),
  'dpn': Brought(make=lambda cfg, dtype: Pyramid(cfg.dpn), inputs=lambda cfg: (jnp.zeros((1, cfg.llama.hidden_size)),)),
  'exit_head': Brought(make=lambda cfg, dtype: ExitHead(cfg.llama, dtype), inputs=_image_rows, like=as_final_head),
  'memory': Brought(make=lambda cfg, dtype: MemoryTokens(cfg.memory, cfg.llama.hidden_size)),
  'memory_adapter': Brought(leaves=adapter_leaves),
  'pruning': Brought(leaves=_interactions),
  'relevance': Brought(make=lambda cfg, dtype: Relevance(cfg.relevance, cfg.llama.hidden_size)),
}


def modules_of(cfg: ModelConfig, dtype: Dtype, stages: tuple[Stage, ...]) -> dict[str, nn.Module | None]:
  """The modules of all groups by name; None for those that a model has not got."""
  there = groups_of(cfg)
  return {name: MODULES[name].module(cfg, dtype, stages) if name in there else None for name in GROUPS}


def init_groups(cfg: ModelConfig, names: tuple[str, ...], key: jax.Array) -> dict[str, Any]:
  """Random parameters of some groups of a model, without axis names."""
  keys = jax.random.split(key, len(names))
  made = {name: (MODULES[name].module(cfg, jnp.float32), MODULES[name].inputs(cfg)) for name in names}
  return unboxed({name: module.init(k, *inputs)['params'] for k, (name, (module, inputs)) in zip(keys, made.items())})
