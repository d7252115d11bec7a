"""PyramidKV (arXiv 2406.02069): SnapKV's choice, with more places in the lower layers than in the upper ones.

`Stage(compressor=Piece('pyramidkv', dict(ratio=0.75)))`. All layers of a stage have as many slots as its largest one fills: in one
stage up to `2 - 1 / beta` times those of SnapKV at the same ratio. A list that names it in several stages keeps the very same
tokens, in slots that follow the pyramid in as many steps; one stage per layer has no slot too many.
"""

import dataclasses

from dynllava_jax.config import ConfigError
from dynllava_jax.methods import kv_scores, snapkv
from dynllava_jax.methods.kv_scores import PROMPT, at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(snapkv.Options):
  """Besides SnapKV's.

  Attributes:
    beta: the mean number of places over that of the last layer; the larger the steeper.
  """

  beta: float = 20.0

  def __post_init__(self):
    super().__post_init__()
    at_least(self, beta=1)
    if self.rerotate:
      raise ConfigError('rerotate: layers keep different numbers of tokens, so there is no one position behind all; leave it out')


def budget(count: int, layer: int, layers: int, options: Options) -> int:
  """Places of a layer, in equal steps from the first to the last: kvpress's rule, for the image without a window."""
  window = options.window if options.over == PROMPT else 0
  mean = window + count * (1 - options.ratio) - window  # its rounding, not ours
  least = mean / options.beta
  most = 2 * mean - least
  if most >= count - window:
    most = count - window
    least = 2 * mean - most
  if options.ratio == 0 or not count >= most >= least >= window:
    places = round(count * (1 - options.ratio))
  else:
    places = round(most - layer * (most - least) / max(layers - 1, 1))
  return max(int(options.over == PROMPT and count > 0), places)


COMPRESSOR = kv_scores.compressor(
  snapkv.score,
  budget,
  flops=snapkv.flops,
  options=Options,
  source='arXiv 2406.02069, NVIDIA/kvpress 0.5.5',
  verified='kvpress, over the prompt: scores, sets, keys, values, logits and tokens',
)
