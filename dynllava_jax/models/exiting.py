"""Leaving the decoder early (`methods.exits`): a head that all depths share, who has left, and stages that nobody needs.

Axes: B batch, T positions, S sequence, D width, V vocabulary, I stages.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax import cache as kv
from dynllava_jax import methods
from dynllava_jax.config import LlamaConfig
from dynllava_jax.methods.exits import QUESTION, TOKEN, decided_per
from dynllava_jax.models.layer_types import LayerOutput
from dynllava_jax.models.layers import Dtype, partitioned
from dynllava_jax.models.llama import LINEAR_INIT, Llama, RMSNorm, head_logits
from dynllava_jax.models.reduction import State
from dynllava_jax.ops import layout

INSIDE = -1  # stage of a row that has not left


class ExitHead(nn.Module):
  """A final norm and an output matrix of its own."""

  cfg: LlamaConfig
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float[..., D] -> (the same normed, float[D, V]), as `Llama.output`."""
    normed = RMSNorm(self.cfg.rms_norm_eps, self.dtype, name='norm')(x)
    head = self.param('head', partitioned(LINEAR_INIT, 'embed', 'vocab'), (self.cfg.hidden_size, self.cfg.vocab_size))
    return normed, head


def as_final_head(params: dict[str, Any]) -> dict[str, Any]:
  """An exit head that says what norm and output matrix behind the last layer say; copies."""
  llama = params['llama']
  head = llama['head'] if 'head' in llama else llama['embedding'].T
  return jax.tree.map(jnp.copy, {'norm': llama['norm'], 'head': head})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Leaving:
  """Who has left so far.

  Attributes:
    hidden: float[B, T, D], with what; arbitrary for those inside.
    stage: int32[B, T], behind which stage, `INSIDE` for those that go on.
    value: float32[B, T, I], as in `cache.Left`.
    before: float32[B, T, V], what the exit head said at the end of the stage before; None where nobody compares with it.
  """

  hidden: jax.Array
  stage: jax.Array
  value: jax.Array
  before: jax.Array | None = None

  @property
  def gone(self) -> jax.Array:
    """bool[B, T]."""
    return self.stage != INSIDE

  def of_cache(self) -> kv.Left:
    """Of the one position that was asked."""
    return kv.Left(self.stage[:, 0], self.value[:, 0])


def begin(model: Any, hidden: jax.Array) -> Leaving:
  """Nobody has left; float[B, T, D] of the positions that may."""
  shape = hidden.shape[:2]
  return Leaving(hidden, jnp.full(shape, INSIDE), jnp.full((*shape, len(model.stages)), jnp.nan, jnp.float32))


def judge(model: Any, index: int, hidden: jax.Array, leaving: Leaving) -> Leaving:
  """Who leaves at the end of stage `index`, by float[B, T, D]; nothing is computed once all have left."""
  stages = model.stages
  own, options = methods.bound(stages[index].exit, 'exit')
  compared = index + 1 < len(stages) and stages[index + 1].exit and methods.get(stages[index + 1].exit.name, 'exit').compares
  here = None
  if own or compared:
    head, variables = model.exit_head.unbind()
    said = lambda: jax.nn.softmax(head_logits(*head.apply(variables, hidden)), -1)
    nothing = lambda: jnp.zeros((*hidden.shape[:2], model.cfg.llama.vocab_size), jnp.float32)
    here = jax.lax.cond(leaving.gone.all(), nothing, said)
  leaves, value = jnp.zeros(leaving.stage.shape, bool), leaving.value
  if own:
    measured = own.measure(here, leaving.before, options)
    value = value.at[..., index].set(jnp.where(leaving.gone, jnp.nan, measured))
    leaves = measured <= options.threshold
  if index + 1 == len(stages):
    leaves = jnp.ones(leaving.stage.shape, bool)
  leaves &= ~leaving.gone
  return Leaving(
    jnp.where(leaves[..., None], hidden, leaving.hidden), jnp.where(leaves, index, leaving.stage), value, here if compared else None
  )


