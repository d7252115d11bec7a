"""VisionZip (arXiv 2412.04467): keeps the patches that the class token attends to, and condenses the others into a few.

The class token itself enters the language model too, so M = `dominant` + `contextual` counts it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.config import ModelConfig, VisionConfig
from dynllava_jax.config.parsing import require
from dynllava_jax.methods.base import Reduced, Reducer, TowerNeeds, TowerOutput
from dynllava_jax.ops.layout import gather_rows
from dynllava_jax.ops.selection import top_indices
from dynllava_jax.ops.similarity import cosines

CLASS_TOKEN = -1  # in `Reduced.index`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """`dominant`: tokens kept, the class token among them; `contextual`: tokens merged from the rest. The authors' are 54 and 10."""

  dominant: int
  contextual: int

  def __post_init__(self):
    require(self.dominant > 0, f'dominant is {self.dominant}, expected at least 1, the class token')
    require(self.contextual >= 0, f'contextual is {self.contextual}, expected 0 or more')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
  """Which patches go on and how, all counted from 0 (the tower's rows are one more).

  Attributes:
    dominant: int32[B, d], kept, ascending.
    target: int32[B, c], patches that absorb others; merged: int32[B, r], patches that are absorbed; both ascending.
    assigned: int32[B, r], for each merged patch the number of its target.
  """

  dominant: jax.Array
  target: jax.Array
  merged: jax.Array
  assigned: jax.Array


def num_tokens(model: ModelConfig, options: Options) -> int:
  """`dominant + contextual`; ConfigError if there are not so many patches and the class token."""
  patches, wanted = model.vision.num_patches, options.dominant - 1 + options.contextual
  require(
    wanted <= patches,
    f'dominant - 1 + contextual is {wanted}, the tower has {patches} patches besides the class token',
  )
  return options.dominant + options.contextual


def needs(vision: VisionConfig, options: Options) -> TowerNeeds:
  """Attention row and keys of the block whose output is the features, and the class token's feature."""
  block = (vision.selected_block,)
  return TowerNeeds(class_feature=True, class_attention=block, key_mean=block if options.contextual else ())


def choose(tower: TowerOutput, options: Options) -> Choice:
  """Dominant patches by attention; of the rest evenly spaced targets, and for every other patch the target with the likest key."""
  (attention,) = tower.class_attention.values()
  batch, _, patches = attention.shape
  dominant = top_indices(attention.sum(1), options.dominant - 1)
  rows = jnp.arange(batch)[:, None]
  taken = jnp.zeros((batch, patches), bool).at[rows, dominant].set(True)
  rest = jnp.argsort(taken, axis=1, stable=True)[:, : patches - options.dominant + 1].astype(jnp.int32)
  if not options.contextual:
    return Choice(dominant, rest[:, :0], rest[:, :0], rest[:, :0])
  size = rest.shape[1]
  step = max(1, size // options.contextual)
  is_target = [i % step == 0 and i < step * options.contextual for i in range(size)]
  target = rest[:, [i for i in range(size) if is_target[i]]]
  merged = rest[:, [i for i in range(size) if not is_target[i]]]
  (keys,) = tower.key_mean.values()
  alike = cosines(gather_rows(keys[:, 1:], merged), gather_rows(keys[:, 1:], target))
  return Choice(dominant, target, merged, alike.argmax(-1).astype(jnp.int32))


def condense(tower: TowerOutput, choice: Choice) -> jax.Array:
  """Features float[B, d + 1 + c, C] that go to the projector: class token, dominant patches, targets + mean of what they absorb."""
  absorbed = jax.nn.one_hot(choice.assigned, choice.target.shape[1], dtype=jnp.float32)
  patches = tower.features.astype(jnp.float32)
  sums = jnp.einsum('brc,brd->bcd', absorbed, gather_rows(patches, choice.merged), precision='highest')
  merged = gather_rows(patches, choice.target) + sums / jnp.maximum(absorbed.sum(1), 1)[..., None]
  kept = gather_rows(tower.features, choice.dominant)
  return jnp.concatenate([tower.class_feature[:, None], kept, merged.astype(kept.dtype)], 1)


def flops(model: ModelConfig, options: Options) -> float:
  """The likeness of keys of merged patches to those of their targets, and the sums over what these absorb."""
  vision = model.vision
  merged = vision.num_patches - options.dominant + 1 - options.contextual
  return 2 * merged * options.contextual * (vision.hidden_size // vision.num_heads + vision.hidden_size)


def reduce(tower: TowerOutput, project, options: Options) -> Reduced:
  """Class token, dominant patches, contextual tokens, in this order; a contextual token stands for its target's patch."""
  choice = choose(tower, options)
  first = jnp.full((choice.dominant.shape[0], 1), CLASS_TOKEN, jnp.int32)
  return Reduced(project(condense(tower, choice)), jnp.concatenate([first, choice.dominant, choice.target], 1))


REDUCER = Reducer(
  reduce=reduce,
  num_tokens=num_tokens,
  needs=needs,
  flops=flops,
  options=Options,
  source='arXiv 2412.04467; github.com/dvlab-research/VisionZip 3151f6d',
  verified="the authors' code: attention rows, keys, choice, merging, image tokens, logits, generated tokens",
)
