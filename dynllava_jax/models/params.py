"""Parameters as trees: made at random, described without being made, cut into stages and joined again, counted.

Checkpoint form holds one stack of all decoder layers (`llama/layers`, [num_layers, ...]); run form one stack per stage
(`llama/stage_0`, ...), or where layers lie apart (`arrangement`) one group per layer (`llama/stage_0_0`, ...). Everything here runs
outside jit.
"""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import cache as kv
from dynllava_jax import methods
from dynllava_jax.arrangement import STACKED, Arrangement, cut_stack, joined_projections, layer_names, stack_start
from dynllava_jax.config import ModelConfig, Stage
from dynllava_jax.config.groups import groups_of, layered
from dynllava_jax.models.clip import VisionBlock
from dynllava_jax.models.clip_text import ClipText
from dynllava_jax.models.dynllava import DynLlava, Prompt
from dynllava_jax.models.groups import MODULES
from dynllava_jax.models.layers import LayerNorm, scan_layers
from dynllava_jax.models.lora import ADAPTERS
from dynllava_jax.models.matrices import SCALES
from dynllava_jax.models.projector import Projector, TokenPacker
from dynllava_jax.sharding import unboxed

LAYERED = ('llama', ADAPTERS, SCALES)  # groups that hold decoder layers; methods may bring more


def _layered(params: dict[str, Any]) -> tuple[str, ...]:
  return tuple(name for name in (*LAYERED, *layered()) if name in params)


def init_params(cfg: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """Random parameters in checkpoint form, with logical axis metadata (`flax.linen.meta.unbox` removes it)."""

  def everything(model: DynLlava, pixels, prompt):
    image = model.encode_images(pixels)
    for name in groups_of(cfg):
      getattr(model, name)(*MODULES[name].inputs(cfg))
    return model.logits(model.prefill(prompt, image, kv.CacheSpec(max_new_tokens=1))[0])

  pixels = jnp.zeros((1, cfg.vision.image_size, cfg.vision.image_size, 3))
  size = methods.num_image_tokens(cfg) + 1
  prompt = Prompt(jnp.zeros((1, size), jnp.int32), jnp.full(1, size), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.uint32))
  params = DynLlava(cfg).init(key, pixels, prompt, method=everything)['params']
  return params | {name: _stored(params[name]) for name in _layered(params)}


def _stored(group: dict[str, Any]) -> dict[str, Any]:
  """Parameters of a single stage under the names that checkpoints have for them."""
  several = any('_at_' in name for name in group)
  named = lambda name: name.replace('stage_0_at_', 'layers_').replace('stage_0', 'layers_0' if several else 'layers')
  return {named(name): value for name, value in group.items()}


