"""FasterVLM (arXiv 2412.01818 v1): keeps the patches that the class token attends to most, in their order."""

import dataclasses

from dynllava_jax.config import ModelConfig, VisionConfig
from dynllava_jax.config.parsing import require
from dynllava_jax.methods.base import Reduced, Reducer, TowerNeeds, TowerOutput
from dynllava_jax.ops.layout import gather_rows
from dynllava_jax.ops.selection import top_indices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """`tokens`: image tokens kept; the authors' `visual_token_num`, 144 or 58 of 576 in their figures."""

  tokens: int

  def __post_init__(self):
    require(self.tokens > 0, f'tokens is {self.tokens}, expected a positive number')


def num_tokens(model: ModelConfig, options: Options) -> int:
  """`tokens`; ConfigError if the tower has fewer patches."""
  patches = model.vision.num_patches
  require(options.tokens <= patches, f'reducer fastervlm: tokens is {options.tokens}, the tower has {patches} patches')
  return options.tokens


def needs(vision: VisionConfig, options: Options) -> TowerNeeds:
  """The attention row of the block whose output is the features."""
  del options
  return TowerNeeds(class_attention=(vision.selected_block,))


def reduce(tower: TowerOutput, project, options: Options) -> Reduced:
  """The patches with the largest head mean of the class token's attention."""
  (attention,) = tower.class_attention.values()
  kept = top_indices(attention.mean(1), options.tokens)
  return Reduced(project(gather_rows(tower.features, kept)), kept)


REDUCER = Reducer(
  reduce=reduce,
  num_tokens=num_tokens,
  needs=needs,
  options=Options,
  source='arXiv 2412.01818 v1; github.com/Theia-4869/FasterVLM f5d5f12',
  verified="the authors' code: attention row, choice, image tokens, logits, generated tokens",
)
