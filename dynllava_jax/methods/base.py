"""What a method consists of: the pieces, one type per site, that a run names in its reducer and its stages.

A piece is a small frozen dataclass of functions and of static declarations: what it needs (nothing else is computed), its
options (a frozen dataclass, which says what is allowed), and where it comes from. To add a method, write one file with its
pieces and name them in `methods/__init__.py`. The decoder, the cache and the generation loop stay as they are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax.config import LlamaConfig, ModelConfig, Piece, VisionConfig, from_config_dict
from dynllava_jax.config.parsing import require
from dynllava_jax.methods.routing import Routing
from dynllava_jax.methods.voting import Voting
from dynllava_jax.ops import layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
  """Of a piece without settings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
  """What every piece says about itself; `python -m dynllava_jax.methods` prints it.

  Attributes:
    options: frozen dataclass of the piece's settings; raises ConfigError itself for values that are impossible on any model.
    source: where the method is published, and the commit of the code that it was compared with.
    verified: what it was compared with, quantity by quantity; '' if with nothing.
  """

  options: type = NoOptions
  source: str = ''
  verified: str = ''

  def read_options(self, piece: Piece, site: str) -> Any:
    """`piece.options` as the dataclass `options`; ConfigError with the nearest known name for one that does not exist."""
    return from_config_dict(self.options, dict(piece.options), f'{site} {piece.name}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerNeeds:
  """What a reducer wants to see of the vision tower besides the features; blocks are counted from 0.

  Attributes:
    class_feature: the class token's row beside the patch features.
    class_attention: blocks whose attention row of the class token is wanted.
    key_mean: blocks whose keys are wanted, averaged over heads.
    states: blocks whose output is wanted.
    next_block: whether queries and keys of the block above the features are wanted, which is not run. Its parameters are in
      checkpoints that were converted from a whole tower.
    question: whether the question is wanted, and the patches in the space that CLIP's two towers share. It needs the text tower.
    merges: how many tokens `merge` takes away in each block, between attention and MLP; () for a plain tower.
    merge: (x float[B, T, C], head mean of the keys float32[B, T, H], `MergedTokens`, count) -> the same of T - count tokens.
  """

  class_feature: bool = False
  class_attention: tuple[int, ...] = ()
  key_mean: tuple[int, ...] = ()
  states: tuple[int, ...] = ()
  next_block: bool = False
  question: bool = False
  merges: tuple[int, ...] = ()
  merge: Callable[..., tuple[jax.Array, 'MergedTokens']] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MergedTokens:
  """What the rows of a tower that merges tokens are.

  Attributes:
    size: float32[B, T], tokens that a row holds.
    group: int32[B, P + 1], the row that holds each original token, class token first.
    patch: int32[B, T], the patch that others went into, -1 for the class token.
    best: float32[B, A], how like its partner each token was that might go, before this block merged; None before the first.
  """

  size: jax.Array
  group: jax.Array
  patch: jax.Array
  best: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TowerOutput:
  """What the vision tower gives: always the features, the rest where `TowerNeeds` asks for it.

  Attributes:
    features: float[B, P, C], patches of the selected layer.
    class_feature: float[B, C], the class token of that layer.
    class_attention: by block, float32[B, N, P]: softmax over all P + 1 tokens, the class token's own column cut off.
    key_mean: by block, float32[B, P + 1, H], head mean of the keys (with bias, unscaled), class token first.
    states: by block, float[B, P, C], what the block makes of the patches.
    next_query: float32[B, C], the class token's query in the block above, all heads side by side (with bias, unscaled), and
      next_keys: float32[B, P + 1, C], the keys there.
    text_embeds: float32[B, N, E], segments of the question, and has_text: bool[B, N], whether each is there; patch_embeds:
      float32[B, P, E], patches behind the tower's last norm. All as projected, not of length 1.
    merged: per block the hidden states float[B, T, C] behind it and what they are, where tokens are merged; `features` then has
      M tokens.
  """

  features: jax.Array
  class_feature: jax.Array | None = None
  class_attention: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
  key_mean: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
  states: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
  next_query: jax.Array | None = None
  next_keys: jax.Array | None = None
  text_embeds: jax.Array | None = None
  has_text: jax.Array | None = None
  patch_embeds: jax.Array | None = None
  merged: tuple[tuple[jax.Array, MergedTokens], ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reduced:
  """Image tokens of the language model: `tokens` float[B, M, D], and for each the patch that it stands for.

  `index` is int32[B, M]; -1 is the class token, or a summary of many. Of a merged token it is the patch that absorbed others.
  `group` int32[B, P] is, for each patch, the token that holds it; None unless the reducer unmerges.
  """

  tokens: jax.Array
  index: jax.Array
  group: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reducer(Origin):
  """Makes the image tokens that the language model sees, between tower and language model.

  Attributes:
    reduce: (tower output, projector float[B, n, C] -> float[B, n, D], options) -> `Reduced`. A row depends on that row alone;
      choices are made in float32, ties go to the lowest index; no division may give NaN, rows without image included.
    num_tokens: (model, options) -> M; ConfigError with the reason, without the reducer's name, if the model cannot be reduced so.
    needs: (vision, options) -> `TowerNeeds`.
    projects_all: whether the projector runs on all patches, or only on what is left of them.
    unmerges: options -> whether the decoder attends over all patches although it has fewer rows: queries, keys and values of a
      token stand at the places of all its patches, and what these attend to is averaged. The cache then holds all patches.
    compresses: whether the decoder, with an adapter of the model's, makes `num_tokens` of what it gives (`models.memory`).
    flops: (model, options) -> FLOPs of the matrix products by which it chooses and merges the patches of one image.
  """

  reduce: Callable[[TowerOutput, Callable[[jax.Array], jax.Array], Any], Reduced]
  num_tokens: Callable[[ModelConfig, Any], int]
  needs: Callable[[VisionConfig, Any], TowerNeeds] = lambda vision, options: TowerNeeds()
  projects_all: bool = False
  unmerges: Callable[[Any], bool] = lambda options: False
  compresses: bool = False
  flops: Callable[[ModelConfig, Any], float] = lambda model, options: 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptPatches:
  """Settings of a reducer that leaves some patches as they are. `tokens`: so many image tokens are kept."""

  tokens: int

  def __post_init__(self):
    require(self.tokens > 0, f'tokens is {self.tokens}, expected a positive number')


def patches_kept(model: ModelConfig, options: KeptPatches) -> int:
  """`tokens`; ConfigError if the tower has fewer patches."""
  patches = model.vision.num_patches
  require(options.tokens <= patches, f'tokens is {options.tokens}, the tower has {patches} patches')
  return options.tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Where things stand in the sequence that the layers of a stage see. Image rows stand next to each other.

  Attributes:
    length: int32[B], real rows; padding is behind them.
    image_start: int32[B], place of the first image row, -1 without image.
    image_index: int32[B, P], which token of the run's image each image row is; ascending, merged ones behind.
  """

  length: jax.Array
  image_start: jax.Array
  image_index: jax.Array

  @property
  def num_image(self) -> int:
    return self.image_index.shape[1]

  def is_image(self, size: int) -> jax.Array:
    """bool[B, size]."""
    return layout.image_slots(jnp.arange(size)[None], self.image_start, self.num_image)[1]

  def is_real(self, size: int) -> jax.Array:
    """bool[B, size], False for padding."""
    return jnp.arange(size) < self.length[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectorInputs:
  """What a selector may look at.

  Attributes:
    image_hidden: float[B, P, D], hidden states of the image tokens that reach the stage (arbitrary in rows
      without image; the result is ignored there).
    seed: uint32[B], one number per row, so that a random choice does not depend on the row's neighbours.
    image_predictor: float[B, P, D] -> float[B, P, 2], or None if the model has none.
    text_predictor: float[..., D] -> float[..., 2], or None if the model has none.
    attention: float32[B, N, P], softmax weight that the asked query rows give to each of these image tokens, per query head
      (over all that a row sees, so they do not add up to 1); None unless the selector asked for it.
    routes: () -> (kernels, float32[B, E] how likely each is), of the pooling router in front of the stage; None without.
  """

  image_hidden: jax.Array
  seed: jax.Array
  image_predictor: Callable[[jax.Array], jax.Array] | None = None
  text_predictor: Callable[[jax.Array], jax.Array] | None = None
  attention: jax.Array | None = None
  routes: Callable[[], tuple[tuple[int, ...], jax.Array]] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
  """What a selector makes of the image tokens that reach it.

  Attributes:
    index: int32[B, M], those that stay, ascending.
    vectors: float[B, M, D] that take their place; None leaves them as they are.
    more: float[B, C, D], new rows behind the kept ones; None for none.
    more_index: int32[B, C], for each of them a token that it stands for: one that does not stay, each a different one.
    details: what else a record wants to see, by name; computed only where it is read.
  """

  index: jax.Array
  vectors: jax.Array | None = None
  more: jax.Array | None = None
  more_index: jax.Array | None = None
  details: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selector(Origin):
  """Picks the tokens that enter a stage.

  Attributes:
    select: (inputs, budget M, options) -> `Chosen`. Scores are compared in float32, ties go to the lowest index.
    text_margin: float[..., D] hidden states of generated tokens, text predictor -> float32[...] keep margin
      (kept when > 0); None if the method keeps every generated token.
    attention: the layer whose attention `SelectorInputs.attention` shows: 'previous' is the last one of the stage before,
      'entering' the first one of the selector's own stage, run on what reaches it; '' for none.
    query_weight: (embeddings float[B, S, D] of the whole prompt, its `Rows`, options) -> float32[B, S], how much the attention of
      each text row counts; None for that of the last prompt token alone.
    renumbers: options -> whether rotary positions are 0, 1, 2, ... again for what stays.
    num_more: (tokens that reach the stage, budget M, options) -> C, rows of `Chosen.more`.
    training: how a run with it is trained: 'masks' weigh keys in sequences of full length (`DynLlava.train_forward`), 'gathers' cut
      the sequence as a prefill does; '' for not at all.
    training_weight: (labels int32[B, S], options) -> float32[B, S], what `query_weight` is while training; None for the same.
    flops: (LLaMA config, rows of the stream, image tokens that reach the stage, budget M, options) -> FLOPs of the matrix products
      by which it chooses and merges, besides those that give it its attention row.
  """

  select: Callable[[SelectorInputs, int, Any], Chosen]
  text_margin: Callable[[jax.Array, Callable], jax.Array] | None = None
  attention: str = ''
  query_weight: Callable[[jax.Array, Rows, Any], jax.Array] | None = None
  renumbers: Callable[[Any], bool] = lambda options: False
  num_more: Callable[[int, int, Any], int] = lambda reached, budget, options: 0
  training: str = ''
  training_weight: Callable[[jax.Array, Any], jax.Array] | None = None
  flops: Callable[[LlamaConfig, int, int, int, Any], float] = lambda llama, rows, reached, budget, options: 0.0


def row_flops(llama: LlamaConfig, rows: float, keys: float) -> float:
  """FLOPs of the attention weights of `rows` queries over as many `keys` each, and of their sum over the queries."""
  return 2 * llama.num_heads * (llama.head_dim + 1) * rows * keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind(Origin):
  """How the blocks of a stage differ from plain ones, in prefill and uncached decoding; cached decoding runs plain blocks.

  A choice per layer is a vector of flags that is scanned along with the weights: `jax.lax.cond` on a flag, one compilation for all.

  Attributes:
    flags: (decoder layers, options) -> by name, one bool per decoder layer. A layer with any of them set must lie in the stage.
    attend: (q float[B, S, N, H], k and v float[B, S, K, H], `Rows`, this layer's flags, options) -> float[B, S, N, H]; q and k are
      rotated. None for causal attention.
    saves: (LLaMA config, decoder layer, its image tokens, options) -> (keys that image rows do not look at, passes of a row
      through the MLP that are not made), both summed over the layer's rows.
    mlp: (normalised x float[B, S, D], (gate [D, F], up [D, F], down [F, D]), `Rows`, flags, options) -> (float[B, S, D],
      details by name). None for the plain one.
    routing: which image tokens pass which layers, where a router lets only some; None lets all pass.
    training: as `Selector.training`; '' where training knows nothing of it.
    voting: how its rows vote on what stands before them, in cached decoding too; None where they do not.
  """

  flags: Callable[[int, Any], dict[str, tuple[bool, ...]]] = lambda layers, options: {}
  attend: Callable[..., jax.Array] | None = None
  mlp: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None = None
  routing: Routing | None = None
  training: str = ''
  saves: Callable[[LlamaConfig, int, int, Any], tuple[float, float]] = lambda llama, layer, image, options: (0.0, 0.0)
  voting: Voting | None = None


@dataclasses.dataclass(frozen=True)
class Rotation:
  """By what a layer rotates.

  Attributes:
    positions: int32[B, S] of the rows; next: int32[B] of the token to come.
    angles: int32[B, T] positions -> (cos, sin) float32[B, T, H/2].
  """

  positions: jax.Array
  next: jax.Array
  angles: Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Depth:
  """Where a layer stands.

  Attributes:
    layer: int32[], counted from the decoder's first.
    stage: the layers of its stage; layers: how many the decoder has.
  """

  layer: jax.Array
  stage: range
  layers: int


@dataclasses.dataclass(frozen=True)
class Observed:
  """What a layer shows a compressor. Nothing is computed for it: what is derived from these costs only those who derive it.

  Attributes:
    q: float[B, S, N, H], rotated queries; unrotated: the same before rotation.
    k, v: float[B, S, K, H], rotated keys, and values.
    rows: what of it is text, image and padding.
    rotation: by what queries and keys were rotated.
    depth: which layer it is.
  """

  q: jax.Array
  unrotated: jax.Array
  k: jax.Array
  v: jax.Array
  rows: Rows
  rotation: Rotation | None = None
  depth: Depth | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressed:
  """What a layer's prompt leaves in the cache.

  Attributes:
    k, v: float[B, C, K, H], slots in the order of their positions; each head may hold other tokens.
    length: int32[B], behind the last slot in use, the same in all layers of a stage.
    first: int32[B], the first slot in use, where layers keep different numbers of entries; None for 0.
    shift: int32[B], how much earlier than its place in the conversation the next token is rotated; None for not at all.
    details: what else a record wants to see, by name; computed only where it is read.
  """

  k: jax.Array
  v: jax.Array
  length: jax.Array
  first: jax.Array | None = None
  shift: jax.Array | None = None
  details: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressor(Origin):
  """Shrinks a prompt's keys and values, layer by layer inside the scan, before they are cached. Needs a cache to have a meaning.

  Attributes:
    compress: (`Observed`, options) -> `Compressed`; a row depends on that row alone, and not on its padding.
    slots: (text slots, image tokens that reach the stage, layer, decoder layers, options) -> most slots that the layer fills; C is
      the most of a stage.
    flops: (LLaMA config, text rows, image rows, options) -> FLOPs of the matrix products by which one layer scores and merges.
  """

  compress: Callable[[Observed, Any], Compressed]
  slots: Callable[[int, int, int, int, Any], int]
  flops: Callable[[LlamaConfig, int, int, Any], float] = lambda llama, text, image, options: 0.0
