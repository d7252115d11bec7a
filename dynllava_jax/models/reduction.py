"""A sequence on its way through the stages: what it is made of, and how a selector's choice makes the next one of it.

Identity and rotary position of a row are two things: where it stands in the full sequence, and by what its queries and keys are
rotated. A stage that renumbers changes the second alone.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax import methods
from dynllava_jax.config import Stage
from dynllava_jax.methods import Chosen, Rows
from dynllava_jax.models.layer_types import Queries
from dynllava_jax.ops import layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Judgement:
  """The gate's view of generated tokens: bool `keep` and float32 `margin` (keep minus drop logit).

  `left`: int32[B, S], the stage behind which each of a sequence's tokens left, in an uncached run with exits.
  `looked`: of each stage whose generated tokens choose among its image tokens, int32[B, k] those of a token that was fed.
  """

  keep: jax.Array
  margin: jax.Array
  looked: tuple[jax.Array | None, ...] = ()
  left: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What reaches a stage.

  Attributes:
    x: float[B, S, D].
    positions: int32[B, S], places in the full sequence. Of a merged row that of a token that it stands for.
    rotary: int32[B, S], rotary positions.
    length: int32[B], real rows.
    image_index: int32[B, P'], which image tokens are still in it, in the order of their rows.
    judgement: of the whole sequence's tokens.
    unmerged: int32[B, N], as `layout.unmerged_rows` has it, of a decoder that attends over all patches; `rotary` is then of N
      places. None otherwise.
    shift: int32[B], how much earlier than its place the next token is rotated; None as long as no stage has renumbered.
  """

  x: jax.Array
  positions: jax.Array
  rotary: jax.Array
  length: jax.Array
  image_index: jax.Array
  judgement: Judgement
  shift: jax.Array | None = None
  unmerged: jax.Array | None = None

  @property
  def places(self) -> jax.Array:
    """int32[B], real places that the layers attend over: as many as there are rows, unless these are merged ones."""
    return self.length if self.unmerged is None else self.length - self.shift

  def rows(self, image_start: jax.Array) -> Rows:
    """Where text and image stand in it; text before the image never goes, so the image starts where it did."""
    return Rows(self.length, image_start, self.image_index)


def start(x: jax.Array, length: jax.Array, num_image: int) -> State:
  """The full sequence float[B, S, D] with `num_image` image tokens."""
  batch, size = x.shape[:2]
  every = jnp.broadcast_to(jnp.arange(num_image, dtype=jnp.int32), (batch, num_image))
  nothing_judged = Judgement(jnp.ones((batch, size), bool), jnp.full((batch, size), jnp.inf, jnp.float32))
  positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (batch, size))
  return State(x, positions, positions, length, every, nothing_judged)


def unmerge(state: State, image_start: jax.Array, group: jax.Array) -> State:
  """The full sequence again, for the attention alone: `group` int32[B, P] is, for each patch, the image token that holds it."""
  num_image = state.image_index.shape[1]
  rows = layout.unmerged_rows(image_start, group, num_image, state.x.shape[1])
  rotary = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32), rows.shape)
  later = jnp.where(image_start >= 0, group.shape[1] - num_image, 0)
  return dataclasses.replace(state, rotary=rotary, unmerged=rows, shift=-later)


def query_weights(
  stages: tuple[Stage, ...], x: jax.Array, prompt_length: jax.Array, image_start: jax.Array, num_image: int
) -> dict[int, jax.Array | None]:
  """For each stage whose selector ranks by attention, float32[B, S] weights of the rows that count, None for the last one's.

  `x`: float[B, S, D], embedded; prompt_length, image_start: int32[B], of the full sequence with `num_image` image tokens.
  """
  weights = {}
  for i, stage in enumerate(stages):
    selector, options = methods.selector_of(stage)
    if selector.attention:
      rows = start(x, prompt_length, num_image).rows(image_start)
      weights[i] = selector.query_weight(x, rows, options) if selector.query_weight else None
  return weights