def init_projector(cfg: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """A random `projector`, without axis names."""
  x = jnp.zeros((1, cfg.vision.num_patches, cfg.vision.hidden_size))
  if cfg.packer:
    tower = methods.TowerOutput(x, states=dict.fromkeys(methods.tower_needs(cfg, None).states, x))
    return unboxed({'projector': TokenPacker(cfg, jnp.float32).init(key, tower)['params']})
  return unboxed({'projector': Projector(cfg, jnp.float32).init(key, x)['params']})


class VisionTail(nn.Module):
  """The parameters of a full CLIP tower that LLaVA never runs; checkpoints carry them for the way back."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[B, T, vision width] -> float[B, T, vision width]."""
    vision = self.cfg.vision
    unused = vision.num_layers - vision.layers_run
    if unused:
      (x, _), _ = scan_layers(VisionBlock, unused, ())(vision, jnp.float32, name='layers')((x, None))
    return LayerNorm(vision.layer_norm_eps, jnp.float32, name='post_layernorm')(x)


def abstract_params(cfg: ModelConfig, with_tail: bool = False) -> dict[str, Any]:
  """Shapes of `init_params` without allocating, boxed; `with_tail` adds the unused top of the CLIP tower and its text tower."""
  params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
  if with_tail:
    x = jax.ShapeDtypeStruct((1, 1, cfg.vision.hidden_size), jnp.float32)
    params['vision_tail'] = jax.eval_shape(VisionTail(cfg).init, jax.random.key(0), x)['params']
    if cfg.clip_text is not None:
      ids = jax.ShapeDtypeStruct((1, 1, cfg.clip_text.num_positions), jnp.int32)
      params['clip_text'] = jax.eval_shape(ClipText(cfg.clip_text, cfg.vision).init, jax.random.key(0), ids, x)['params']
  return params


def cut_params(params: dict[str, Any], stages: tuple[Stage, ...], arrangement: Arrangement = STACKED) -> dict[str, Any]:
  """Checkpoint form to the form that `DynLlava(cfg, stages, arrangement=arrangement)` takes. Call it outside jit.

  Adapters are of training, which stacks: with `arrangement` apart merge them first.
  """
  if arrangement.apart:
    starts = [s.start for s in stages]
    cut = {name: cut_layers(params[name], stages) for name in layered() if name in params}
    return params | cut | {name: _apart(params[name], starts) for name in ('llama', SCALES) if name in params}
  return params | {name: cut_layers(params[name], stages) for name in _layered(params)}


def _apart(group: dict[str, Any], starts: list[int]) -> dict[str, Any]:
  stacks, rest = _stacks(group)
  layers = (jax.tree.map(lambda x: x[n], stack) for stack in stacks.values() for n in range(depth(stack)))
  names = layer_names(starts, sum(map(depth, stacks.values())))
  return rest | {name: joined_projections(layer) for name, layer in zip(names, layers)}


def depth(layers: dict[str, Any]) -> int:
  """How many layers a stack of them has."""
  return jax.tree.leaves(layers)[0].shape[0]


def cut_layers(llama: dict[str, Any], stages: tuple[Stage, ...]) -> dict[str, Any]:
  """Checkpoint form (`layers`, stacked [num_layers, ...]) to run form (`stage_0`, `stage_1`, ...).

  Call it outside jit: inside, the slices would be copies held next to the original.
  """
  stacks, rest = _stacks(llama)
  cut = {}
  for first, stack in stacks.items():
    for name, a, b in cut_stack(first, depth(stack), [s.start for s in stages]):
      cut[name] = jax.tree.map(lambda x, a=a, b=b: x[a:b], stack)
  return rest | cut


def _stacks(llama: dict[str, Any]) -> tuple[dict[int, Any], dict[str, Any]]:
  """(the stacks of decoder layers in checkpoint form by their first layer, ascending; what else there is)."""
  starts = {name: stack_start(name) for name in llama}
  stacks = {first: llama[name] for name, first in sorted(starts.items(), key=lambda item: item[1] or 0) if first is not None}
  return stacks, {name: value for name, value in llama.items() if starts[name] is None}


def join_layers(llama: dict[str, Any]) -> dict[str, Any]:
  """The inverse of `cut_layers`, for any stage list."""
  numbers = lambda name: [int(part) for part in name.removeprefix('stage_').split('_at_')]
  names = sorted((k for k in llama if k.startswith('stage_')), key=numbers)

  def join(*parts):
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if isinstance(parts[0], np.ndarray) else jnp.concatenate(parts)

  alike = lambda name: jax.tree.structure(llama[name])
  runs = [[llama[name] for name in run] for _, run in itertools.groupby(names, alike)]
  joined = [jax.tree.map(join, *run) for run in runs]
  firsts = [0, *itertools.accumulate(map(depth, joined))]
  rest = {k: v for k, v in llama.items() if k not in names}
  return rest | {f'layers_{first}' if len(joined) > 1 else 'layers': stack for first, stack in zip(firsts, joined)}


def join_params(params: dict[str, Any]) -> dict[str, Any]:
  """The inverse of `cut_params`."""
  return params | {name: join_layers(params[name]) for name in _layered(params)}


def count_parameters(params: Any) -> int:
  """Numbers in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
