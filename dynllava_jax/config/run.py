"""How a model is run, whatever its weights: pieces of methods, the stage list, and the mesh of devices."""

import dataclasses
from typing import Any

from dynllava_jax.config.model import ModelConfig
from dynllava_jax.config.parsing import Options, as_options, require


@dataclasses.dataclass(frozen=True)
class Piece:
  """A piece of a method by name, with its settings: in a config and in JSON `{'name': 'visionzip', 'dominant': 11, ...}`.

  Attributes:
    name: in `dynllava_jax.methods`.
    options: what differs from the method's defaults; a dict will do, it is kept as sorted pairs.
  """

  name: str
  options: Options = ()

  def __post_init__(self):
    require(isinstance(self.name, str) and self.name != '', f'a piece is called {self.name!r}, expected the name of a method')
    object.__setattr__(self, 'options', as_options(self.options))

  @classmethod
  def from_plain(cls, value: Any, where: str) -> 'Piece':
    """The piece that a group of settings describes; ConfigError unless it has a name."""
    require(hasattr(value, 'keys'), f"{where}: expected a group with a name, such as dict(name='fastervlm'), got {value!r}")
    name = value['name'] if 'name' in value.keys() else None
    require(isinstance(name, str) and name != '', f'{where}.name: expected the name of a method, got {name!r}')
    return cls(name, as_options({k: value[k] for k in value.keys() if k != 'name'}))

  def to_plain(self) -> dict[str, Any]:
    """What `from_plain` reads."""
    return {'name': self.name, **dict(self.options)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """A run of decoder layers that see one static sequence length, and how its tokens are chosen.

  Attributes:
    start: first decoder layer of the stage; it ends where the next stage starts.
    selector: name in `dynllava_jax.methods` of the method that picks the image tokens entering the
      stage; 'all' keeps every token that reaches it.
    image_keep_rate: share of the run's image tokens kept, `int(num_image_tokens * rate)` of them.
    image_tokens: so many instead of a share; 0 goes by `image_keep_rate`.
    options: settings of the selector; a dict will do.
    compressor: what shrinks the stage's prompt keys and values before they are cached; None caches all.
    layers: how blocks of the stage differ from plain ones; None for plain ones.
    revisit: what chooses, for each generated token, which of the stage's image tokens it attends to; None lets it see all.
    exit: what says, at the end of the stage, whether a row needs the rest; None lets all go on. Behind the last stage all leave.
    gate: what judges generated tokens from this stage on; None leaves it to the selector.
    text_keep_budget: share of `max_new_tokens` that the gated cache has room for. 1.0 never evicts.
      Only selectors and gates that judge generated tokens use it.
  """

  start: int = 0
  selector: str = 'all'
  image_keep_rate: float = 1.0
  text_keep_budget: float = 1.0
  image_tokens: int = 0
  options: Options = ()
  compressor: Piece | None = None
  layers: Piece | None = None
  revisit: Piece | None = None
  gate: Piece | None = None
  exit: Piece | None = None

  def __post_init__(self):
    require(isinstance(self.start, int) and not isinstance(self.start, bool), f'stage: start is {self.start!r}, expected a layer')
    at = f'stage at layer {self.start}'
    require(isinstance(self.selector, str), f'{at}: selector is {self.selector!r}, expected the name of a method')
    for name in ('image_keep_rate', 'text_keep_budget', 'image_tokens'):
      value = getattr(self, name)
      require(isinstance(value, (int, float)) and not isinstance(value, bool), f'{at}: {name} is {value!r}, expected a number')
    require(isinstance(self.image_tokens, int), f'{at}: image_tokens is {self.image_tokens}, expected a whole number')
    for name in ('compressor', 'layers', 'revisit', 'gate', 'exit'):
      piece = getattr(self, name)
      require(piece is None or isinstance(piece, Piece), f"{at}: {name} is {piece!r}, expected a Piece such as Piece('snapkv')")
    object.__setattr__(self, 'options', as_options(self.options))
    require(
      0 < self.image_keep_rate <= 1,
      f'stage at layer {self.start}: image_keep_rate is {self.image_keep_rate}, expected a share in (0, 1]',
    )
    require(
      0 < self.text_keep_budget <= 1,
      f'stage at layer {self.start}: text_keep_budget is {self.text_keep_budget}, expected a share in (0, 1]',
    )
    require(self.image_tokens >= 0, f'stage at layer {self.start}: image_tokens is {self.image_tokens}, expected 0 or more')
    require(
      not self.image_tokens or self.image_keep_rate == 1.0,
      f'stage at layer {self.start}: image_tokens {self.image_tokens} and image_keep_rate {self.image_keep_rate} both say how many '
      'image tokens stay; leave one out',
    )

  def kept_image_tokens(self, num_image_tokens: int) -> int:
    """Of a row with `num_image_tokens` (0 without image): `image_tokens`, or the share of them, cut off as in the authors' code."""
    return min(self.image_tokens, num_image_tokens) if self.image_tokens else int(num_image_tokens * self.image_keep_rate)


DENSE = (Stage(),)


def judges_instructions(stages: tuple[Stage, ...]) -> bool:
  """Whether these stages drop tokens of the user's text too: a 'dynamic' one with its option `instruct`."""
  return any(s.selector == 'dynamic' and bool(dict(s.options).get('instruct')) for s in stages)


def check_stages(stages: tuple[Stage, ...], model: ModelConfig, image_tokens: int | None = None) -> None:
  """Raises ConfigError unless the stage list cuts this model's decoder.

  Args:
    stages, model: what is run.
    image_tokens: of the run, `methods.num_image_tokens`; those of a run without a reducer if None.
  """
  layers = model.llama.num_layers
  image_tokens = model.num_image_tokens if image_tokens is None else image_tokens
  require(len(stages) > 0 and stages[0].start == 0, 'stages: the first stage must start at layer 0')
  starts = [s.start for s in stages]
  require(starts == sorted(set(starts)), f'stages: starts must increase, got {starts}')
  require(
    starts[-1] < layers, f'stages: a stage starts at layer {starts[-1]}, but the decoder has {layers} layers, 0 to {layers - 1}'
  )
  kept: list[int] = []
  for s in stages:
    kept.append(kept[-1] if kept and s.selector == 'all' else s.kept_image_tokens(image_tokens))
  require(min(kept) > 0, f'stages: image_keep_rate leaves none of the {image_tokens} image tokens')
  asked = [s.image_tokens or k for s, k in zip(stages, kept)]
  require(max(asked) <= image_tokens, f'stages: image_tokens {max(asked)} are more than the {image_tokens} of the run')
  require(kept == sorted(kept, reverse=True), f'stages: image tokens cannot come back, got budgets {kept}')
  for stage in stages:
    require(
      stage.selector != 'all' or (stage.image_keep_rate == 1.0 and not stage.image_tokens),
      f"stage at layer {stage.start}: selector 'all' keeps every token, image_keep_rate must be 1.0 and image_tokens 0",
    )
    require(
      stage.selector != 'dynamic' or model.predictor is not None,
      f"stage at layer {stage.start}: selector 'dynamic' needs predictors, and this model has none; "
      'train them with configs/digits.py:dynamic or convert a Dynamic-LLaVA checkpoint',
    )
    held = 'none' if model.dpn is None else f'them in front of layers {list(model.dpn.layers)}'
    require(
      stage.selector not in ('dpn', 'dpn_routed') or (model.dpn is not None and stage.start in model.dpn.layers),
      f'stage at layer {stage.start}: selector {stage.selector!r} needs a pooling router in front of this layer, and this '
      f'model has {held}; train one with configs/methods.py:dpn',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Device mesh. -1 for one axis takes all devices that the others leave.

  Attributes:
    data: copies of the weights, each with rows of its own; fsdp: parts of weights and of a copy's rows; tensor: parts of a layer.
    expert: parts of the experts of a layer, and of the batch; for models with experts.
    slices: TPU slices, or other groups of devices, that only a slow network joins: `data` goes over them, nothing else does.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  expert: int = 1
  slices: int = 1

  def __post_init__(self):
    require(self.slices >= 1, f'mesh.slices is {self.slices}, expected 1 or more')
