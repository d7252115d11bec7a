"""What may be passed to generation: checked before a program is compiled; a mistake is a ValueError that names the argument.

Shapes and types are always checked; values where this process has all of them, which a host of several does not.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.cache import Cache
from dynllava_jax.config import ModelConfig, Stage
from dynllava_jax.config.groups import GROUPS
from dynllava_jax.models.clip_text import NO_SEGMENT
from dynllava_jax.models.lora import ADAPTERS
from dynllava_jax.models.matrices import SCALES, check_scales, is_matrix
from dynllava_jax.models.params import abstract_params
from dynllava_jax.sharding import unboxed

DTYPES = ('float32', 'bfloat16', 'float16')
MOST_TOKENS = 2**24  # of a cache's room, before memory is asked for


class ArgumentError(ValueError):
  """An argument, or the flag that it came from, that cannot be; the message begins with its name."""


def integer(name: str, value: Any, low: int, high: int) -> None:
  """Raises ValueError unless it is an integer in [low, high]."""
  if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
    raise ArgumentError(f'{name}: {value!r}, expected an integer from {low} to {high:,}')


def number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
  """Raises ValueError unless it is a finite number in [low, high], or (low, high] if `above`."""
  real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
  try:
    real = real and math.isfinite(value)
  except OverflowError:  # an integer beyond every float
    real = False
  if not real or not low <= value <= high or (above and value == low):
    bounds = f'{"above" if above else "from"} {low}' + ('' if high == math.inf else f' to {high}')
    raise ArgumentError(f'{name}: {value!r}, expected a number {bounds}')


def check_generator(
  cfg: ModelConfig, params: Any, *, max_new_tokens: Any, eos_id: Any, later_tokens: Any, given_tokens: Any, dtype: Any
) -> None:
  """The arguments of `Generator` besides stages, sampling and reducer, which check themselves; ValueError."""
  if not isinstance(cfg, ModelConfig):
    raise ArgumentError(f'cfg: {type(cfg).__name__}, expected a ModelConfig')
  integer('max_new_tokens', max_new_tokens, 1, MOST_TOKENS)
  integer('later_tokens', later_tokens, 0, MOST_TOKENS)
  integer('given_tokens', given_tokens, 0, MOST_TOKENS)
  if eos_id is not None:
    integer('eos_id', eos_id, 0, cfg.llama.vocab_size - 1)
  try:
    known = dtype is not None and jnp.dtype(dtype).name in DTYPES  # numpy takes None for float64
  except TypeError:
    known = False
  if not known:
    raise ArgumentError(f'dtype: {dtype!r}, expected one of {", ".join(DTYPES)}')
  llama = params.get('llama') if isinstance(params, Mapping) else None
  if not isinstance(llama, Mapping) or not llama.keys() & {'layers', 'layers_0', 'stage_0', 'stage_0_0'}:
    raise ArgumentError(
      'params: no parameters in checkpoint form, expected what checkpoint.load_params gives ("llama" with "layers")'
    )
  if 'layers' in llama:
    found = {x.shape[0] for x in jax.tree.leaves(llama['layers'])} - {cfg.llama.num_layers}
    if found:
      raise ArgumentError(f'params: {found.pop()} layers, but cfg.llama.num_layers is {cfg.llama.num_layers}')


def check_params(cfg: ModelConfig, stages: tuple[Stage, ...], params: Mapping[str, Any], adapters: bool) -> None:
  """Compares parameters, in checkpoint form or cut, with those that a model has.

  Args:
    cfg, stages: the model and how it is run; what methods bring may be missing where no stage asks it.
    params: by group; int8 weights of the decoder have their scales beside them.
    adapters: whether those of a training run may be there.

  Raises:
    ValueError: names the first that is missing, of another shape or type, or not the model's.
  """
  expected = _shapes(cfg, 'vision_tail' in params)
  groups = list(dict.fromkeys(name.partition('/')[0] for name in expected))
  rounded = any(getattr(x, 'dtype', None) == jnp.int8 for _, x in _leaves(params['llama']))
  more = (*([ADAPTERS] if adapters else []), *([SCALES] if rounded else []))
  if strange := next((group for group in params if group not in groups and group not in more), None):
    raise ArgumentError(f'params: {strange} is no group of this model, expected {", ".join(groups)}; take it out, or give its cfg')
  asked = set(groups) - {name for name, group in GROUPS.items() if not group.asked(stages)}
  as_stored = _as_stored if len(cfg.llama.runs) == 1 else lambda name: name  # else they are compared by `check_cut` alone
  found = {as_stored(jax.tree_util.keystr(path, simple=True, separator='/')): leaf for path, leaf in _leaves(params)}
  for name, leaf in found.items():
    group = name.partition('/')[0]
    if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
      raise ArgumentError(f'params: {name} is {type(leaf).__name__}, expected an array')
    whole = group == 'llama' and SCALES in params and leaf.dtype == jnp.int8 and is_matrix(name.rpartition('/')[2])
    if not jnp.issubdtype(leaf.dtype, jnp.floating) and not whole:
      raise ArgumentError(f'params: {name} is {leaf.dtype}, expected floating-point numbers such as float32')
    if group in more or '/stage_' in name:  # one layer by itself, as `arrangement` lays them
      continue
    if name not in expected:
      raise ArgumentError(f'params: {name} is no parameter of this model; take it out, or give its cfg')
    cut = int('/layers/' in name and 'layers' not in params[group])  # as many as the stage has, see `check_cut`
    if tuple(leaf.shape[cut:]) != expected[name][cut:]:
      raise ArgumentError(f'params: {name} has shape {_sizes(leaf.shape)}, expected {_sizes(expected[name])}; is it of this cfg?')
  check_scales(params['llama'], params.get(SCALES, {}))
  apart = any(name.startswith('llama/stage_') for name in found)
  for name, shape in expected.items():
    if name not in found and name.partition('/')[0] in asked and not (apart and name.startswith('llama/layers')):
      raise ArgumentError(f'params: {name} is missing, expected floating-point numbers of shape {_sizes(shape)}')


@functools.lru_cache(maxsize=16)
def _shapes(cfg: ModelConfig, with_tail: bool) -> dict[str, tuple[int, ...]]:
  """Shapes of a model's parameters in checkpoint form, by name."""
  leaves = jax.tree_util.tree_leaves_with_path(unboxed(abstract_params(cfg, with_tail)))
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape for path, leaf in leaves}


