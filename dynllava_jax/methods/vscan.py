"""VScan (arXiv 2505.22654): keeps patches by the class token's attention, half of them spread over windows, and merges in the rest.

This is its first stage. The second is a cut in the decoder, `Stage(start=16, selector='pyramiddrop', image_tokens=32)`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.config import ModelConfig, VisionConfig
from dynllava_jax.config.parsing import require
from dynllava_jax.methods.base import KeptPatches, Reduced, Reducer, TowerNeeds, TowerOutput, patches_kept
from dynllava_jax.ops.layout import gather_rows
from dynllava_jax.ops.selection import top_indices
from dynllava_jax.ops.similarity import cosines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(KeptPatches):
  """How many patches are kept, and where one looks.

  Attributes:
    tokens: half of them by windows, as many from each as go into that half, the other half from everywhere; the authors'
      `visual_token_num`. Fewer are kept where the windows do not divide the half.
    window: patches along the side of a window.
    shallow: block, counted from 0, whose attention chooses within windows; that of the features' block chooses from everywhere.
  """

  window: int = 6
  shallow: int = 5

  def __post_init__(self):
    super().__post_init__()
    require(self.window > 0, f'window is {self.window}, expected a positive number of patches')


def per_window(patches: int, options: Options) -> int:
  """Patches kept in each window."""
  return options.tokens // 2 * options.window**2 // patches


def num_tokens(model: ModelConfig, options: Options) -> int:
  """What windows and the global choice give; ConfigError if the grid has no whole number of windows, or fewer patches."""
  patches_kept(model, options)
  patches, side = model.vision.num_patches, model.vision.image_size // model.vision.patch_size
  require(
    side % options.window == 0,
    f'window is {options.window}, of which the {side} x {side} patches of the tower hold no whole number',
  )
  if options.tokens == patches:
    return patches
  return patches // options.window**2 * per_window(patches, options) + options.tokens - options.tokens // 2


def needs(vision: VisionConfig, options: Options) -> TowerNeeds:
  """The attention rows of the shallow block and of the one whose output is the features."""
  return TowerNeeds(class_attention=tuple({options.shallow: None, vision.selected_block: None}))


def choose(tower: TowerOutput, options: Options) -> tuple[jax.Array, jax.Array]:
  """Patches chosen in windows int32[B, l], and from everywhere int32[B, g], both ascending."""
  shallow, deep = (tower.class_attention[block].mean(1) for block in (options.shallow, max(tower.class_attention)))
  batch, patches = deep.shape
  count, size = per_window(patches, options), options.window
  windows = round(patches**0.5) // size
  split = lambda x: x.reshape(-1, windows, size, windows, size).swapaxes(2, 3).reshape(-1, windows**2, size**2)
  best = jax.lax.top_k(split(shallow), count)[1]
  numbers = jnp.broadcast_to(split(jnp.arange(patches)), (batch, windows**2, size**2))
  local = jnp.sort(jnp.take_along_axis(numbers, best, 2).reshape(batch, windows**2 * count), axis=1).astype(jnp.int32)
  left = deep.at[jnp.arange(batch)[:, None], local].set(-1)  # below every weight
  return local, top_indices(left, options.tokens - options.tokens // 2)


def destinations(projected: jax.Array, kept: jax.Array) -> jax.Array:
  """int32[B, P], for each patch the number of the kept one that absorbs it; a kept one absorbs itself."""
  likest = cosines(projected, gather_rows(projected, kept)).argmax(-1).astype(jnp.int32)
  return likest.at[jnp.arange(kept.shape[0])[:, None], kept].set(jnp.arange(kept.shape[1], dtype=jnp.int32))


def flops(model: ModelConfig, options: Options) -> float:
  """The likeness of every patch to every kept one, and the sums over what these absorb."""
  return 4 * model.vision.num_patches * num_tokens(model, options) * model.llama.hidden_size


def reduce(tower: TowerOutput, project, options: Options) -> Reduced:
  """The mean of each kept token and those that it absorbs, likeness and mean being of projected tokens."""
  projected = project(tower.features)
  batch, patches = projected.shape[:2]
  if options.tokens == patches:
    return Reduced(projected, jnp.broadcast_to(jnp.arange(patches, dtype=jnp.int32), (batch, patches)))
  kept = jnp.sort(jnp.concatenate(choose(tower, options), 1), axis=1)
  absorbed = jax.nn.one_hot(destinations(projected, kept), kept.shape[1], dtype=jnp.float32)
  sums = jnp.einsum('bpm,bpd->bmd', absorbed, projected.astype(jnp.float32), precision='highest')
  return Reduced((sums / absorbed.sum(1)[..., None]).astype(projected.dtype), kept)


REDUCER = Reducer(
  reduce=reduce,
  num_tokens=num_tokens,
  needs=needs,
  projects_all=True,
  flops=flops,
  options=Options,
  source='arXiv 2505.22654; github.com/Tencent/SelfEvolvingAgent a82450e, VScan',
  verified="the authors' code: attention rows, choices, merging, image tokens, then with its cut scores, sets, logits and tokens",
)
