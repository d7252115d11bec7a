"""LOOK-M (arXiv 2406.18139): of a prompt's cache all text and a few image entries stay, the others are merged into those.

`Stage(compressor=Piece('look_m', dict(hh_ratio=0.1, recent_ratio=0.1)))`. An entry's score is the attention that it receives from
the whole prompt. Text is told by a mask and images are ranked alone, in float32: the offset by which the authors' code puts text
first rounds the scores. With grouped queries the scores of a group's heads are added.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.config import ConfigError, LlamaConfig
from dynllava_jax.methods.base import Compressed, Compressor, Observed, row_flops
from dynllava_jax.ops import layout
from dynllava_jax.ops.attention import attention_received

MERGES = ('pivot', 'weighted', 'average')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What stays, and how the rest is merged.

  Attributes:
    hh_ratio: share of the prompt that stays for its score; all text stays even if that is more.
    recent_ratio: share of the prompt, its end, that stays whatever it is.
    merge: what an evicted entry adds to the kept one that it is most like: 'pivot' the mean of both, 'average' itself,
      'weighted' itself times the similarity, and only if that is not below average.
  """

  hh_ratio: float = 0.1
  recent_ratio: float = 0.1
  merge: str = 'pivot'

  def __post_init__(self):
    for name in ('hh_ratio', 'recent_ratio'):
      value = getattr(self, name)
      if not 0 <= value <= 1:
        raise ConfigError(f'{name} is {value}, expected a share from 0 to 1')
    if self.merge not in MERGES:
      raise ConfigError(f'merge {self.merge!r} is unknown; expected one of {", ".join(MERGES)}')


def slots(text: int, image: int, layer: int, layers: int, options: Options) -> int:
  """Room for the largest share of the longest prompt, the same in all layers."""
  size = text + image
  return min(size, max(text, int(size * options.hh_ratio)) + int(size * options.recent_ratio))


def choose(scores: jax.Array, seen: Observed, options: Options) -> jax.Array:
  """bool[B, K, S], what stays, from float32[B, K, S] scores."""
  size, rows = scores.shape[-1], seen.rows
  table = lambda ratio: jnp.asarray([int(length * ratio) for length in range(size + 1)], jnp.int32)[rows.length][:, None]
  important, recent = table(options.hh_ratio), table(options.recent_ratio)
  real, is_image = rows.is_real(size), rows.is_image(size)
  text = real & ~is_image
  in_window = real & (jnp.arange(size) >= rows.length[:, None] - recent)
  candidates = real & is_image & ~in_window
  quota = important - (text & ~in_window).sum(-1, keepdims=True)
  order = jnp.argsort(jnp.where(candidates[:, None], -scores, jnp.inf), -1, stable=True)
  rank = jnp.argsort(order, -1)
  keep = (text | in_window)[:, None] | (candidates[:, None] & (rank < quota[:, None]))
  everything = (rows.image_start < 0)[:, None] | (rows.length[:, None] <= important + recent)
  return jnp.where(everything[:, None], real[:, None], keep)


def compress(seen: Observed, options: Options) -> Compressed:
  """Keeps and merges, each head on its own."""
  batch, size, kv_heads, _ = seen.k.shape
  num_image = seen.rows.num_image
  real = seen.rows.is_real(size)
  received = attention_received(seen.q, seen.k, real.astype(jnp.float32))
  scores = received.reshape(batch, kv_heads, -1, size).sum(2)
  keep = choose(scores, seen, options)
  index, length = layout.compact(keep, slots(size - num_image, num_image, 0, 1, options))
  k, v = (x.swapaxes(1, 2) for x in (seen.k, seen.v))  # [B, K, S, H]
  kept_k, kept_v = (jnp.take_along_axis(x, index[..., None], 2) for x in (k, v))
  in_use = jnp.arange(index.shape[-1]) < length[..., None]
  unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)
  k32, kept32 = k.astype(jnp.float32), kept_k.astype(jnp.float32)
  similarity = jnp.einsum('bksh,bkch->bksc', unit(k32), unit(kept32), precision='highest')
  similarity = jnp.where(in_use[:, :, None], similarity, -jnp.inf)
  pivot, best = similarity.argmax(-1), similarity.max(-1)
  evicted = real[:, None] & ~keep
  merged = evicted & _similar_enough(best, evicted) if options.merge == 'weighted' else evicted
  to = ((pivot[..., None] == jnp.arange(index.shape[-1])) & merged[..., None]).astype(jnp.float32)  # [B, K, S, C]
  count = to.sum(2)[..., None]

  def merge(x, kept):
    x, old = x.astype(jnp.float32), kept.astype(jnp.float32)
    if options.merge == 'weighted':
      x = x * jnp.where(merged, best, 0.0)[..., None]
    added = jnp.einsum('bksc,bksh->bkch', to, x, precision='highest')
    if options.merge == 'pivot':
      added = (added + count * old) / 2
    new = jnp.where(count > 0, (old + added) / (1 + count), old)
    return new.astype(kept.dtype).swapaxes(1, 2)

  details = {'received': received, 'scores': scores, 'keep': keep, 'pivot': pivot}
  return Compressed(k=merge(k, kept_k), v=merge(v, kept_v), length=length[:, 0], details=details)


def _similar_enough(best: jax.Array, evicted: jax.Array) -> jax.Array:
  """bool[B, K, S]: of the n-th evicted entries of all heads, those whose mean similarity is at least that of all."""
  order = jnp.argsort(~evicted, -1, stable=True)
  count = evicted.sum(-1, keepdims=True)  # the same in all heads
  mean = jnp.take_along_axis(best, order, -1).mean(1, keepdims=True)  # of the n-th ones
  there = jnp.arange(best.shape[-1]) < count[:, :1]
  overall = jnp.where(there, mean, 0.0).sum(-1, keepdims=True) / jnp.maximum(count[:, :1], 1)
  nth = jnp.maximum(jnp.cumsum(evicted, -1) - 1, 0)
  return jnp.take_along_axis(jnp.broadcast_to(mean >= overall, best.shape), nth, -1)


def flops(llama: LlamaConfig, text: int, image: int, options: Options) -> float:
  """What each entry receives, the likeness of all to what stays, and the sums of merged keys and values."""
  size, kept = text + image, slots(text, image, 0, 1, options)
  return row_flops(llama, (size + 1) / 2, size) + 6 * size * kept * llama.num_kv_heads * llama.head_dim


COMPRESSOR = Compressor(
  compress=compress,
  slots=slots,
  flops=flops,
  options=Options,
  source='arXiv 2406.18139, SUSTechBruce/LOOK-M ecf0f51',
  verified="the authors' code in float64, pivot and weighted merges: scores, sets, pivots, keys, values, logits and tokens",
)
