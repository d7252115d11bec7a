"""How a model is run, whatever its weights: the stage list, and the mesh of devices."""

import dataclasses

from dynllava_jax.config.model import ModelConfig
from dynllava_jax.config.parsing import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """A run of decoder layers that see one static sequence length, and how its tokens are chosen.

  Attributes:
    start: first decoder layer of the stage; it ends where the next stage starts.
    selector: name in `dynllava_jax.methods` of the method that picks the image tokens entering the
      stage; 'all' keeps every token.
    image_keep_rate: share of the model's image tokens kept, `int(num_image_tokens * rate)` of them.
    text_keep_budget: share of `max_new_tokens` that the gated cache has room for. 1.0 never evicts.
      Only selectors that judge generated tokens use it.
  """

  start: int = 0
  selector: str = 'all'
  image_keep_rate: float = 1.0
  text_keep_budget: float = 1.0

  def __post_init__(self):
    require(
      0 < self.image_keep_rate <= 1,
      f'stage at layer {self.start}: image_keep_rate is {self.image_keep_rate}, expected a share in (0, 1]',
    )
    require(
      0 < self.text_keep_budget <= 1,
      f'stage at layer {self.start}: text_keep_budget is {self.text_keep_budget}, expected a share in (0, 1]',
    )

  def kept_image_tokens(self, num_image_tokens: int) -> int:
    """Truncation of the float product, as in the authors' code."""
    return int(num_image_tokens * self.image_keep_rate)


DENSE = (Stage(),)


def check_stages(stages: tuple[Stage, ...], model: ModelConfig) -> None:
  """Raises ConfigError unless the stage list cuts this model's decoder."""
  layers, image_tokens = model.llama.num_layers, model.vision.num_patches
  require(len(stages) > 0 and stages[0].start == 0, 'stages: the first stage must start at layer 0')
  starts = [s.start for s in stages]
  require(starts == sorted(set(starts)), f'stages: starts must increase, got {starts}')
  require(
    starts[-1] < layers, f'stages: a stage starts at layer {starts[-1]}, but the decoder has {layers} layers, 0 to {layers - 1}'
  )
  kept = [s.kept_image_tokens(image_tokens) for s in stages]
  require(min(kept) > 0, f'stages: image_keep_rate leaves none of the {image_tokens} image tokens')
  require(kept == sorted(kept, reverse=True), f'stages: image tokens cannot come back, got budgets {kept}')
  for stage in stages:
    require(
      stage.selector != 'all' or stage.image_keep_rate == 1.0,
      f"stage at layer {stage.start}: selector 'all' keeps every token, image_keep_rate must be 1.0",
    )
    require(
      stage.selector != 'dynamic' or model.predictor is not None,
      f"stage at layer {stage.start}: selector 'dynamic' needs predictors, and this model has none; "
      'train them with configs/digits.py:dynamic or convert a Dynamic-LLaVA checkpoint',
    )


def check_trainable_stages(stages: tuple[Stage, ...]) -> None:
  """Raises ConfigError unless the stage list has a training objective (dense, or one 'dynamic' cut)."""
  require(
    all(s.selector in ('all', 'dynamic') for s in stages) and sum(s.selector == 'dynamic' for s in stages) <= 1,
    f'stages: only a dense run or one with a single dynamic stage can be trained, got {[s.selector for s in stages]}',
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Device mesh. -1 for one axis takes all devices that the others leave."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
