"""Mixture of depths over image tokens (after arXiv 2404.02258): in some layers a learned router lets only the best of them pass.

A router is one linear score of the stream that enters its layer, w.x (+ b). The best tokens and all text run through the layer as a
sequence of their own, at their places; the others come back behind it. Keys and values are of what passed, so the layer's cache
is smaller. What is decoded later passes every layer. What the score does besides ranking is the method's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dynllava_jax.config import ConfigError, ModelConfig, Stage

LAYER, MLP = 'layer', 'mlp'  # what the weight scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
  """What a `LayerKind` of this family does.

  Attributes:
    layers: (decoder layers, options) -> per decoder layer, whether it has a router.
    quota: (layer, decoder layers, image tokens that reach the stage, options) -> how many pass, of each frame.
    frames: options -> into how many equal parts the image tokens are divided, each with a quota of its own.
    weight: (score float32[...], options) -> weight float32[...] of an image token.
    scales: what the weight of a token that passes is for, the change that the whole `LAYER` makes or that of its `MLP`.
    scales_waiting: whether tokens that do not pass are multiplied by their weight.
    start: how large the scores of new routers are, about, where the stream's numbers are about 1.
  """

  layers: Callable[[int, Any], tuple[bool, ...]]
  quota: Callable[[int, int, int, Any], int]
  frames: Callable[[Any], int] = lambda options: 1
  weight: Callable[[jax.Array, Any], jax.Array] = lambda score, options: score
  scales: str = LAYER
  scales_waiting: bool = False
  start: float = 1.0

  def passing(self, layer: int, layers: int, image: int, options: Any) -> int:
    """Of `image` tokens that reach the stage, how many pass `layer` of a decoder of `layers`."""
    if not self.layers(layers, options)[layer]:
      return image
    return self.quota(layer, layers, image, options) * self.frames(options)


def check_routing(
  model: ModelConfig, stage: Stage, routing: Routing | None, options: Any, mine: range, image: int, ranks_next: bool
) -> None:
  """Raises ConfigError unless the routers of a stage have image tokens to choose from, and nothing needs those that wait.

  Args:
    model: what is run.
    stage, routing, options: the stage, and the routers of its layers and their settings, whose `layers` names some; None without.
    mine: its layers.
    image: image tokens that reach the stage.
    ranks_next: whether the next stage's selector looks at the attention of its last layer.
  """
  if routing is None:
    return
  routers, layers = model.routers, model.llama.num_layers
  at = f'stage at layer {stage.start}: {stage.layers.name}'
  if routers is None or routers.method != stage.layers.name:
    held = 'none' if routers is None else f'those of {routers.method}'
    raise ConfigError(f'{at}: needs routers, and this model has {held}; train them with configs/methods.py:{stage.layers.name}')
  lacking = [i for i in mine if routers.layers and routing.layers(layers, options)[i] and i not in routers.layers]
  if lacking:
    raise ConfigError(f'{at}: layers {lacking} would need a router, and only {list(routers.layers)} have one')
  if outside := [layer for layer in options.layers if layer not in mine]:
    raise ConfigError(f'{at} names layers {outside}, the stage has {mine.start} to {mine.stop - 1}')
  routed = [layer for layer in mine if routing.layers(layers, options)[layer]]
  if not routed:
    raise ConfigError(f'{at}: none of the layers {mine.start} to {mine.stop - 1} of the stage would have a router; leave it out')
  try:
    fewest = min(routing.passing(layer, layers, image, options) for layer in routed)
  except ConfigError as e:
    raise ConfigError(f'{at}: {e}') from None
  if not fewest:
    raise ConfigError(f'{at}: lets none of {image} image tokens pass in some layer; let a larger share pass')
  if stage.compressor or stage.revisit:
    other = (stage.compressor or stage.revisit).name
    raise ConfigError(f'{at}: its layers hold different image tokens, and {other} needs all of them; use one of the two')
  if ranks_next and mine[-1] in routed:
    raise ConfigError(
      f'{at}: the next stage ranks by the attention of layer {mine[-1]}, which not all image tokens pass; start it elsewhere'
    )