def with_answers(x: jax.Array, last: jax.Array, leaving: Leaving) -> jax.Array:
  """float[B, S, D] with what each row left with at the positions int32[B]."""
  return x.at[jnp.arange(x.shape[0]), last].set(leaving.hidden[:, 0])


def run_stage(
  llama: Llama,
  index: int,
  x: jax.Array,
  positions: jax.Array,
  *,
  gone: jax.Array,
  needed: jax.Array | None = None,
  fill: bool = False,
  **more,
) -> tuple[jax.Array, tuple[LayerOutput, ...]]:
  """`Llama.run_stage` for those that go on; the state of bool[B] `gone` rows stays as it is.

  If nobody goes on no layer is run: keys and values are then zeros, or with `fill` made of the states, which is what a layer makes
  of a row that is gone beside others that are not.

  Args:
    llama, index, x, positions, more: as there; gone, and fill, which is static: see above.
    needed: bool[B], rows that count; all if None.
  """
  alone, variables = llama.unbind()
  run = lambda **how: alone.apply(variables, index, x, positions, **more, **how, method='run_stage')
  frozen = jnp.broadcast_to(gone[:, None], x.shape[:2])
  on = lambda: run(frozen=frozen)
  nothing = lambda: (x, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(on)[1]))

  def filled():  # what layers tell besides is of those that ran
    made, blank = run(keys_alone=True)[1], nothing()[1]
    return x, tuple(dataclasses.replace(b, k=m.k, v=m.v) for m, b in zip(made, blank))

  idle = gone if needed is None else gone | ~needed
  return jax.lax.cond(idle.all(), filled if fill else nothing, on)


class Everybody:
  """Any pass of a run without exits."""

  def view(self, *_: Any) -> dict[str, Any]:
    """What `DynLlava.run_layers` is told."""
    return {}

  def judge(self, *_: Any) -> None:
    """At the end of a stage."""

  def caches(self, index: int, active: jax.Array) -> jax.Array:
    """bool[B], those of bool[B] `active` rows whose tokens stage `index` caches."""
    return active

  def counts(self, index: int, count: jax.Array) -> jax.Array:
    """int32[B], of the `count` tokens of each row those that stage `index` caches."""
    return count

  def end(self, x: jax.Array, *_: Any) -> tuple[jax.Array, None]:
    """(what the pass made, nothing)."""
    return x, None


def prompted(model: Any, x: jax.Array) -> 'Everybody | Prompted':
  """The pass of a prompt float[B, S, D]."""
  return Prompted(model, x) if decided_per(model.stages) else Everybody()


def course(model: Any, *new: Any) -> 'Everybody | Course':
  """A pass of new tokens."""
  return Course(model, *new) if decided_per(model.stages) else Everybody()


def replay(model: Any, *sequence: Any) -> 'Everybody | Replay':
  """A pass without a cache."""
  return Replay(model, *sequence) if decided_per(model.stages) else Everybody()


class Prompted:
  """The pass of a prompt, which decides behind its last token."""

  def __init__(self, model: Any, x: jax.Array):
    """`x`: float[B, S, D], embedded."""
    self._model, self._leaving = model, begin(model, x[:, :1])

  def view(self) -> dict[str, jax.Array]:
    """What `DynLlava._run_stage` is told. Per token the whole prompt goes on: later tokens may need it."""
    return dict(gone=self._leaving.gone[:, 0]) if decided_per(self._model.stages) == QUESTION else {}

  def judge(self, index: int, state: State) -> None:
    """At the end of stage `index`, by what it made of the sequence."""
    self._leaving = judge(self._model, index, layout.gather_rows(state.x, state.length[:, None] - 1), self._leaving)

  def end(self, x: jax.Array, length: jax.Array) -> tuple[jax.Array, kv.Left]:
    """(float[B, S', D], of which int32[B] are real, with what the last token left with; where rows left)."""
    return with_answers(x, length - 1, self._leaving), self._leaving.of_cache()


