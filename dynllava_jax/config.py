"""The one place where configuration becomes typed: frozen dataclasses, built strictly.

A run is described by an ml-collections ConfigDict (see `configs/`); `from_config_dict` turns it into the
dataclasses below and refuses unknown keys, wrong types and impossible values with one readable line
(`ConfigError`). Past this file nothing sees a ConfigDict.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_ID = -200  # stands for the image in token ids, as in LLaVA
IGNORE = -100  # label of positions that are not supervised
# Files that make up a tokenizer beside a Hugging Face model, and beside a checkpoint.
TOKENIZER_FILES = (
  'tokenizer.model',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
)


class ConfigError(ValueError):
  """A configuration that cannot be run; the message names the key, what was found and what to do."""


def _require(ok: bool, message: str) -> None:
  if not ok:
    raise ConfigError(message)


def _require_positive(group: Any, where: str, *names: str) -> None:
  for name in names:
    value = getattr(group, name)
    _require(value > 0, f'{where}{name} is {value}, expected a positive number')


def _require_seed(seed: int) -> None:
  _require(0 <= seed < 2**32, f'seed is {seed}, expected 0 to {2**32 - 1}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
  """CLIP vision tower (pre-LN ViT with class token); defaults are CLIP ViT-L/14-336."""

  image_size: int = 336
  patch_size: int = 14
  hidden_size: int = 1024
  mlp_dim: int = 4096
  num_layers: int = 24
  num_heads: int = 16
  layer_norm_eps: float = 1e-5
  select_layer: int = -2  # index into [embeddings, layer 1, ..., layer num_layers], as LLaVA counts
  image_mean: tuple[float, ...] = CLIP_MEAN
  image_std: tuple[float, ...] = CLIP_STD

  def __post_init__(self):
    _require_positive(self, 'vision: ', 'image_size', 'patch_size', 'hidden_size', 'mlp_dim', 'num_layers', 'num_heads')
    _require(
      self.image_size % self.patch_size == 0,
      f'vision: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}',
    )
    _require(
      self.hidden_size % self.num_heads == 0,
      f'vision: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}',
    )
    _require(len(self.image_mean) == len(self.image_std) == 3, 'vision: image_mean and image_std need 3 numbers each')
    _require(
      0 <= self.layers_run <= self.num_layers,
      f'vision: select_layer {self.select_layer} points outside the {self.num_layers} layers',
    )

  @property
  def num_patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2

  @property
  def layers_run(self) -> int:
    """Layers whose output is needed: `select_layer=-2` leaves the last one out."""
    return self.select_layer if self.select_layer >= 0 else self.num_layers + 1 + self.select_layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """Stretching of rotary frequencies for longer contexts, as transformers' `rope_scaling` describes it.

  Attributes:
    kind: 'linear' (positions divided by `factor`) or 'llama3' (low frequencies divided, high ones left alone).
    low_freq_factor, high_freq_factor, original_max_positions: of 'llama3' alone.
  """

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_positions: int = 8192

  def __post_init__(self):
    _require(self.kind in ('linear', 'llama3'), f'rope_scaling: kind {self.kind!r} is unknown; expected linear or llama3')
    _require_positive(self, 'rope_scaling: ', 'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_positions')
    _require(self.high_freq_factor > self.low_freq_factor, 'rope_scaling: high_freq_factor must be above low_freq_factor')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """LLaMA decoder; defaults are Vicuna-7B v1.5."""

  vocab_size: int = 32000
  hidden_size: int = 4096
  mlp_dim: int = 11008
  num_layers: int = 32
  num_heads: int = 32
  num_kv_heads: int = 32
  rms_norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  tie_embeddings: bool = False  # the output head is the embedding

  def __post_init__(self):
    sizes = ('vocab_size', 'hidden_size', 'mlp_dim', 'num_layers', 'num_heads', 'num_kv_heads')
    _require_positive(self, 'llama: ', *sizes, 'rope_theta', 'rms_norm_eps')
    _require(
      self.hidden_size % self.num_heads == 0,
      f'llama: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}',
    )
    _require(
      self.num_heads % self.num_kv_heads == 0,
      f'llama: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}',
    )
    _require(self.head_dim % 2 == 0, f'llama: head_dim {self.head_dim} is odd, rotary embedding needs pairs')

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictorConfig:
  """The keep/drop predictors of Dynamic-LLaVA; defaults as released by the authors.

  Attributes:
    instruct: the checkpoint holds a third predictor, for instructions. It is kept for the way back and never run: the
      authors' scripts switch it off.
  """

  d_model: int = 512
  num_heads: int = 8
  num_layers: int = 2
  mlp_dim: int = 2048
  instruct: bool = False

  def __post_init__(self):
    _require_positive(self, 'predictor: ', 'd_model', 'num_heads', 'num_layers', 'mlp_dim')
    _require(self.d_model % 4 == 0, f'predictor: d_model {self.d_model} is not a multiple of 4')
    _require(
      self.d_model % self.num_heads == 0, f'predictor: d_model {self.d_model} is not a multiple of num_heads {self.num_heads}'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Everything the weights' shapes follow from. `predictor=None` is a plain LLaVA."""

  vision: VisionConfig = VisionConfig()
  projector: str = 'mlp2x_gelu'
  llama: LlamaConfig = LlamaConfig()
  predictor: PredictorConfig | None = None

  def __post_init__(self):
    self.projector_depth  # raises on an unknown type

  @property
  def projector_depth(self) -> int:
    """Number of linear layers: `linear` -> 1, `mlp2x_gelu` -> 2, `mlpNx_gelu` -> N."""
    if self.projector == 'linear':
      return 1
    depth = self.projector.removeprefix('mlp').removesuffix('x_gelu')
    _require(
      self.projector == f'mlp{depth}x_gelu' and depth.isdigit() and int(depth) >= 1,
      f'model.projector {self.projector!r} is unknown; expected linear or mlpNx_gelu, such as mlp2x_gelu',
    )
    return int(depth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """A run of decoder layers that see one static sequence length, and how its tokens are chosen.

  Attributes:
    start: first decoder layer of the stage; it ends where the next stage starts.
    selector: name in `dynllava_jax.selectors` of the method that picks the image tokens entering the
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
    _require(
      0 < self.image_keep_rate <= 1,
      f'stage at layer {self.start}: image_keep_rate is {self.image_keep_rate}, expected a share in (0, 1]',
    )
    _require(
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
  _require(len(stages) > 0 and stages[0].start == 0, 'stages: the first stage must start at layer 0')
  starts = [s.start for s in stages]
  _require(starts == sorted(set(starts)), f'stages: starts must increase, got {starts}')
  _require(
    starts[-1] < layers, f'stages: a stage starts at layer {starts[-1]}, but the decoder has {layers} layers, 0 to {layers - 1}'
  )
  kept = [s.kept_image_tokens(image_tokens) for s in stages]
  _require(min(kept) > 0, f'stages: image_keep_rate leaves none of the {image_tokens} image tokens')
  _require(kept == sorted(kept, reverse=True), f'stages: image tokens cannot come back, got budgets {kept}')
  for stage in stages:
    _require(
      stage.selector != 'all' or stage.image_keep_rate == 1.0,
      f"stage at layer {stage.start}: selector 'all' keeps every token, image_keep_rate must be 1.0",
    )
    _require(
      stage.selector != 'dynamic' or model.predictor is not None,
      f"stage at layer {stage.start}: selector 'dynamic' needs predictors, and this model has none; "
      'train them with configs/digits.py:dynamic or convert a Dynamic-LLaVA checkpoint',
    )


def check_trainable_stages(stages: tuple[Stage, ...]) -> None:
  """Raises ConfigError unless the stage list has a training objective (dense, or one 'dynamic' cut)."""
  _require(
    all(s.selector in ('all', 'dynamic') for s in stages) and sum(s.selector == 'dynamic' for s in stages) <= 1,
    f'stages: only a dense run or one with a single dynamic stage can be trained, got {[s.selector for s in stages]}',
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Device mesh. -1 for one axis takes all devices that the others leave."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where samples come from and how they are batched.

  Attributes:
    source: name in `data.sources`: 'prepared', or one of the embedded ones.
    path: folder written by `python -m dynllava_jax.data.prepare`, for 'prepared'.
    images: where the image files lie, if the prepared folder holds only their paths.
    tokenizer: folder with the tokenizer's files, if `init_from` brings none.
    conversation: template, a name in `data.conversation.TEMPLATES`.
    text_length: largest text bucket, in tokens besides the image's.
    buckets: further, smaller ones; each is one more compiled program.
    group_lengths: put samples of like lengths into one batch.
    truncate: cut what is longer than the largest bucket, as LLaVA does, instead of counting it as bad.
    on_bad_sample: 'error' starts no run on data with samples that cannot be used, 'skip' leaves them out and counts them.
    images_only: leave samples without image out.
    image_aspect: 'pad' (LLaVA-1.5) or 'square', see `data.images.preprocess`.
    rotate_images: turn pictures as their EXIF orientation says; LLaVA does not.
    shuffle: a new permutation every epoch; off where the source's order is a curriculum.
    workers: grain worker processes; 0 reads in threads.
  """

  source: str = 'digits'
  path: str = ''
  images: str = ''
  tokenizer: str = ''
  conversation: str = 'plain_turns'
  text_length: int = 128
  buckets: tuple[int, ...] = ()
  group_lengths: bool = False
  truncate: bool = False
  on_bad_sample: str = 'error'
  images_only: bool = False
  image_aspect: str = 'pad'
  rotate_images: bool = False
  shuffle: bool = True
  workers: int = 0

  def __post_init__(self):
    _require_positive(self, 'data: ', 'text_length')
    _require(self.workers >= 0, f'data: workers is {self.workers}, expected 0 or more')
    lengths = (0, *self.buckets, self.text_length)
    _require(
      list(lengths) == sorted(set(lengths)),
      f'data: buckets {self.buckets} must ascend and stay below text_length {self.text_length}',
    )
    _require(self.on_bad_sample in ('error', 'skip'), f'data: on_bad_sample is {self.on_bad_sample!r}, expected error or skip')
    _require(self.image_aspect in ('pad', 'square'), f'data: image_aspect is {self.image_aspect!r}, expected pad or square')

  @property
  def text_buckets(self) -> tuple[int, ...]:
    """All text buckets, ascending."""
    return (*self.buckets, self.text_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW, cosine with linear warm-up, one peak learning rate per parameter group."""

  learning_rate: float = 5e-6
  predictor_learning_rate: float = 2e-4
  warmup_share: float = 0.03
  weight_decay: float = 0.0
  b2: float = 0.999
  clip_norm: float = 1.0

  def __post_init__(self):
    _require(0 < self.b2 < 1, f'optimizer.b2 is {self.b2}, expected a number in (0, 1)')
    _require_positive(self, 'optimizer: ', 'clip_norm')
    _require(0 <= self.warmup_share < 1, f'optimizer.warmup_share is {self.warmup_share}, expected [0, 1)')
    _require(self.learning_rate > 0 and self.predictor_learning_rate > 0, 'optimizer: learning rates must be positive')
    _require(self.weight_decay >= 0, f'optimizer.weight_decay is {self.weight_decay}, expected 0 or more')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityConfig:
  """The Dynamic-LLaVA objective (paper section 3.3; numbers of the released scripts).

  Attributes:
    image_keep_rate, text_keep_rate: shares of the image and of the generated tokens to keep.
    mask_loss_weight: of the squared distances from these shares.
    min_answer_len: tokens; shorter answers are kept whole.
    tau_start, tau_end: temperature of the first and of the last step.
    dense_share: chance of a row to be trained with all its tokens, so that the same weights also run dense (ours; the
      paper has none).
  """

  image_keep_rate: float = 0.2
  text_keep_rate: float = 0.5
  mask_loss_weight: float = 100.0
  min_answer_len: int = 50
  tau_start: float = 1.0
  tau_end: float = 0.1
  dense_share: float = 0.0

  def __post_init__(self):
    _require(0 <= self.dense_share < 1, f'sparsity.dense_share is {self.dense_share}, expected a share in [0, 1)')
    for name in ('image_keep_rate', 'text_keep_rate'):
      value = getattr(self, name)
      _require(0 < value <= 1, f'sparsity.{name} is {value}, expected a share in (0, 1]')
    _require(self.tau_start > 0 and self.tau_end > 0, 'sparsity: temperatures must be positive')
    for name in ('mask_loss_weight', 'min_answer_len'):
      _require(getattr(self, name) >= 0, f'sparsity.{name} is {getattr(self, name)}, expected 0 or more')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """One training run."""

  model: ModelConfig
  stages: tuple[Stage, ...] = DENSE
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  sparsity: SparsityConfig = SparsityConfig()
  mesh: MeshConfig = MeshConfig()
  init_from: str = ''  # checkpoint directory to start from; '' initialises at random
  frozen: tuple[str, ...] = ()  # top-level parameter groups that are not trained
  batch_size: int = 64
  steps: int = 1000
  seed: int = 0
  dtype: str = 'float32'
  remat: bool = False
  log_every: int = 20
  save_every: int = 500

  def __post_init__(self):
    check_stages(self.stages, self.model)
    check_trainable_stages(self.stages)
    _require(not (self.init_from and self.data.tokenizer), 'data.tokenizer: init_from brings its own; leave one of them empty')
    _require_positive(self, '', 'batch_size', 'steps', 'log_every', 'save_every')
    _require_seed(self.seed)
    for stage in self.stages:
      _require(
        stage.selector != 'dynamic' or stage.image_keep_rate == self.sparsity.image_keep_rate,
        f'sparsity.image_keep_rate is {self.sparsity.image_keep_rate}, but the dynamic stage keeps {stage.image_keep_rate}',
      )
    _require(self.dtype in ('float32', 'bfloat16'), f'dtype {self.dtype!r}: expected float32 or bfloat16')
    groups = ('vision', 'vision_tail', 'projector', 'llama', 'image_predictor', 'text_predictor')
    for group in self.frozen:
      _require(group in groups, f'frozen: {group!r} is no parameter group; expected some of {", ".join(groups)}')
    learning = {'vision', 'projector', 'llama'} | ({'image_predictor', 'text_predictor'} if self.model.predictor else set())
    _require(not learning <= set(self.frozen), f'frozen: {", ".join(self.frozen)} leaves nothing to train')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRun:
  """One row of the results table.

  Attributes:
    stages: the stage list; () is the checkpoint's own.
    checkpoint: '' is the evaluation's own.
    image_size: pixels that images are scaled to, with fewer image tokens and interpolated position embeddings; 0 is
      the tower's own size.
  """

  stages: tuple[Stage, ...] = ()
  checkpoint: str = ''
  image_size: int = 0

  def __post_init__(self):
    _require(self.image_size >= 0, f'image_size is {self.image_size}, expected 0 or a number of pixels')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """One evaluation of several stage lists on the same questions.

  Attributes:
    runs: rows of the table by name; the one called 'dense', else the first, is what the others are compared with.
    benchmark: name in `dynllava_jax.evals.suite`.
    labels: file or folder of the labels where it is not in its usual place.
    text_lengths: text buckets, ascending, in tokens besides the image's.
    questions: only the first so many; 0 is all.
    agreement: also measure how far the runs agree with the reference's own greedy answers, token by token.
  """

  runs: Mapping[str, EvalRun]
  benchmark: str = 'digits'
  labels: str = ''
  text_lengths: tuple[int, ...] = (128,)
  mesh: MeshConfig = MeshConfig()
  questions: int = 600
  batch_size: int = 100
  max_new_tokens: int = 128
  dtype: str = 'float32'
  seed: int = 0
  agreement: bool = False

  def __post_init__(self):
    _require(len(self.runs) > 0, 'runs: at least one run is needed')
    _require_positive(self, '', 'batch_size', 'max_new_tokens')
    _require(self.questions >= 0, f'questions is {self.questions}, expected a number of questions, or 0 for all')
    _require_seed(self.seed)
    _require(self.dtype in ('float32', 'bfloat16'), f'dtype {self.dtype!r}: expected float32 or bfloat16')
    lengths = self.text_lengths
    _require(
      lengths and list(lengths) == sorted(set(lengths)) and lengths[0] > 0,
      f'text_lengths are {lengths}, expected increasing positive numbers',
    )

  @property
  def reference(self) -> str:
    """Name of the run that the others are compared with."""
    return 'dense' if 'dense' in self.runs else next(iter(self.runs))


def from_config_dict(cls: type, config: Any, where: str = 'config') -> Any:
  """Builds dataclass `cls` from a ConfigDict or dict, strictly and recursively.

  Raises:
    ConfigError: unknown key (with the nearest known one), missing key, wrong type or impossible value.
  """
  _require(hasattr(config, 'keys'), f'{where}: expected a group of settings, got {config!r}')
  hints = typing.get_type_hints(cls)
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in config.keys():
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=1)
      hint = f'; did you mean {near[0]!r}?' if near else f'; known keys: {", ".join(fields)}'
      raise ConfigError(f'{where}.{key}: unknown key{hint}')
  values = {k: _typed(hints[k], config[k], f'{where}.{k}') for k in config.keys()}
  missing = [n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING]
  _require(not missing, f'{where}: missing {", ".join(missing)}')
  try:
    return cls(**values)
  except ConfigError as e:
    raise e if str(e).startswith('config') else ConfigError(f'{where}: {e}') from None


def _typed(hint: Any, value: Any, where: str) -> Any:
  """`value` checked against, and where harmless converted to, the annotation `hint`."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    if value is None:
      return None
    return _typed(next(a for a in args if a is not type(None)), value, where)
  if dataclasses.is_dataclass(hint):
    return from_config_dict(hint, value, where)
  if origin is tuple:
    _require(isinstance(value, (list, tuple)), f'{where}: expected a list, got {value!r}')
    return tuple(_typed(args[0], v, f'{where}[{i}]') for i, v in enumerate(value))
  if origin is Mapping:
    _require(hasattr(value, 'keys'), f'{where}: expected a group of settings, got {value!r}')
    return {k: _typed(args[1], value[k], f'{where}.{k}') for k in value.keys()}
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  wrong = not isinstance(value, hint) or (hint is int and isinstance(value, bool))
  _require(not wrong, f'{where}: expected {hint.__name__}, got {value!r} ({type(value).__name__})')
  _require(hint is not float or math.isfinite(value), f'{where}: expected a finite number, got {value}')
  return value


def to_dict(config: Any) -> dict[str, Any]:
  """The plain (JSON-ready) form of a dataclass built by `from_config_dict`."""
  return dataclasses.asdict(config)


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
  """(dotted key, value before, value now) of the first setting that differs between two plain configs."""
  for key in now:
    old, new = before.get(key), now[key]
    if isinstance(old, Mapping) and isinstance(new, Mapping):
      if found := first_difference(old, new):
        return f'{key}.{found[0]}', *found[1:]
    elif old != new:
      return key, old, new
  return None
