"""VideoLLM-MoD (arXiv 2408.16730): in every second layer a router lets the best image tokens of each frame pass, by its score.

`Stage(layers=Piece('videollm_mod', dict(keep=0.2)))`. A token that passes gets its score times the change that the layer makes, so
a negative score inverts it; the others are left as they are. No code was published, and of the paper its section on the method
could not be read: the rule is that of mixture of depths (arXiv 2404.02258), which the paper builds on, for image tokens alone.
"""

import dataclasses

from dynllava_jax.config import ConfigError
from dynllava_jax.methods.base import LayerKind
from dynllava_jax.methods.routing import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Which layers, and how many tokens pass.

  Attributes:
    layers: decoder layers with a router; () for every second one, 1, 3, 5, ...
    keep: share of a frame's tokens that pass, cut off.
    frames: equal parts of the image tokens that are frames of a film, in their order.
  """

  layers: tuple[int, ...] = ()
  keep: float = 0.2
  frames: int = 1

  def __post_init__(self):
    if min(self.layers, default=0) < 0:
      raise ConfigError(f'layers are {self.layers}, expected layers counted from 0')
    if not 0 < self.keep <= 1:
      raise ConfigError(f'keep is {self.keep}, expected a share in (0, 1]')
    if self.frames < 1:
      raise ConfigError(f'frames is {self.frames}, expected 1 or more')


def routed(layers: int, options: Options) -> tuple[bool, ...]:
  """Per decoder layer, whether it has a router."""
  return tuple(i in options.layers if options.layers else i % 2 == 1 for i in range(layers))


def quota(layer: int, layers: int, image: int, options: Options) -> int:
  """Tokens of a frame that pass; ConfigError if the image cannot be divided into frames."""
  if image % options.frames:
    raise ConfigError(f'frames is {options.frames}, which does not divide the {image} image tokens')
  return int(image // options.frames * options.keep)


LAYERS = LayerKind(
  routing=Routing(layers=routed, quota=quota, frames=lambda options: options.frames),
  training='gathers',
  options=Options,
  source='arXiv 2408.16730; no code published, rule of arXiv 2404.02258',
  verified='an independent program: scores, choices, streams, caches, logits, tokens, training step, with one frame and with four',
)