def _leaves(params: Mapping[str, Any]) -> list[tuple]:
  return jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: x is None)


def _as_stored(name: str) -> str:
  """The name in checkpoint form of a parameter of a stack of layers that a stage has."""
  return re.sub(r'^(\w+)/stage_\d+/', r'\1/layers/', name)


def _sizes(shape: Sequence[int]) -> str:
  return 'x'.join(map(str, shape)) or '()'


def check_cut(llama: Mapping[str, Any], stages: tuple[Stage, ...], num_layers: int) -> None:
  """Raises ValueError if decoder parameters that were cut while they were loaded were cut for other stages."""
  starts = [s.start for s in stages]
  expected = [end - start for start, end in zip(starts, [*starts[1:], num_layers])]
  layers_of = lambda stage: next((x.shape[0] for x in jax.tree.leaves(stage)), 0)
  found: dict[int, int] = {}
  for name, weights in llama.items():
    if name.startswith('stage_'):  # stage_I or stage_I_at_N, stacks of layers, or stage_I_J, a layer
      index, _, layer = name.removeprefix('stage_').partition('_')
      single = layer and not layer.startswith('at_')
      found[int(index)] = found.get(int(index), 0) + (1 if single else layers_of(weights))
  counts = [found[i] for i in sorted(found)]
  if counts != expected:
    raise ArgumentError(
      f'params: cut into {counts} layers, but stages wants {expected}; give checkpoint.load_params the same stages, or none'
    )


def array(name: str, value: Any, shape: tuple[int | None, ...], kind: Any) -> np.ndarray | None:
  """Checks one argument.

  Args:
    name: for messages.
    value: numpy or jax array.
    shape: what is expected, None where any size of at least 1 will do.
    kind: numpy's abstract type, such as `np.integer`.

  Returns:
    Its values, if this process has all of them.

  Raises:
    ValueError: no array, or of another shape or type.
  """
  sizes = 'x'.join('?' if n is None else str(n) for n in shape)
  expected = f'expected {"booleans" if kind is np.bool_ else "integers"} of shape {sizes}'
  if not isinstance(value, (np.ndarray, jax.Array)):
    raise ArgumentError(f'{name}: {type(value).__name__}, {expected}')
  fits = value.ndim == len(shape) and all(n == m if m is not None else n > 0 for n, m in zip(value.shape, shape))
  if not fits or not jnp.issubdtype(value.dtype, kind):
    raise ArgumentError(f'{name}: {value.dtype} of shape {"x".join(map(str, value.shape)) or "()"}, {expected}')
  if isinstance(value, jax.core.Tracer) or (isinstance(value, jax.Array) and not value.is_fully_addressable):
    return None
  return np.asarray(value)


