"""SnapKV (arXiv 2404.14469): keys stay that the last queries of the prompt look at, or at whose neighbours they look.

`Stage(compressor=Piece('snapkv', dict(ratio=0.75, window=16)))`. LLaVA's questions are often shorter than the published window of
64; over the prompt it then holds, and keeps, the last rows of the image. Over the image it never does: the queries are those of the
text behind the image, `window` of them at most.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.config import ConfigError, LlamaConfig
from dynllava_jax.methods import kv_scores
from dynllava_jax.methods.base import row_flops
from dynllava_jax.methods.kv_scores import Part, at_least, group_mean, last_ones, looked_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(kv_scores.Options):
  """Besides what all share.

  Attributes:
    window: queries that are asked, the last of the prompt; over the prompt their own keys stay.
    kernel: keys over which scores are averaged; odd.
  """

  window: int = 64
  kernel: int = 5

  def __post_init__(self):
    super().__post_init__()
    at_least(self, window=1, kernel=1)
    if self.kernel % 2 == 0:
      raise ConfigError(f'kernel is {self.kernel}, expected an odd number')


def score(part: Part, options: Options) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Softmax of the window's queries, averaged over them, over neighbours and over the query heads of a group."""
  seen, length = part.seen, part.seen.rows.length
  if part.whole:
    window = jnp.minimum(options.window, length)
    in_window = (part.place >= (length - window)[:, None])[:, None]
  else:
    window = jnp.clip(length - part.start - part.size, 1, options.window)
    in_window = False
  columns = part.columns(group_mean(looked_at(seen, window, options.window), seen.k.shape[2]))
  columns = jnp.where(in_window, 0.0, columns)
  sums = jax.lax.reduce_window(columns, 0.0, jax.lax.add, (1, 1, options.kernel), (1, 1, 1), 'SAME')
  return last_ones(part, in_window, sums / options.kernel), {}


def flops(llama: LlamaConfig, text: int, image: int, options: Options) -> float:
  """The window's attention rows."""
  return row_flops(llama, min(options.window, text + image), text + image)


COMPRESSOR = kv_scores.compressor(
  score,
  flops=flops,
  options=Options,
  source='arXiv 2404.14469, NVIDIA/kvpress 0.5.5',
  verified='kvpress over the prompt, an independent program over the image: scores, sets, keys, values, logits and tokens',
)
