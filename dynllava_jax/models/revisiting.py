"""Where generated tokens choose among a stage's image tokens (`methods.revisit`): weights, scores, and what becomes of the cache.

Axes: B batch, T new tokens, S sequence, M candidates, D width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax import cache as kv
from dynllava_jax import methods
from dynllava_jax.config import LlamaConfig, RelevanceConfig, Stage
from dynllava_jax.methods import Rows, revisit
from dynllava_jax.models.layers import partitioned
from dynllava_jax.models.llama import LINEAR_INIT, Llama
from dynllava_jax.models.reduction import State
from dynllava_jax.ops import layout
from dynllava_jax.ops.rope import apply_rope, rope_angles
from dynllava_jax.ops.visibility import Visible


class Relevance(nn.Module):
  """The weights of a learned score function."""

  cfg: RelevanceConfig
  width: int

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    """Matrices by name, as `Revisit.weights` has them."""
    shapes = methods.get(self.cfg.score, 'revisit').weights(self.width, self.cfg)
    return {name: self.param(name, partitioned(LINEAR_INIT, 'embed', None), shape) for name, shape in shapes.items()}


@dataclasses.dataclass(frozen=True)
class Chooser:
  """How the generated tokens of stage `index` choose.

  Attributes:
    piece, options: of the stage; count: k.
    llama: the decoder, whose first layer of the stage `attention` asks.
    weights: of a learned score, {} for none; relevance: their shape.
  """

  index: int
  piece: revisit.Revisit
  options: Any
  count: int
  llama: Llama
  weights: dict[str, jax.Array]
  relevance: RelevanceConfig | None

  @property
  def each_layer(self) -> bool:
    """Whether layers choose for themselves, inside the stage."""
    return getattr(self.options, 'each_layer', False)

  def _rotate(self, rotary: jax.Array):
    cfg: LlamaConfig = self.llama.cfg
    heads = self.relevance.num_heads
    angles = rope_angles(rotary, self.relevance.width // heads, cfg.rope_theta, cfg.rope_scaling)
    return lambda x: apply_rope(x.reshape(*x.shape[:2], heads, -1), *angles).reshape(x.shape)

  def keys(self, x: jax.Array, rotary: jax.Array) -> jax.Array | None:
    """What candidates float[B, M, D] at int32[B, M] are scored by, [B, M, E]; None if the cache has it anyway."""
    return self.piece.keys and self.piece.keys(revisit.normed(x), self._rotate(rotary), self.weights)

  def scores(self, x: jax.Array, rotary: jax.Array, keys: jax.Array) -> jax.Array:
    """float32[B, T, M] of rows float[B, T, D] at int32[B, T]."""
    if self.piece.queries is None:
      return self.piece.score(*self.llama.entering_projections(self.index, x, rotary, 'q'), keys, {}, None)
    rotate = self._rotate(rotary)
    return self.piece.score(self.piece.queries(revisit.normed(x), rotate, self.weights), keys, self.weights, rotate)

  def scores_in_place(self, x: jax.Array, rotary: jax.Array, rows: Rows) -> jax.Array:
    """float32[B, S, M] of all rows float[B, S, D] of a sequence that holds its image."""
    image, places = (layout.split_rows(a, rows.image_start, rows.num_image)[1] for a in (x, rotary))
    keys = self.keys(image, places)
    if keys is None:
      (keys,) = self.llama.entering_projections(self.index, image, places, 'k')
    return self.scores(x, rotary, keys)

  def visible(self, x: jax.Array, rotary: jax.Array, rows: Rows, generated: jax.Array) -> Visible:
    """What rows of a sequence see, without a cache; bool[B, S] `generated` are those that choose."""
    if self.each_layer:
      return Visible(image_start=rows.image_start)
    index = revisit.choose(self.scores_in_place(x, rotary, rows), self.count)
    return Visible(revisit.seen(index, rows.num_image) | ~generated[..., None], rows.image_start)

  def candidates(self, of_layers: jax.Array, x: jax.Array, rotary: jax.Array, rows: Rows) -> kv.Candidates:
    """What a prompt float[B, S, D] that enters the stage leaves for later; layers gave float[L, B, M, 2, K, H] `of_layers`."""
    image, places = (layout.split_rows(a, rows.image_start, rows.num_image)[1] for a in (x, rotary))
    return kv.Candidates(jnp.moveaxis(of_layers, 0, 2), self.keys(image, places), rows.image_start >= 0)

  def look(self, x: jax.Array, rotary: jax.Array, held: kv.Candidates) -> jax.Array | None:
    """Which candidates generated tokens float[B, 1, D] see, int32[B, k]; None where each layer chooses for itself."""
    if self.each_layer:
      return None
    keys = held.kv[:, :, 0, 0] if held.keys is None else held.keys
    return revisit.choose(self.scores(x, rotary, keys), self.count)[:, 0]


def chooser(index: int, stage: Stage, num_image: int, llama: Llama, relevance: Relevance | None) -> Chooser | None:
  """Of a stage, in a run of `num_image` image tokens; None if its generated tokens see all image tokens."""
  if stage.revisit is None:
    return None
  piece, options = methods.bound(stage.revisit, 'revisit')
  learned = piece.keys is not None
  weights = relevance() if learned else {}
  return Chooser(index, piece, options, options.count(num_image), llama, weights, relevance.cfg if learned else None)


def view(
  choosing: Chooser | None, state: State, image_start: jax.Array, answer_start: jax.Array, until: jax.Array | None
) -> dict[str, Any]:
  """`visible` and `generated` of `Llama.run_stage` for a stage without a cache.

  Args:
    choosing: how its generated tokens choose, if they do.
    state: what enters it; image_start: int32[B]; answer_start: int32[B], position of the first generated token.
    until: int32[B, S], by position in the full sequence, the last position that sees a token; None if a gate has dropped none.
  """
  visible, more = None, {}
  if choosing:
    generated, rows = state.positions >= answer_start[:, None], state.rows(image_start)
    visible = choosing.visible(state.x, state.rotary, rows, generated)
    more = dict(generated=generated) if choosing.each_layer else {}
  if until is not None:
    last = layout.gather_rows(until, state.positions)
    visible = dataclasses.replace(visible or Visible(), positions=state.positions, until=last)
  return dict(visible=visible, **more)