class Course:
  """A pass of new tokens through the stages of a run with exits, on top of a cache."""

  def __init__(self, model: Any, x: jax.Array, count: jax.Array, cache: kv.Cache, judge: bool):
    """`x`: float[B, T, D], embedded; the rest as in `DynLlava.extend`."""
    self._model, self._judge, self._count, self._old = model, judge, count, cache.left
    self._per = decided_per(model.stages)
    self._last = jnp.maximum(count - 1, 0)
    self._leaving = begin(model, layout.gather_rows(x, self._last[:, None]))

  def view(self, index: int) -> dict[str, Any]:
    """What `DynLlava.run_layers` is told of stage `index`. Tokens of a later turn all go on, where each token decides."""
    if self._per == QUESTION:
      return dict(gone=self._old.stage < index, needed=self._count > 0)
    return dict(gone=self._leaving.gone[:, 0], needed=self._count > 0, fill=True) if self._judge else {}

  def caches(self, index: int, active: jax.Array) -> jax.Array:
    """bool[B], those of bool[B] `active` rows whose tokens stage `index` caches: per question those that reach it."""
    return active & (self._old.stage >= index) if self._per == QUESTION else active

  def counts(self, index: int, count: jax.Array) -> jax.Array:
    """int32[B], of the `count` tokens of each row those that stage `index` caches."""
    return jnp.where(self.caches(index, count > 0), count, 0)

  def judge(self, index: int, x: jax.Array) -> None:
    """At the end of stage `index`, by float[B, T, D]."""
    if self._per == TOKEN:
      self._leaving = judge(self._model, index, layout.gather_rows(x, self._last[:, None]), self._leaving)

  def end(self, x: jax.Array) -> tuple[jax.Array, kv.Left]:
    """(float[B, T, D] with what the newest token left with, where rows left)."""
    if self._per == QUESTION:
      return x, self._old
    now, active = self._leaving.of_cache(), self._count > 0
    put = lambda new, old: jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    return with_answers(x, self._last, self._leaving), jax.tree.map(put, now, self._old)


class Replay:
  """The same for a whole sequence without a cache: everything is decided again, and comes out as it did."""

  def __init__(self, model: Any, x: jax.Array, length: jax.Array, answer_start: jax.Array):
    """`x`: float[B, S, D] of the full sequence; length, answer_start: int32[B]."""
    self._model, self._per = model, decided_per(model.stages)
    self._size, self._start, self._length = x.shape[1], answer_start, length
    self._leaving = begin(model, x if self._per == TOKEN else x[:, :1])

  def view(self, state: State) -> dict[str, jax.Array]:
    """What `DynLlava._run_stage` is told: who is frozen. The prompt is not, where each token decides for itself."""
    if self._per == QUESTION:
      return dict(gone=self._leaving.gone[:, 0])
    generated = jnp.arange(self._size) >= self._start[:, None]
    return dict(frozen=layout.gather_rows(self._leaving.gone & generated, state.positions))

  def judge(self, index: int, state: State) -> None:
    """At the end of stage `index`, by what it made of the sequence."""
    place = places(state, self._size)
    if self._per == QUESTION:
      place = jnp.take_along_axis(place, self._start[:, None] - 1, 1)
    self._leaving = judge(self._model, index, layout.gather_rows(state.x, place), self._leaving)

  def end(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float[B, D] of the newest token, int32[B, S], the stage behind which each left)."""
    if self._per == QUESTION:
      return hidden, jnp.broadcast_to(self._leaving.stage, (hidden.shape[0], self._size))
    newest = jnp.maximum(self._length - 1, 0)[:, None]
    return layout.gather_rows(self._leaving.hidden, newest)[:, 0], self._leaving.stage


def places(state: State, size: int) -> jax.Array:
  """int32[B, S]: the row of each position of the full sequence, 0 for those that are no longer in it."""
  batch, reached = state.x.shape[:2]
  real = jnp.arange(reached) < state.length[:, None]
  rows = jnp.broadcast_to(jnp.arange(reached), state.positions.shape)
  nowhere = jnp.zeros((batch, size), jnp.int32)
  return nowhere.at[jnp.arange(batch)[:, None], jnp.where(real, state.positions, size)].set(rows, mode='drop')
