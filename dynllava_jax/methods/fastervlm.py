"""FasterVLM (arXiv 2412.01818 v1): keeps the patches that the class token attends to most, in their order.

`tokens` is the authors' `visual_token_num`, 144 or 58 of 576 in their figures.
"""

from dynllava_jax.config import VisionConfig
from dynllava_jax.methods.base import KeptPatches, Reduced, Reducer, TowerNeeds, TowerOutput, patches_kept
from dynllava_jax.ops.layout import gather_rows
from dynllava_jax.ops.selection import top_indices


def needs(vision: VisionConfig, options: KeptPatches) -> TowerNeeds:
  """The attention row of the block whose output is the features."""
  del options
  return TowerNeeds(class_attention=(vision.selected_block,))


def reduce(tower: TowerOutput, project, options: KeptPatches) -> Reduced:
  """The patches with the largest head mean of the class token's attention."""
  (attention,) = tower.class_attention.values()
  kept = top_indices(attention.mean(1), options.tokens)
  return Reduced(project(gather_rows(tower.features, kept)), kept)


REDUCER = Reducer(
  reduce=reduce,
  num_tokens=patches_kept,
  needs=needs,
  options=KeptPatches,
  source='arXiv 2412.01818 v1; github.com/Theia-4869/FasterVLM f5d5f12',
  verified="the authors' code: attention row, choice, image tokens, logits, generated tokens",
)