def within(name: str, values: np.ndarray | None, low: int, high: int) -> None:
  """Raises ValueError with the first row of which a value is not in [low, high]."""
  if values is None or not values.size:
    return
  wrong = (values < low) | (values > high)
  if wrong.any():
    row = int(np.argwhere(wrong)[0, 0])
    raise ArgumentError(f'{name}: {values[wrong][0]} in row {row}, expected {low} to {high}')


def check_prompt(prompt: Any, pixels: Any, cfg: ModelConfig, num_image: int) -> None:
  """A batch of prompts, see `models.dynllava.Prompt`; `num_image` positions belong to an image. ValueError."""
  if any(not hasattr(prompt, name) for name in ('tokens', 'length', 'image_start', 'seed', 'instruct_start', 'question')):
    raise ArgumentError(f'prompt: {type(prompt).__name__}, expected a Prompt')
  tokens = array('prompt.tokens', prompt.tokens, (None, None), np.integer)
  batch, slots = prompt.tokens.shape
  length = array('prompt.length', prompt.length, (batch,), np.integer)
  start = array('prompt.image_start', prompt.image_start, (batch,), np.integer)
  array('prompt.seed', prompt.seed, (batch,), np.integer)
  if prompt.instruct_start is not None:
    within('prompt.instruct_start', array('prompt.instruct_start', prompt.instruct_start, (batch,), np.integer), 0, slots)
  if prompt.question is not None:
    if cfg.clip_text is None:
      raise ArgumentError('prompt.question: given, but this model has no CLIP text tower; leave it out')
    asked = array('prompt.question', prompt.question, (batch, None, cfg.clip_text.num_positions), np.integer)
    within('prompt.question', asked, NO_SEGMENT, cfg.clip_text.vocab_size - 1)
  size = cfg.vision.image_size
  array('pixels', pixels, (batch, size, size, 3), np.integer)
  if pixels.dtype != np.uint8:
    raise ArgumentError(f'pixels: {pixels.dtype}, expected uint8')
  if slots <= num_image:
    raise ArgumentError(f'prompt.tokens: {slots} positions, expected more than the {num_image} of an image')
  within('prompt.length', length, 1, slots)
  within('prompt.image_start', start, -1, slots - num_image)
  if length is None or start is None or tokens is None:
    return
  if ((start >= 0) & (start + num_image > length)).any():
    row = int(np.argmax((start >= 0) & (start + num_image > length)))
    ends = f'{start[row]} in row {row}, but its {num_image} image positions'
    raise ArgumentError(f'prompt.image_start: {ends} end behind its length {length[row]}')
  at = np.arange(slots)
  in_image = (start[:, None] >= 0) & (at >= start[:, None]) & (at < start[:, None] + num_image)
  text = (at < length[:, None]) & ~in_image
  within('prompt.tokens', np.where(text, tokens, 0), 0, cfg.llama.vocab_size - 1)


def check_turn(turn: Any) -> int:
  """A conversation that has not been consumed; its number of rows. ValueError."""
  cache = getattr(turn, 'cache', None)
  if not isinstance(cache, Cache) or not hasattr(turn, 'logits'):
    raise ArgumentError(f'turn: {type(turn).__name__}, expected a Turn, as start, step, append and force return')
  if any(x.is_deleted() for x in jax.tree.leaves(turn) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)):
    raise ArgumentError('turn: was consumed by an earlier call; go on with the one that it returned')
  return turn.logits.shape[0]


def check_chunk(name: str, tokens: Any, counts: tuple[str, Any], batch: int, cfg: ModelConfig) -> np.ndarray | None:
  """Tokens [B, T] of which the first `counts[b]` of a row are real; returns the counts. ValueError."""
  values = array(name, tokens, (batch, None), np.integer)
  real = array(counts[0], counts[1], (batch,), np.integer)
  within(counts[0], real, 0, tokens.shape[1])
  if values is not None and real is not None:
    used = np.arange(tokens.shape[1]) < real[:, None]
    within(name, np.where(used, values, 0), 0, cfg.llama.vocab_size - 1)
  return real


def check_room(cache: Cache, fed: np.ndarray | None, flag: str) -> None:
  """Raises ValueError if so many more tokens of a row do not fit where no gate may give some up. `flag`: what to raise."""
  if fed is None:
    return
  for stage in cache.stages:
    if not stage.gated and stage.generated.is_fully_addressable:
      held = np.asarray(stage.generated)
      if (held + fed > stage.budget).any():
        row = int(np.argmax(held + fed))
        more = f'{held[row]} tokens are held and {fed[row]} more come'
        raise ArgumentError(f'row {row}: {more}, the cache has room for {stage.budget}; {flag}')
