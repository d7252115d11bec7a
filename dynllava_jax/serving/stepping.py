"""Some tokens of every row of a batch per dispatch, each row with settings and an end of its own: what `engine` and `chat` run.

Arithmetic and rules are those of `Generator.decode`: a token is drawn, and fed unless its row ends with it. Rows that have ended
stay as they are until a new prompt takes their place, so one program serves a batch whose members come and go.
Axes: B rows, N rows of a prompt batch, T tokens of a dispatch, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import cache as kv
from dynllava_jax.compaction import Survivors, compacted
from dynllava_jax.generate import Generator
from dynllava_jax.generated import PAD, Turn
from dynllava_jax.models.dynllava import Prompt
from dynllava_jax.sampling import Settings, are_numbers, draw, penalised
from dynllava_jax.serving.request import Options


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wishes:
  """`Options` of rows as arrays: settings, penalty float32[B], seed uint32[B], and left int32[B], tokens a row may still get."""

  settings: Settings
  penalty: jax.Array
  seed: jax.Array
  left: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Running:
  """Rows that are being answered.

  Attributes:
    turn: cache and logits of the token to come.
    wishes: see `Wishes`.
    active: bool[B], rows that have not ended.
    seen: bool[B, V], tokens that prompt and answer hold.
  """

  turn: Turn
  wishes: Wishes
  active: jax.Array
  seen: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emitted:
  """What one dispatch gave, [B, T] each: the first `count[b]` of a row are real.

  Attributes:
    tokens: int32; count: int32[B].
    log_prob: float32, of the model itself.
    kept: whether the gate kept the token that it judged by then, `Generator.judged_later` tokens before; True for what was not fed.
    evicted: int32, given up by a full cache after this token, over all turns.
    finite: bool[B], whether all logits and margins were numbers.
    active: bool[B], rows that go on.
  """

  tokens: jax.Array
  count: jax.Array
  log_prob: jax.Array
  kept: jax.Array
  evicted: jax.Array
  finite: jax.Array
  active: jax.Array


def wishes(options: Sequence[Options], room: Sequence[int]) -> Wishes:
  """Options of rows, `room` tokens at most for each."""
  column = lambda name, dtype: np.asarray([getattr(o, name) for o in options], dtype)
  settings = Settings(column('temperature', np.float32), column('top_k', np.int32), column('top_p', np.float32))
  left = np.asarray([r if o.max_tokens is None else min(o.max_tokens, r) for o, r in zip(options, room)], np.int32)
  return Wishes(settings, column('repetition_penalty', np.float32), column('seed', np.uint32), left)


def of_tokens(kept: Sequence[bool], later: int) -> list[bool]:
  """`Emitted.kept` of an answer, as it was told, to what was decided of each of its tokens; those not judged yet are held."""
  return [*kept[later:], *[True] * min(later, len(kept))]


class Stepper:
  """The compiled programs that run the rows of one `Generator`, whose own way of drawing tokens is not used."""

  def __init__(self, generator: Generator):
    self.generator = generator
    self._begin = jax.jit(self._begin_impl)
    self._join = jax.jit(self._join_impl, donate_argnames='running')
    self._advance = jax.jit(self._advance_impl, static_argnames='steps', donate_argnames='running')
    self._compact = jax.jit(self._compact_impl, donate_argnames='running')

  def begin(self, turn: Turn, prompt: Prompt, wanted: Wishes) -> Running:
    """A batch of prompts, just run, as rows that wait for their first token."""
    return self._begin(turn, prompt, wanted)

  def empty(self, prompt: Prompt, pixels: np.ndarray, rows: int) -> Running:
    """Rows without anything in them, with room for prompts as long as this one, a batch of one."""
    size = lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
    prompts = jax.tree.map(size, prompt)
    turn, _ = jax.eval_shape(self.generator.start_impl, self.generator.params, prompts, size(pixels))
    shapes = jax.eval_shape(self._begin_impl, turn, prompts, jax.tree.map(size, wishes([Options()], [1])))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def join(self, running: Running, turn: Turn, prompt: Prompt, wanted: Wishes, at: np.ndarray) -> Running:
    """The rows of `begin` in the places int32[N] `at`. Consumes `running`."""
    return self._join(turn, prompt, wanted, at, running=running)

  def advance(self, running: Running, halted: np.ndarray, steps: int) -> tuple[Running, Emitted]:
    """At most `steps` tokens for every row, none for those that bool[B] `halted` ends now. Consumes `running`."""
    return self._advance(self.generator.params, running=running, halted=halted, steps=steps)

  def compact(self, running: Running, survivors: Survivors) -> Running:
    """The same rows with only a part of their caches. Consumes `running`."""
    return self._compact(running=running, survivors=survivors)

  def compilations(self) -> int:
    """Programs compiled so far, the generator's included."""
    return self.generator.compilations() + sum(f._cache_size() for f in (self._begin, self._join, self._advance, self._compact))

  def _begin_impl(self, turn, prompt, wanted):
    places = jnp.arange(prompt.tokens.shape[1])
    start, num_image = prompt.image_start[:, None], self.generator.model.num_image
    in_image = (start >= 0) & (places >= start) & (places < start + num_image)
    text = (places < prompt.length[:, None]) & ~in_image
    rows, vocabulary = prompt.tokens.shape[0], turn.logits.shape[1]
    seen = jnp.zeros((rows, vocabulary), bool)
    seen = seen.at[jnp.arange(rows)[:, None], jnp.where(text, prompt.tokens, vocabulary)].set(True, mode='drop')
    return Running(turn, wanted, wanted.left > 0, seen)

  def _join_impl(self, turn, prompt, wanted, at, running):
    new = self._begin_impl(turn, prompt, wanted)
    put = lambda old, rows: old.at[at].set(rows, mode='drop', unique_indices=True)
    turn = Turn(kv.insert(running.turn.cache, new.turn.cache, at), put(running.turn.logits, new.turn.logits))
    rest = lambda r: (r.wishes, r.active, r.seen)
    return Running(turn, *jax.tree.map(put, rest(running), rest(new)))

  def _compact_impl(self, running, survivors):
    turn = dataclasses.replace(running.turn, cache=compacted(running.turn.cache, survivors, self.generator.model.cfg.llama))
    return dataclasses.replace(running, turn=turn)

  def _advance_impl(self, params, running, halted, steps):
    wanted = running.wishes
    batch = running.active.shape[0]
    rows = jnp.arange(batch)
    full = lambda value, dtype: jnp.full((batch, steps), value, dtype)
    out = Emitted(
      tokens=full(PAD, jnp.int32),
      count=jnp.zeros(batch, jnp.int32),
      log_prob=full(0, jnp.float32),
      kept=full(True, bool),
      evicted=full(0, jnp.int32),
      finite=jnp.ones(batch, bool),
      active=running.active & ~halted,
    )

    def feed(state):
      i, turn, seen, left, out = state
      active, logits = out.active, turn.logits
      token = draw(penalised(logits, seen, wanted.penalty), wanted.settings, wanted.seed, turn.cache.position)
      log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), token[:, None], 1)[:, 0]
      left = left - active
      goes_on = active & (left > 0)
      if self.generator.eos_id is not None:
        goes_on &= token != self.generator.eos_id
      after, judgement = self.generator.fed(params, token, goes_on, turn.cache, self.generator.told(logits, token))
      here = lambda old, new: old.at[:, i].set(jnp.where(active, new, old[:, i]))
      numbers = are_numbers(logits) & ~(goes_on & jnp.isnan(judgement.margin))
      out = Emitted(
        tokens=here(out.tokens, token),
        count=out.count + active,
        log_prob=here(out.log_prob, log_prob),
        kept=here(out.kept, judgement.keep | ~goes_on),
        evicted=here(out.evicted, after.cache.evicted),
        finite=out.finite & (numbers | ~active),
        active=goes_on,
      )
      seen = seen.at[rows, token].set(seen[rows, token] | active)
      return i + 1, Turn(after.cache, jnp.where(goes_on[:, None], after.logits, logits)), seen, left, out

    state = (jnp.int32(0), running.turn, running.seen, wanted.left, out)
    _, turn, seen, left, out = jax.lax.while_loop(lambda s: (s[0] < steps) & s[4].active.any(), feed, state)
    return Running(turn, dataclasses.replace(wanted, left=left), out.active, seen), out
