"""What the compressors have in common that give every cached key a score and keep the best ones, each kv head on its own.

They are `snapkv`, `streaming_llm`, `tova`, `knorm`, `keydiff`, `expected_attention`, `observed_attention`, `pyramidkv` and `lagkv`.
A file of theirs says how keys are scored; how many stay, which these are and what becomes of them is said here, after kvpress
(github.com/NVIDIA/kvpress, 0.5.5). Unlike there every row is what it would be alone, whatever the padding: budgets, windows and
statistics count its own tokens. Everything is computed in float32, and ties go to the earlier token. What comes after the prompt is
cached as it is: cutting again while tokens are generated (kvpress's DecodingPress) would take slots back that the cache's capacity,
its room for later turns and the gate count on.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import ConfigError
from dynllava_jax.methods.base import Compressed, Compressor, Observed
from dynllava_jax.ops import layout
from dynllava_jax.ops.attention import attention_received
from dynllava_jax.ops.rope import apply_rope

IMAGE, PROMPT = 'image', 'prompt'
FORCED = 1e30  # scores from here on stay before all others, the larger first; no method's own score comes near


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What competes for how many places.

  Attributes:
    ratio: share of it that leaves each kv head of each layer.
    over: 'image' for the image tokens alone, all text stays, rows without image are not touched; 'prompt' for text and image alike.
    rerotate: whether what stays is rotated anew, to positions 0, 1, 2, ..., and the first generated token stands behind it; else
      all keep their positions.
  """

  ratio: float = 0.5
  over: str = IMAGE
  rerotate: bool = False

  def __post_init__(self):
    if not 0 <= self.ratio < 1:
      raise ConfigError(f'ratio is {self.ratio}, expected the share that leaves, from 0 to less than 1')
    if self.over not in (IMAGE, PROMPT):
      raise ConfigError(f'over {self.over!r} is unknown; expected {IMAGE} or {PROMPT}')


def at_least(options: Any, **bounds: int) -> None:
  """ConfigError unless the named settings reach their bounds."""
  for name, least in bounds.items():
    value = getattr(options, name)
    if value < least:
      raise ConfigError(f'{name} is {value}, expected at least {least}')


@dataclasses.dataclass(frozen=True)
class Part:
  """The rows of a prompt that compete, M of them with those that are not real.

  Attributes:
    seen: what the layer shows.
    start: int32[B], where the first of them stands; count: int32[B], how many are real, 0 if nothing competes.
    size: M.
    whole: whether it is the prompt, and not its image alone.
  """

  seen: Observed
  start: jax.Array
  count: jax.Array
  size: int
  whole: bool

  @property
  def place(self) -> jax.Array:
    """int32[M], counted from the first of them."""
    return jnp.arange(self.size)

  @property
  def real(self) -> jax.Array:
    """bool[B, 1, M]."""
    return (self.place < self.count[:, None])[:, None]

  def columns(self, x: jax.Array) -> jax.Array:
    """[B, K, S] of the prompt -> [B, K, M]."""
    return x if self.whole else layout.take_image_rows(x.swapaxes(1, 2), self.start, self.size).swapaxes(1, 2)

  def heads(self, x: jax.Array) -> jax.Array:
    """Keys or values float[B, S, K, H] of the prompt -> float32[B, K, M, H]."""
    x = x.swapaxes(1, 2).astype(jnp.float32)
    if self.whole:
      return x
    index = jnp.maximum(self.start, 0)[:, None] + jnp.arange(self.size)
    return jnp.take_along_axis(x, index[:, None, :, None], 2, mode='clip')


def competing(seen: Observed, options: Options) -> Part:
  """All of the prompt, or its image."""
  rows, size = seen.rows, seen.k.shape[1]
  if options.over == PROMPT:
    return Part(seen, jnp.zeros_like(rows.length), rows.length, size, True)
  has_image = rows.image_start >= 0
  return Part(seen, jnp.maximum(rows.image_start, 0), jnp.where(has_image, rows.num_image, 0), rows.num_image, False)


def first_ones(part: Part, count: int, scores: jax.Array) -> jax.Array:
  """`scores` float32[B, K, M] with the first `count` of the prompt forced, the earliest before all others, `last_ones` too."""
  place = part.start[:, None, None] + part.place
  return jnp.where((place < count) & part.real, FORCED * (1.0 + part.size + count - place), scores)


def last_ones(part: Part, forced: jax.Array, scores: jax.Array) -> jax.Array:
  """`scores` float32[B, K, M] with bool[B, 1, M] `forced`, the latest before the others."""
  return jnp.where(forced, FORCED * (1.0 + part.place), scores)


def group_mean(x: jax.Array, kv_heads: int) -> jax.Array:
  """[B, N, ...] of query heads -> [B, K, ...]; the heads of a group stand next to each other."""
  return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:]).mean(2)


