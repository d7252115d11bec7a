"""A decoder layer with a router: what passes it goes through as a shorter sequence, and comes back weighed (`methods.routing`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax import methods
from dynllava_jax.config import Stage
from dynllava_jax.methods import Rows
from dynllava_jax.methods.routing import LAYER, MLP, Routing
from dynllava_jax.models.layer_types import Context, LayerOutput
from dynllava_jax.ops import layout, routing

KERNEL, BIAS = 'routers/kernel', 'routers/bias'  # a layer's router, among what is scanned along
QUOTA = 'quota'  # scanned along too: how many tokens of a frame pass


def quota_per_frame(stage: Stage, layers: range, num_layers: int, image: int) -> list[int]:
  """Tokens of a frame that pass each of some layers of a stage with routers, of `image` tokens that reach it."""
  routing, options = methods.routing_of(stage)
  return [routing.passing(layer, num_layers, image, options) // routing.frames(options) for layer in layers]


@dataclasses.dataclass(frozen=True)
class Passing:
  """What passes one layer.

  Attributes:
    kind: the method; route: who passes.
    score: float32[B, P]; chosen: bool[B, P], those that pass.
    entered: float[B, S', D], the rows that pass as they enter.
    first: int32[B], free slots in front of the layer's keys, where layers of a stack hold different numbers; None for none.
  """

  kind: Routing
  route: routing.Route
  score: jax.Array
  chosen: jax.Array
  entered: jax.Array
  first: jax.Array | None

  @classmethod
  def of_layer(cls, stage: Stage, layers: range, num_layers: int, x: jax.Array, rows: Rows, flags: dict[str, Any]) -> 'Passing':
    """Asks the router.

    Args:
      stage, layers: the layer is one of this stack of a stage; num_layers: of the decoder.
      x: float[B, S, D], what enters it.
      rows: where text and image stand; flags: what is scanned along, its router among it.
    """
    kind, options = methods.routing_of(stage)
    frames, numbers = kind.frames(options), quota_per_frame(stage, layers, num_layers, rows.num_image)
    image = layout.take_image_rows(x, rows.image_start, rows.num_image).astype(jnp.float32)
    score = jnp.einsum('bpd,d->bp', image, flags[KERNEL].astype(jnp.float32), precision='highest')
    if BIAS in flags:
      score = score + flags[BIAS].astype(jnp.float32)
    quota, budget, first = numbers[0], max(numbers) * frames, None
    if len(set(numbers)) > 1:
      quota = flags[QUOTA]
      first = jnp.where(rows.image_start >= 0, budget - quota * frames, 0)
    chosen = routing.best(score, quota, frames)
    route = routing.route(chosen, kind.weight(score, options), rows.image_start, rows.length, x.shape[1], budget)
    return cls(kind, route, score, chosen, route.take(x), first)

  def angles(self, context: Context) -> Context:
    """The rotary angles of the rows that pass, which keep their places."""
    return dataclasses.replace(context, cos=self.route.take(context.cos), sin=self.route.take(context.sin))

  def weigh_mlp(self, y: jax.Array) -> jax.Array:
    """What the MLP adds to the rows that pass, float[B, S', D]."""
    return self._weighed(y) if self.kind.scales == MLP else y

  def leave(self, whole: jax.Array, x: jax.Array, output: LayerOutput) -> tuple[jax.Array, LayerOutput]:
    """The sequence behind the layer, and what it gives to the cache.

    Args:
      whole: float[B, S, D], what entered the layer; x: float[B, S', D], what has passed.
      output: of the rows that passed.
    """
    if self.kind.scales == LAYER:
      weighed = self.entered + self._weighed(x - self.entered)
      x = jnp.where(self.route.take(self.route.is_image)[..., None], weighed, x)
    waited = whole * self.route.weight[..., None].astype(whole.dtype) if self.kind.scales_waiting else whole
    x = self.route.put_back(x, waited)
    k, v, length = output.k, output.v, self.route.length
    if self.first is not None:
      k, v, length = routing.right_aligned(k, self.first), routing.right_aligned(v, self.first), length + self.first
    num_image, image_start = self.score.shape[1], jnp.argmax(self.route.is_image, axis=-1)
    image = layout.take_image_rows(x, image_start, num_image)
    details = {'router': self.score, 'passes': self.chosen, 'image_hidden': image}
    return x, dataclasses.replace(output, k=k, v=v, length=length, first=self.first, details=output.details | details)

  def _weighed(self, x: jax.Array) -> jax.Array:
    return x * self.route.take(self.route.weight)[..., None].astype(x.dtype)