def ranking_queries(state: State, image_start: jax.Array, prompt_length: jax.Array, weight: jax.Array | None) -> Queries:
  """The query rows whose attention a selector ranks by.

  Args:
    state: the sequence, which may hold generated tokens behind the prompt.
    image_start: int32[B]; prompt_length: int32[B], of the full sequence.
    weight: float32[B, S0], of each place of the full sequence, text only; None for the last prompt token alone.
  """
  in_prompt = (state.positions < prompt_length[:, None]) & state.rows(image_start).is_real(state.x.shape[1])
  if weight is None:
    last = jnp.maximum(in_prompt.sum(-1, dtype=jnp.int32) - 1, 0)[:, None]
    return Queries(last, jnp.ones(last.shape, jnp.float32))
  reached = state.image_index.shape[1]
  text = layout.text_places(image_start, reached, state.x.shape[1] - reached)
  weight = layout.gather_rows(weight, layout.gather_rows(state.positions, text))
  return Queries(text, jnp.where(layout.gather_rows(in_prompt, text), weight, 0.0))


def kept_rows(state: State, index: jax.Array, image_start: jax.Array, num_image: int) -> jax.Array:
  """bool[B, S]: all text, and the image rows int32[B, M] of `index`; `num_image` is that of the full sequence."""
  return layout.keep_mask(state.positions, state.length, image_start, num_image, layout.gather_rows(state.image_index, index))


def choose(state: State, chosen: Chosen, keep: jax.Array, image_start: jax.Array) -> tuple[State, jax.Array]:
  """Names the image tokens that go on, and puts merged rows into the sequence.

  Args:
    state: the sequence; chosen: what a selector made of its image rows.
    keep: bool[B, S], rows that go on; image_start: int32[B].

  Returns:
    (the sequence, longer by the rows of `chosen.more`; `keep` of it).
  """
  reached, image_index = state.image_index.shape[1], layout.gather_rows(state.image_index, chosen.index)
  x = state.x
  if chosen.vectors is not None:
    place = jnp.where(image_start[:, None] >= 0, image_start[:, None] + chosen.index, x.shape[1])
    x = x.at[jnp.arange(x.shape[0])[:, None], place].set(chosen.vectors.astype(x.dtype), mode='drop')
  if chosen.more is None:
    return dataclasses.replace(state, x=x, image_index=image_index), keep
  size, (batch, count) = x.shape[1], chosen.more.shape[:2]
  has_image = (image_start >= 0)[:, None]
  places = jnp.arange(size + count)[None]
  beyond = jnp.where(has_image, places - image_start[:, None] - reached, -1)  # 0 at the first row behind the image
  is_new = (beyond >= 0) & (beyond < count)
  old = jnp.clip(jnp.where(beyond >= count, places - count, places), 0, size - 1)
  new = jnp.clip(beyond, 0, count - 1)

  def insert(rows, inserted):
    mask = is_new.reshape(is_new.shape + (1,) * (rows.ndim - 2))
    return jnp.where(mask, layout.gather_rows(inserted, new), layout.gather_rows(rows, old))

  stands_for = jnp.maximum(image_start, 0)[:, None] + chosen.more_index
  keep = insert(keep, jnp.ones((batch, count), bool)) & (has_image | (places < size))
  state = dataclasses.replace(
    state,
    x=insert(x, chosen.more.astype(x.dtype)),
    positions=insert(state.positions, layout.gather_rows(state.positions, stands_for)),
    rotary=insert(state.rotary, layout.gather_rows(state.rotary, stands_for)),
    length=state.length + jnp.where(has_image[:, 0], count, 0),
    image_index=jnp.concatenate([image_index, layout.gather_rows(state.image_index, chosen.more_index)], 1),
  )
  return state, keep


def compact(state: State, keep: jax.Array, size: int) -> State:
  """The rows that go on, `size` at most, in order."""
  index, length = layout.compact(keep, size)
  x, positions = layout.gather_rows(state.x, index), layout.gather_rows(state.positions, index)
  rotary = positions if state.rotary is state.positions else layout.gather_rows(state.rotary, index)
  return dataclasses.replace(state, x=x, positions=positions, rotary=rotary, length=length)


def renumbered(state: State, prompt_length: jax.Array) -> State:
  """Rotary positions 0, 1, 2, ... for what is left of the prompt, and going on from there for what was generated behind it.

  A generated token counts even where a gate has dropped it, as it does in cached decoding.
  """
  in_prompt = (state.positions < prompt_length[:, None]) & (jnp.arange(state.x.shape[1]) < state.length[:, None])
  shift = prompt_length - in_prompt.sum(-1, dtype=jnp.int32)
  places = jnp.arange(state.x.shape[1], dtype=jnp.int32)
  rotary = jnp.where(in_prompt, places, state.positions - shift[:, None])
  return dataclasses.replace(state, rotary=rotary, shift=shift)
