"""A cache that holds fewer tokens than it did: what stays moves together, and its keys are rotated on to where they then stand.

Keys are stored rotated, and a rotation by another angle on top is exact, so nothing is computed again. What a token that stays has
seen of those that leave stays in its key and value; who does not want that runs the prompt again.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax import cache as kv
from dynllava_jax.cached_arrays import Held, each, lying, standing
from dynllava_jax.config import LlamaConfig
from dynllava_jax.ops.rope import apply_rope, rope_angles
from dynllava_jax.pruned_cache import PrunedCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Survivors:
  """What stays of a cache, per stage of C slots.

  Attributes:
    slots: of each stage int32[B, C], where its tokens lie now, in order; behind `length` arbitrary.
    length: of each stage int32[B], how many.
    moved: of each stage int32[B, C], by how many positions each key is rotated on, negative towards the beginning.
    position: int32[B], that of the next token.
  """

  slots: tuple[jax.Array, ...]
  length: tuple[jax.Array, ...]
  moved: tuple[jax.Array, ...]
  position: jax.Array


def why_not(cache: kv.Cache) -> str:
  """Why a cache cannot be compacted, '' if it can: every slot of a stage must hold the same token in all its layers."""
  for stage in cache.stages:
    if isinstance(stage, PrunedCache):
      return 'each layer holds other tokens'
    if stage.first is not None:
      return 'a compressor keeps other tokens in each layer'
    if stage.candidates is not None:
      return 'image tokens lie beside the cache'
    if stage.recent is not None:
      return 'a gate that judges later has slots that are not in order'
  return ''


def compacted(cache: kv.Cache, survivors: Survivors, cfg: LlamaConfig) -> kv.Cache:
  """The cache with what survives. It counts as prompt from then on: as read, not as generated, and never given up for room."""
  stages = [_compacted(*parts, cfg) for parts in zip(cache.stages, survivors.slots, survivors.length, survivors.moved)]
  return dataclasses.replace(cache, stages=tuple(stages), position=survivors.position)


def _compacted(stage: kv.StageCache, slots: jax.Array, length: jax.Array, moved: jax.Array, cfg: LlamaConfig) -> kv.StageCache:
  angles = rope_angles(moved, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)

  def moved_on(keys: Held, axes: str) -> Held:
    return lying(apply_rope(standing(keys, axes, cfg.num_kv_heads), *angles), axes, stage.arrangement)

  def gathered(axes: str, layer: jax.Array) -> jax.Array:
    index = slots.reshape([slots.shape['bc'.index(a)] if a in 'bc' else 1 for a in axes])
    return jnp.take_along_axis(layer, index, axes.index('c'), mode='clip')

  def of_layers(held: Any, axes: str, is_key: bool) -> Any:
    kept = lambda layer: each(gathered, axes, layer)
    one = lambda layer: moved_on(kept(layer), axes) if is_key else kept(layer)
    return tuple(map(one, held)) if isinstance(held, tuple) else jax.lax.map(one, held)

  return dataclasses.replace(
    stage,
    k=of_layers(stage.k, stage.arrangement.keys, True),
    v=of_layers(stage.v, stage.arrangement.values, False),
    length=length,
    margin=jnp.full_like(stage.margin, kv.NEVER_EVICTED),
    generated=jnp.zeros_like(stage.generated),
  )
