"""PruMerge and PruMerge+ (arXiv 2403.15388): centre patches, by attention of the block above the features, absorb others.

The block above the features, which LLaVA never runs, is looked at through its queries and keys, all heads as one. PruMerge takes
the patches that the class token attends to most; PruMerge+ adds some in equal steps over the picture. To each centre the patches
with the likest keys are added, weighted by attention; one more token sums up all that are no centres. The authors also let the
number of centres follow from each picture, which has no static form: `outliers` counts them, to choose a fixed number by.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.config import ModelConfig, VisionConfig
from dynllava_jax.config.parsing import require
from dynllava_jax.methods.base import Reduced, Reducer, TowerNeeds, TowerOutput
from dynllava_jax.ops.layout import gather_rows
from dynllava_jax.ops.similarity import cosines

SUMMARY = -1  # in `Reduced.index`: stands for no patch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """`centres`: patches by attention, the authors' are an eighth of all; `neighbours`: patches that each absorbs."""

  centres: int
  neighbours: int = 32

  def __post_init__(self):
    require(self.centres > 0, f'centres is {self.centres}, expected a positive number')
    require(self.neighbours > 0, f'neighbours is {self.neighbours}, expected a positive number')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlusOptions(Options):
  """Besides, `strided` centres: patches `first`, `first + stride`, ... in front of the last patch.

  Where attention has taken one of them, the next is taken; the authors' code with a fixed ratio r, which has as many strided ones
  as others, `int(1 / r)` as stride and half of it as first, takes the patch twice.
  """

  strided: int
  stride: int
  first: int = 0

  def __post_init__(self):
    super().__post_init__()
    require(self.strided > 0, f'strided is {self.strided}, expected a positive number')
    require(self.stride > 0, f'stride is {self.stride}, expected a positive number of patches')
    require(0 <= self.first < self.stride, f'first is {self.first}, expected a patch of the first {self.stride}, the stride')


def num_tokens(model: ModelConfig, options: Options) -> int:
  """Centres and the summary; ConfigError if there are fewer patches, or not one block above the features."""
  vision, wanted = model.vision, options.centres + getattr(options, 'strided', 0)
  above = vision.num_layers - vision.layers_run
  require(above == 1, f'looks at the block above the features, expected select_layer -2, got {vision.select_layer}')
  require(wanted <= vision.num_patches, f'{wanted} centres, the tower has {vision.num_patches} patches')
  require(
    options.neighbours < vision.num_patches,
    f'neighbours is {options.neighbours}, a patch of the tower has {vision.num_patches - 1} others',
  )
  return wanted + 1


def needs(vision: VisionConfig, options: Options) -> TowerNeeds:
  """Query and keys of the block above."""
  del vision, options
  return TowerNeeds(next_block=True)


def class_attention(tower: TowerOutput) -> jax.Array:
  """float32[B, P]: softmax over all P + 1 tokens of one wide head, the class token's own column cut off; no gradient."""
  query, keys = jax.lax.stop_gradient((tower.next_query, tower.next_keys))
  scores = jnp.einsum('bc,btc->bt', query, keys, precision='highest')
  return jax.nn.softmax(scores * query.shape[-1] ** -0.5, -1)[:, 1:]


def outliers(attention: jax.Array) -> jax.Array:
  """int32[B]: how many patches' float32[B, P] lie above the third quartile by more than 1.5 times the quartiles' distance."""
  low, high = jnp.percentile(attention, jnp.asarray([25.0, 75.0]), axis=-1)
  return (attention > (high + 1.5 * (high - low))[:, None]).sum(-1, dtype=jnp.int32)


def centres(attention: jax.Array, options: Options) -> jax.Array:
  """int32[B, M - 1] patches: in falling order of attention float32[B, P], then the strided ones, ascending."""
  patches = attention.shape[1]
  by_attention = jax.lax.top_k(attention, options.centres)[1].astype(jnp.int32)
  if not isinstance(options, PlusOptions):
    return by_attention
  places = jnp.arange(patches)
  used = jnp.zeros(attention.shape, bool).at[jnp.arange(attention.shape[0])[:, None], by_attention].set(True)
  on_grid = (places >= options.first) & (places % options.stride == options.first) & (places < patches - 1)
  # Free ones of the grid first, then free ones behind a used one, the nearest behind theirs first.
  behind = places - jax.lax.cummax(jnp.where(on_grid & used, places, -patches), axis=1)
  rank = jnp.where(used, 4 * patches, jnp.where(on_grid, 0, behind))
  strided = jnp.argsort(rank, axis=1, stable=True)[:, : options.strided].astype(jnp.int32)
  return jnp.concatenate([by_attention, jnp.sort(strided, axis=1)], 1)


def neighbours(keys: jax.Array, centre: jax.Array, count: int) -> jax.Array:
  """int32[B, M - 1, count], ascending: for each centre the other patches with the likest keys float[B, P, C]."""
  alike = cosines(gather_rows(keys, centre), keys)
  itself = centre[..., None] == jnp.arange(keys.shape[1])
  return jnp.sort(jax.lax.top_k(jnp.where(itself, -jnp.inf, alike), count)[1], axis=-1).astype(jnp.int32)


def condense(tower: TowerOutput, attention: jax.Array, centre: jax.Array, near: jax.Array) -> jax.Array:
  """Features float[B, M, C]: each centre + the attention-weighted sum over its neighbours, and at last that over all no centres."""
  rows, patches = jnp.arange(centre.shape[0])[:, None], attention.shape[1]
  absorbed = (
    jnp.zeros((*centre.shape, patches), bool).at[rows[..., None], jnp.arange(centre.shape[1])[None, :, None], near].set(True)
  )
  rest = jnp.ones(attention.shape, bool).at[rows, centre].set(False)
  weights = jnp.where(jnp.concatenate([absorbed, rest[:, None]], 1), attention[:, None], 0)
  features = tower.features.astype(jnp.float32)
  sums = jnp.einsum('bmp,bpc->bmc', weights, features, precision='highest')
  return sums.at[:, :-1].add(gather_rows(features, centre)).astype(tower.features.dtype)


def flops(model: ModelConfig, options: Options) -> float:
  """The class token's row, the likeness of centres' keys to all, and the sums over neighbours and over what is no centre."""
  patches, tokens = model.vision.num_patches, num_tokens(model, options)
  return 4 * tokens * patches * model.vision.hidden_size


def reduce(tower: TowerOutput, project, options: Options) -> Reduced:
  """Centres in the order of choice, which is not that of places, and the summary, which stands for no patch."""
  attention = class_attention(tower)
  centre = centres(attention, options)
  features = condense(tower, attention, centre, neighbours(tower.next_keys[:, 1:], centre, options.neighbours))
  return Reduced(project(features), jnp.pad(centre, [(0, 0), (0, 1)], constant_values=SUMMARY))


REDUCER = Reducer(
  reduce=reduce,
  num_tokens=num_tokens,
  needs=needs,
  flops=flops,
  options=Options,
  source='arXiv 2403.15388; github.com/42Shawn/LLaVA-PruMerge 097c041, fixed ratio',
  verified="the authors' code: attention row, keys, centres, neighbours, features, image tokens, logits, generated tokens",
)
PLUS = dataclasses.replace(
  REDUCER, options=PlusOptions, verified=REDUCER.verified + '; not where they count a patch twice, here the next is taken'
)
