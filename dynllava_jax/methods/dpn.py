"""Dynamic Pyramid Network (arXiv 2503.20322): between stages the grid of image tokens is max-pooled, and weighed by a router.

`Stage(start=8, selector='dpn', image_tokens=144, options=dict(kernel=2))`. In front of some layers a router looks at the hidden
state of a router token, which ends the user's turn, and gives each kernel (1, 2 or 4, no overlap) a probability; what was pooled is
multiplied by that of the kernel used, unpooled tokens (kernel 1) too. A stage list is a route; a row is run by its own, that of the
most likely kernels. Positions are numbered anew. The authors take the mean over the router tokens of all turns, of
which later ones know the answer to earlier questions; here the first one counts.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import ConfigError, PyramidConfig, Stage
from dynllava_jax.config.parsing import require
from dynllava_jax.methods.base import Chosen, Selector, SelectorInputs

FEWEST = 16  # a grid of fewer tokens is left alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How a grid is pooled.

  Attributes:
    kernel: side of the square that becomes one token.
    ceil: whether the last rows and columns that do not fill a square are a token too; the authors leave them out.
  """

  kernel: int
  ceil: bool = False

  def __post_init__(self):
    require(self.kernel >= 1, f'kernel is {self.kernel}, expected 1 or more')

  def pooled_side(self, side: int) -> int:
    """Tokens along a side of what is left of a square grid."""
    return -(-side // self.kernel) if self.ceil else side // self.kernel


def side_of(tokens: int) -> int:
  """Of a square grid; ConfigError if there are not as many tokens as a square has."""
  side = math.isqrt(tokens)
  require(side * side == tokens, f'dpn: {tokens} image tokens are no square grid')
  return side


def pool(image: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
  """The largest number of each square, channel by channel.

  Args:
    image: float[B, P, D], a square grid row by row.
    options: how it is pooled.

  Returns:
    (float[B, M, D], int32[M] the first token of each square).
  """
  batch, tokens, width = image.shape
  side, kernel = side_of(tokens), options.kernel
  small = options.pooled_side(side)
  grid = image.reshape(batch, side, side, width)
  more = max(small * kernel - side, 0)
  grid = jnp.pad(grid, [(0, 0), (0, more), (0, more), (0, 0)], constant_values=-jnp.inf)[:, : small * kernel, : small * kernel]
  squares = grid.reshape(batch, small, kernel, small, kernel, width).max((2, 4))
  places = jnp.arange(small, dtype=jnp.int32) * kernel
  return squares.reshape(batch, -1, width), (places[:, None] * side + places).reshape(-1)


def select(inputs: SelectorInputs, budget: int, options: Options) -> Chosen:
  """All tokens go on, pooled and weighed; ConfigError unless `budget` is what the kernel leaves."""
  vectors, first = pool(inputs.image_hidden, options)
  if len(first) != budget:
    raise ConfigError(
      f'dpn: kernel {options.kernel} leaves {len(first)} of {inputs.image_hidden.shape[1]} image tokens, not {budget}'
    )
  kernels, probabilities = inputs.routes()
  if options.kernel not in kernels:
    raise ConfigError(f'dpn: the router knows the kernels {list(kernels)}, the stage asks for {options.kernel}')
  weight = probabilities[:, kernels.index(options.kernel), None, None].astype(vectors.dtype)
  index = jnp.broadcast_to(first, vectors.shape[:2])
  return Chosen(index=index, vectors=vectors * weight, details={'routes': probabilities})


SELECTOR = Selector(
  select=select,
  renumbers=lambda options: True,
  training='gathers',
  options=Options,
  source='arXiv 2503.20322, github.com/aihao2000/DPN-LLaVA',
  verified="the authors' code: routes, probabilities, lengths and positions per layer, logits, tokens",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedOptions:
  """`ceil` as in `Options`."""

  ceil: bool = False


def refuse(inputs: SelectorInputs, budget: int, options: RoutedOptions) -> Chosen:
  """A program has one route."""
  raise ConfigError('dpn_routed: is for training, where each row has its own route; run a route of dpn stages')


ROUTED = Selector(
  select=refuse,
  training='routes',
  options=RoutedOptions,
  source='arXiv 2503.20322, github.com/aihao2000/DPN-LLaVA',
  verified="the authors' code: draws, labels, logits, losses, gradients of a training step",
)


def route_stages(cfg: PyramidConfig, image: int, route: Sequence[int], ceil: bool = False) -> tuple[Stage, ...]:
  """The stage list of a route.

  Args:
    cfg: the routers; image: tokens that enter the decoder.
    route: the kernel in front of each of the layers that have a router; 0 where nothing is pooled or weighed.
    ceil: as in `Options`.
  """
  stages, side = [Stage()], side_of(image)
  for layer, kernel in zip(cfg.layers, route, strict=True):
    if kernel:
      side = Options(kernel=kernel, ceil=ceil).pooled_side(side)
      options = {'kernel': kernel} | ({'ceil': True} if ceil else {})
      stages.append(Stage(start=layer, selector='dpn', image_tokens=side * side, options=options))
  return tuple(stages)


def routes_of(
  cfg: PyramidConfig,
  image: int,
  has_image: Sequence[bool],
  probe: Callable[[tuple[int, ...], list[int]], Sequence[np.ndarray]],
) -> list[tuple[int, ...]]:
  """The route of each row, decided on the host layer by layer; rows that agree so far are asked together.

  Args:
    cfg, image: as in `route_stages`.
    has_image: of each row; one without is the same by any route, and goes with most of the others.
    probe: (route, row numbers) -> of each layer that has a router float[B, E] of these rows, run by that route; only the layer
      behind what is decided is looked at.
  """
  routes: dict[int, tuple[int, ...]] = {row: () for row, there in enumerate(has_image) if there}
  for depth, kernels in enumerate(cfg.kernels):
    for done in sorted(set(routes.values())):
      mine = [row for row, route in routes.items() if route == done]
      left = route_stages(cfg, image, (*done, *[0] * (len(cfg.layers) - depth)))[-1].image_tokens or image
      if left < FEWEST:
        chosen = [0] * len(mine)
      else:
        probabilities = probe((*done, *[1] * (len(cfg.layers) - depth)), mine)[depth]
        chosen = [kernels[i] for i in np.argmax(probabilities, -1)]
      routes |= {row: (*done, kernel) for row, kernel in zip(mine, chosen, strict=True)}
  found = list(routes.values()) or [(0,) * len(cfg.layers)]
  most = max(found, key=found.count)
  return [routes.get(row, most) for row in range(len(has_image))]
