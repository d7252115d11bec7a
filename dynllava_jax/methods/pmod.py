"""p-MoD (arXiv 2412.04449): from some depth on every layer has a router, and the deeper it is the fewer image tokens pass.

`Stage(start=8, layers=Piece('pmod'))`. With g = 0.2 tanh(score) + 1, a token that passes gets g times what the MLP adds (what the
attention adds is not weighed), and one that does not is multiplied by g. The authors rank by g, in which text has 0.8 and may take
an image token's place where tanh saturates; here the score itself ranks. Their schedule ends at layer 31 whatever the depth; here
at the last layer.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import ConfigError
from dynllava_jax.methods.base import LayerKind
from dynllava_jax.methods.routing import MLP, Routing

FALLS = {  # of how deep a layer lies, 0 to 1
  'shiftedcos': lambda depth: math.cos(math.pi * depth) / 2,
  'shiftedlinear': lambda depth: 0.5 - depth,
}
SCHEDULES = (*FALLS, 'constant')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Which layers, and how many tokens pass.

  Attributes:
    schedule: how the share falls with depth; 'constant' has `factor` of them in `layers`.
    factor: the mean share.
    most: layers with a larger share are ordinary ones; least: no share is smaller.
    layers: decoder layers with a router; only for 'constant'.
    gain, centre: g = gain tanh(score) + centre.
  """

  schedule: str = 'shiftedcos'
  factor: float = 0.5
  most: float = 0.85
  least: float = 0.15
  layers: tuple[int, ...] = ()
  gain: float = 0.2
  centre: float = 1.0

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ConfigError(f'schedule is {self.schedule!r}, expected one of {", ".join(SCHEDULES)}')
    for name in ('factor', 'most', 'least'):
      if not 0 < getattr(self, name) <= 1:
        raise ConfigError(f'{name} is {getattr(self, name)}, expected a share in (0, 1]')
    if bool(self.layers) != (self.schedule == 'constant'):
      raise ConfigError(f'layers are {self.layers} with schedule {self.schedule!r}; they go with constant, and with nothing else')
    if min(self.layers, default=0) < 0:
      raise ConfigError(f'layers are {self.layers}, expected layers counted from 0')


def ratio(layer: int, layers: int, options: Options) -> float | None:
  """Share of the image tokens that pass a layer; None for an ordinary one."""
  if options.schedule == 'constant':
    return options.factor if layer in options.layers else None
  share = FALLS[options.schedule](layer / max(layers - 1, 1)) + options.factor
  return max(share, options.least) if share <= options.most else None


def routed(layers: int, options: Options) -> tuple[bool, ...]:
  """Per decoder layer, whether it has a router."""
  return tuple(ratio(layer, layers, options) is not None for layer in range(layers))


def quota(layer: int, layers: int, image: int, options: Options) -> int:
  """Tokens that pass: the product is made in float32, as in the authors' code, and cut off."""
  return int(np.float32(image) * np.float32(ratio(layer, layers, options)))


LAYERS = LayerKind(
  routing=Routing(
    layers=routed,
    quota=quota,
    weight=lambda score, options: options.gain * jnp.tanh(score) + options.centre,
    scales=MLP,
    scales_waiting=True,
    start=0.0,
  ),
  training='gathers',
  options=Options,
  source='arXiv 2412.04449, MCG-NJU/p-MoD at 459f6df',
  verified="the authors' code: schedule, scores, choices, streams, caches, logits, tokens, later turns, training step",
)