def looked_at(seen: Observed, count: jax.Array | int, most: int) -> jax.Array:
  """Softmax weights of the last `count` int32[B] rows of a prompt, `most` at most, averaged over them: float32[B, N, S]."""
  behind = jnp.arange(min(most, seen.q.shape[1]))
  place = jnp.maximum(seen.rows.length[:, None] - 1 - behind, 0)
  count = jnp.broadcast_to(count, place.shape[:1])[:, None]
  weight = jnp.where(behind < count, 1 / jnp.maximum(count, 1).astype(jnp.float32), 0.0)
  return attention_received(layout.gather_rows(seen.q, place), seen.k, weight, place)


def share(count: int, layer: int, layers: int, options: Options) -> int:
  """How many of `count` stay in a layer: kvpress's product of doubles, cut off; of a prompt at least one."""
  return max(int(options.over == PROMPT and count > 0), int(count * (1 - options.ratio)))


# (part, options) -> (float32[B, K, M], the larger the rather kept, whatever it says of what is not real; details by name)
Score = Callable[[Part, Any], tuple[jax.Array, dict[str, jax.Array]]]


def compressor(score: Score, budget: Callable[[int, int, int, Any], int] = share, **origin: Any) -> Compressor:
  """The piece that keeps by `score`.

  Args:
    score: of the competing keys.
    budget: (how many compete, layer, decoder layers, options) -> how many of them stay.
    origin: other fields of `Compressor`.
  """

  @functools.lru_cache  # the cost of every sample asks
  def slots(text: int, image: int, layer: int, layers: int, options: Options) -> int:
    if options.over == IMAGE:
      return text + budget(image, layer, layers, options)
    return max(budget(count, layer, layers, options) for count in range(text + image + 1))

  def compress(seen: Observed, options: Options) -> Compressed:
    part, size, depth = competing(seen, options), seen.k.shape[1], seen.depth
    table = np.array([[budget(n, layer, depth.layers, options) for n in range(part.size + 1)] for layer in depth.stage], np.int32)
    differs = (table != table[0]).any()
    of_layer = jnp.asarray(table)[depth.layer - depth.stage.start] if differs else jnp.asarray(table[0])
    scores, details = score(part, options)
    keep = ranked(part, scores, of_layer[part.count])
    text = size - seen.rows.num_image
    capacity = max(slots(text, seen.rows.num_image, layer, depth.layers, options) for layer in depth.stage)
    index, length = layout.compact(keep, capacity)
    length, first = length[:, 0], None  # the same in all heads
    if differs:  # every layer's entries end where those of the largest layer do
      first = jnp.asarray(table.max(0))[part.count] - of_layer[part.count]
      slot = jnp.arange(capacity) - first[:, None]
      index = jnp.take_along_axis(index, jnp.maximum(slot, 0)[:, None], -1)
      length = length + first
    k, v = (jnp.take_along_axis(x.swapaxes(1, 2), index[..., None], 2).swapaxes(1, 2) for x in (seen.k, seen.v))
    shift = None
    if options.rerotate:
      k, shift = turned(seen, k, index), seen.rotation.next - length
    return Compressed(k=k, v=v, length=length, first=first, shift=shift, details=details | {'scores': scores, 'keep': keep})

  return Compressor(compress=compress, slots=slots, **origin)


def ranked(part: Part, scores: jax.Array, n: jax.Array) -> jax.Array:
  """bool[B, K, S], what of the prompt stays if int32[B] `n` of the competing do."""
  order = jnp.argsort(jnp.where(part.real, -scores, jnp.inf), -1, stable=True)
  chosen = (jnp.argsort(order, -1, stable=True) < n[:, None, None]) & part.real
  if part.whole:
    return chosen
  rows, size = part.seen.rows, part.seen.k.shape[1]
  slot, is_image = layout.image_slots(jnp.arange(size)[None], rows.image_start, part.size)
  of_image = jnp.take_along_axis(chosen, jnp.broadcast_to(slot[:, None], (*chosen.shape[:2], size)), -1)
  return rows.is_real(size)[:, None] & (of_image | ~is_image[:, None])


def turned(seen: Observed, k: jax.Array, index: jax.Array) -> jax.Array:
  """Kept keys float[B, C, K, H] of rows int32[B, K, C] rotated on, to the positions of their slots."""
  batch, slots, kv_heads, head_dim = k.shape
  back = jnp.arange(slots) - layout.gather_rows(seen.rotation.positions, index.reshape(batch, -1)).reshape(index.shape)
  heads = k.swapaxes(1, 2).reshape(-1, slots, 1, head_dim)
  heads = apply_rope(heads, *seen.rotation.angles(back.reshape(-1, slots)))
  return heads.reshape(batch, kv_heads, slots, head_dim).swapaxes(1, 2)
