"""What the weights' shapes follow from: vision tower, projector, decoder, predictors."""

import dataclasses
import itertools

from dynllava_jax.config.added import ExitHeadConfig, MemoryConfig, PruningConfig
from dynllava_jax.config.parsing import require, require_positive

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_ID = -200  # stands for the image in token ids, as in LLaVA
IGNORE = -100  # label of positions that are not supervised
# Files that describe a model and how it is used, beside the weights of a Hugging Face model.
MODEL_FILES = (
  'config.json',
  'generation_config.json',
  'preprocessor_config.json',
  'processor_config.json',
  'chat_template.json',
  'chat_template.jinja',
)
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
# The same of a CLIP text tower, whose words are not the decoder's.
CLIP_TOKENIZER_FILES = tuple(n for n in TOKENIZER_FILES if n != 'tokenizer.model')


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
    require_positive(self, 'vision: ', 'image_size', 'patch_size', 'hidden_size', 'mlp_dim', 'num_layers', 'num_heads')
    require(
      self.image_size % self.patch_size == 0,
      f'vision: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}',
    )
    require(
      self.hidden_size % self.num_heads == 0,
      f'vision: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}',
    )
    require(len(self.image_mean) == len(self.image_std) == 3, 'vision: image_mean and image_std need 3 numbers each')
    require(
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

  @property
  def selected_block(self) -> int:
    """The block, counted from 0, whose output is the features: the last that is run; -1 if none is."""
    return self.layers_run - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
  """CLIP's text tower and the projections of both towers into one space; defaults are those of CLIP ViT-L/14-336.

  Attributes:
    num_positions: tokens that it sees at once; longer texts are cut into segments.
    embed_dim: numbers of a projected text or patch.
    end_id: a segment is summed up where this token first stands, at its first token if nowhere; None for where its largest id is.
  """

  vocab_size: int = 49408
  hidden_size: int = 768
  mlp_dim: int = 3072
  num_layers: int = 12
  num_heads: int = 12
  num_positions: int = 77
  embed_dim: int = 768
  end_id: int | None = None
  layer_norm_eps: float = 1e-5

  def __post_init__(self):
    sizes = ('vocab_size', 'hidden_size', 'mlp_dim', 'num_layers', 'num_heads', 'num_positions', 'embed_dim')
    require_positive(self, 'clip_text: ', *sizes)
    require(
      self.hidden_size % self.num_heads == 0,
      f'clip_text: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}',
    )


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
    require(self.kind in ('linear', 'llama3'), f'rope_scaling: kind {self.kind!r} is unknown; expected linear or llama3')
    require_positive(self, 'rope_scaling: ', 'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_positions')
    require(self.high_freq_factor > self.low_freq_factor, 'rope_scaling: high_freq_factor must be above low_freq_factor')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
  """Layers whose MLP is a choice among several (MoE-LLaVA, arXiv 2401.15947), each as wide as the MLP that it replaces.

  Attributes:
    layers: decoder layers that have experts, ascending.
    count: experts of such a layer; top_k: how many of them each token passes, 1 or 2.
  """

  layers: tuple[int, ...]
  count: int = 4
  top_k: int = 2

  def __post_init__(self):
    require_positive(self, 'experts: ', 'count', 'top_k')
    require(self.top_k in (1, 2), f'experts: top_k is {self.top_k}, expected 1 or 2')
    require(self.count > self.top_k, f'experts: count is {self.count}, expected more than top_k, {self.top_k}')
    require(
      len(self.layers) > 0 and list(self.layers) == sorted(set(self.layers)) and self.layers[0] >= 0,
      f'experts: layers are {list(self.layers)}, expected some decoder layers, ascending, each once',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """LLaMA decoder; defaults are Vicuna-7B v1.5. `experts`: which layers have them, None for none."""

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
  experts: ExpertsConfig | None = None

  def __post_init__(self):
    sizes = ('vocab_size', 'hidden_size', 'mlp_dim', 'num_layers', 'num_heads', 'num_kv_heads')
    require_positive(self, 'llama: ', *sizes, 'rope_theta', 'rms_norm_eps')
    require(
      self.hidden_size % self.num_heads == 0,
      f'llama: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}',
    )
    require(
      self.num_heads % self.num_kv_heads == 0,
      f'llama: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}',
    )
    require(self.head_dim % 2 == 0, f'llama: head_dim {self.head_dim} is odd, rotary embedding needs pairs')
    require(
      self.experts is None or self.experts.layers[-1] < self.num_layers,
      f'llama: experts in layer {self.experts and self.experts.layers[-1]}, but there are {self.num_layers} layers',
    )

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  def has_experts(self, layer: int) -> bool:
    """Whether the MLP of a decoder layer is a choice among experts."""
    return self.experts is not None and layer in self.experts.layers

  @property
  def runs(self) -> tuple[range, ...]:
    """Layers next to each other that have the same parameters, as many together as there are."""
    bounds = [0, *(i for i in range(1, self.num_layers) if self.has_experts(i) != self.has_experts(i - 1)), self.num_layers]
    return tuple(range(a, b) for a, b in itertools.pairwise(bounds))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictorConfig:
  """The keep/drop predictors of Dynamic-LLaVA; defaults as released by the authors.

  Attributes:
    instruct: there is a third predictor, for instructions. It is run where a 'dynamic' stage has the option `instruct`.
  """

  d_model: int = 512
  num_heads: int = 8
  num_layers: int = 2
  mlp_dim: int = 2048
  instruct: bool = False

  def __post_init__(self):
    require_positive(self, 'predictor: ', 'd_model', 'num_heads', 'num_layers', 'mlp_dim')
    require(self.d_model % 4 == 0, f'predictor: d_model {self.d_model} is not a multiple of 4')
    require(
      self.d_model % self.num_heads == 0, f'predictor: d_model {self.d_model} is not a multiple of num_heads {self.num_heads}'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelevanceConfig:
  """Weights that score image tokens anew for each generated token, at the entry of the stage with `Stage.revisit`.

  Attributes:
    score: name of the score function, `dot`, `mlp` or `transformer`.
    width: of queries and keys, in `num_heads` parts that are rotated by position.
  """

  score: str = 'dot'
  width: int = 64
  num_heads: int = 2

  def __post_init__(self):
    require_positive(self, 'relevance: ', 'width', 'num_heads')
    require(
      self.width % (2 * self.num_heads) == 0,
      f'relevance: width {self.width} is not a multiple of {2 * self.num_heads}, twice num_heads: rotary embedding needs pairs',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutersConfig:
  """A router per decoder layer, which lets only some image tokens pass, in stages with `Stage.layers` of that method.

  Attributes:
    method: name of the method that they were trained with.
    bias: whether their score has one.
    layers: decoder layers that have one, of a converted checkpoint; () for all.
  """

  method: str
  bias: bool = False
  layers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidConfig:
  """Routers of a Dynamic Pyramid Network, which choose how the grid of image tokens is pooled in front of some layers.

  Attributes:
    layers: decoder layers in front of which it may be pooled; the authors' are 8, 16 and 24 of 32.
    kernels: for each of them, the sides of the squares that a router chooses from.
    router_id: token whose hidden state the routers look at, the first behind the image; the authors add one to the vocabulary that
      ends the user's turn. One that ends it anyway will do.
    temperature: what their numbers are divided by.
  """

  layers: tuple[int, ...] = (8, 16, 24)
  kernels: tuple[tuple[int, ...], ...] = ((1, 2, 4), (1, 2, 4), (1, 2))
  router_id: int = 32000
  temperature: float = 10.0

  def __post_init__(self):
    require(
      len(self.layers) == len(self.kernels) > 0,
      f'dpn: {len(self.layers)} layers and {len(self.kernels)} lists of kernels, expected as many of both, at least one',
    )
    require(
      list(self.layers) == sorted(set(self.layers)) and self.layers[0] > 0, f'dpn: layers {self.layers} do not rise from 1 on'
    )
    require(all(k and min(k) >= 1 for k in self.kernels), f'dpn: kernels {self.kernels}, expected numbers from 1 on for each layer')
    require(self.temperature > 0, f'dpn: temperature is {self.temperature}, expected a positive number')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPackerConfig:
  """The TokenPacker projector (arXiv 2407.02392); defaults are those for CLIP ViT-L/14-336.

  Attributes:
    scale_factor: patches per image token on each axis: 2, 3 and 4 make 144, 64 and 36 of 24 x 24.
    levels: states of the tower that keys and values are made of, joined in this order; state l is the output of block l, from 1.
    num_heads: of its attention; the authors' have 128 numbers each.
  """

  scale_factor: int = 2
  levels: tuple[int, ...] = (12, 16, 22, 23)
  num_heads: int = 8

  def __post_init__(self):
    require_positive(self, 'packer: ', 'scale_factor', 'num_heads')
    require(
      len(self.levels) > 0 and len(set(self.levels)) == len(self.levels),
      f'packer: levels are {list(self.levels)}, expected some states of the tower, each once',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Everything the weights' shapes follow from. `predictor=None` is a plain LLaVA.

  Attributes:
    projector: kind of projector: `linear`, `mlpNx_gelu`, or `tokenpacker`, which `packer` describes.
    clip_text: the text tower that belongs to the vision tower; only reducers that match patches and question look at it.
    relevance: weights that score image tokens for each generated token; None if the model has none.
    dpn: weights that choose how image tokens are pooled between stages; None if the model has none.
    routers: weights that let only some image tokens pass a layer; None if the model has none.
    memory: tokens that stand for an image, in runs with the reducer icae; None if the model has none.
    exit_head: what runs that leave early read their answers with; None if the model has none.
    pruning: weights by which decoder layers vote on their context; None if the model has none.
  """

  vision: VisionConfig = VisionConfig()
  projector: str = 'mlp2x_gelu'
  packer: TokenPackerConfig | None = None
  llama: LlamaConfig = LlamaConfig()
  predictor: PredictorConfig | None = None
  clip_text: ClipTextConfig | None = None
  relevance: RelevanceConfig | None = None
  routers: RoutersConfig | None = None
  dpn: PyramidConfig | None = None
  memory: MemoryConfig | None = None
  exit_head: ExitHeadConfig | None = None
  pruning: PruningConfig | None = None

  def __post_init__(self):
    self.projector_depth  # raises on an unknown type
    require(
      (self.projector == 'tokenpacker') == (self.packer is not None),
      f'model.packer describes the projector tokenpacker, and model.projector is {self.projector!r}'
      if self.packer
      else "model.projector 'tokenpacker' needs model.packer, such as dict(scale_factor=2)",
    )
    if self.packer is not None:
      self._check_packer(self.vision, self.packer)

  @staticmethod
  def _check_packer(vision: VisionConfig, packer: TokenPackerConfig) -> None:
    side = vision.image_size // vision.patch_size
    require(
      side % packer.scale_factor == 0,
      f'packer: scale_factor {packer.scale_factor} does not divide the {side} x {side} patches of an image',
    )
    outside = [level for level in packer.levels if not 1 <= level <= vision.layers_run]
    require(
      not outside,
      f'packer: levels {outside} are none of the states 1 to {vision.layers_run} that the tower is run to '
      f'({vision.num_layers} layers, select_layer {vision.select_layer})',
    )
    require(
      vision.hidden_size % packer.num_heads == 0,
      f'packer: num_heads {packer.num_heads} does not divide hidden_size {vision.hidden_size} of the tower',
    )

  @property
  def projector_depth(self) -> int:
    """Number of linear layers from patch to image token: `linear` -> 1, `mlp2x_gelu` -> 2, `mlpNx_gelu` -> N."""
    if self.projector == 'linear':
      return 1
    if self.projector == 'tokenpacker':
      return 2  # those behind its attention
    depth = self.projector.removeprefix('mlp').removesuffix('x_gelu')
    require(
      self.projector == f'mlp{depth}x_gelu' and depth.isdigit() and int(depth) >= 1,
      f'model.projector {self.projector!r} is unknown; expected linear or mlpNx_gelu, such as mlp2x_gelu, or tokenpacker',
    )
    return int(depth)

  @property
  def projector_weights(self) -> int:
    """Numbers in the projector's matrices."""
    width, size = self.vision.hidden_size, self.llama.hidden_size
    packing = 2 * (len(self.packer.levels) + 1) + 5 if self.packer else 0
    return packing * width**2 + width * size + (self.projector_depth - 1) * size**2

  @property
  def num_image_tokens(self) -> int:
    """What the projector makes of an image's patches; `methods.num_image_tokens` is that of a run."""
    return self.vision.num_patches // (self.packer.scale_factor**2 if self.packer else 1)
