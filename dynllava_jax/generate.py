"""Generation: batched, static-shaped, in one jitted loop or token by token.

A `Generator` holds the compiled programs of one (model, reducer, stage list, generation length). Every program is
compiled once per shape of its batch; a second batch of the same shapes compiles nothing. Whole answers, streams and uncached ones
pad what they are given to a bounded number of shapes (`buckets`); who goes turn by turn (`start`, `step`, ...) chooses the shapes.
Axes: B batch, T = max_new_tokens, V vocabulary, M kept image tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import arguments, buckets, compilation, methods
from dynllava_jax.arrangement import STACKED, Arrangement, best_for, of_run, with_int8_cache
from dynllava_jax.cache import Cache, CacheSpec
from dynllava_jax.config import LoraConfig, ModelConfig, Piece, Stage
from dynllava_jax.generated import PAD, Forced, Generated, Turn
from dynllava_jax.methods.exits import QUESTION, decided_per
from dynllava_jax.models import gating
from dynllava_jax.models.dynllava import DynLlava, Judgement, Prompt
from dynllava_jax.models.lora import as_variables
from dynllava_jax.models.params import cut_params
from dynllava_jax.models.stacks import stacks_of
from dynllava_jax.ops.images import normalize
from dynllava_jax.ops.layout import gather_rows
from dynllava_jax.sampling import GREEDY, Sampling, are_numbers, sample


class Generator:
  """Compiled generation for one checkpoint, reducer and stage list."""

  def __init__(
    self,
    cfg: ModelConfig,
    stages: tuple[Stage, ...],
    params: dict[str, Any],
    *,
    max_new_tokens: int,
    eos_id: int | None,
    later_tokens: int = 0,
    given_tokens: int = 0,
    sampling: Sampling = GREEDY,
    dtype: Any = jnp.float32,
    reducer: Piece | None = None,
    lora: LoraConfig | None = None,
    arrangement: Arrangement | None = None,
    int8_cache: bool = False,
  ):
    """Checks the arguments.

    Args:
      cfg, stages: the model and how it is run.
      params: what `checkpoint.load_params(path, stages=stages)` gives, or the checkpoint form, which is cut here: for several
        stages every layer is then held twice as long as the caller holds `params`.
      max_new_tokens: most tokens generated, over all turns of a conversation.
      eos_id: token at which a row stops; None never stops.
      later_tokens: room for the user turns after the first.
      given_tokens: room for the answers given to `force`, over all turns, where they are longer than `max_new_tokens`.
      sampling: how tokens are drawn.
      dtype: of computation and cache.
      reducer: what makes fewer image tokens of the tower's patches.
      lora: of `params` that hold adapters beside the decoder, as a training run has them.
      arrangement: how parameters in checkpoint form are laid out; what is fastest on their devices if None.
      int8_cache: hold keys and values as int8 (`ops.int8`). Weights are int8 where `params` have their `scales`.

    Raises:
      ValueError: an argument that generation cannot work with; names it.
    """
    compilation.keep()
    room = dict(max_new_tokens=max_new_tokens, later_tokens=later_tokens, given_tokens=given_tokens)
    arguments.check_generator(cfg, params, eos_id=eos_id, dtype=dtype, **room)
    if not isinstance(stages, tuple) or not all(isinstance(s, Stage) for s in stages):
      raise ValueError(f'stages: {stages!r}, expected a tuple of Stage')
    if not isinstance(sampling, Sampling):
      raise ValueError(f'sampling: {sampling!r}, expected a Sampling')
    if reducer is not None and not isinstance(reducer, Piece):
      raise ValueError(f"reducer: {reducer!r}, expected a Piece such as Piece('fastervlm'), or None")
    if lora is not None and not isinstance(lora, LoraConfig):
      raise ValueError(f'lora: {lora!r}, expected a LoraConfig, or None')
    methods.check_run(cfg, stages, reducer)
    arguments.check_params(cfg, stages, params, lora is not None)
    methods.check_tail(cfg, reducer, 'vision_tail' in params)
    self._num_image = methods.num_image_tokens(cfg, reducer)
    if params['llama'].keys() & {'layers', 'layers_0'}:
      arrangement = arrangement or (STACKED if lora else best_for(params))
      params = cut_params(params, stages, arrangement)
    else:
      arrangement = of_run(params)
      arguments.check_cut(params['llama'], stages, cfg.llama.num_layers)
    lies = with_int8_cache(arrangement) if int8_cache else arrangement
    self.model = DynLlava(cfg, stages, dtype, reducer=reducer, arrangement=lies)
    self.params = params
    self.max_new_tokens = max_new_tokens
    self.eos_id, self.sampling, self._lora = eos_id, sampling, lora
    self.spec = CacheSpec(**room)
    self._prefill = jax.jit(self.start_impl)
    self._extend = jax.jit(self._extend_impl, static_argnames='judge', donate_argnames='cache')
    self._decode = jax.jit(self._decode_impl, donate_argnames='cache')
    self._uncached = jax.jit(self._uncached_impl)
    self._force = jax.jit(self._force_impl, donate_argnames='cache')

  def __call__(self, prompt: Prompt, pixels: jax.Array) -> Generated:
    """Answers a batch, with a cache. `pixels`: uint8[B, R, R, 3]; rows without image take any."""
    padded, pixels = self._padded(prompt, pixels)
    turn, kept_image = self._prefill(self.params, padded, pixels)
    return buckets.first_rows(self.decode(turn, padded.seed, kept_image)[0], prompt.length.shape[0])

  def start(self, prompt: Prompt, pixels: jax.Array) -> tuple[Turn, tuple[jax.Array, ...]]:
    """Runs the prompts: (turn, `Generated.kept_image`). ValueError if they do not fit the model or each other."""
    self._check_prompt(prompt, pixels)
    return self._prefill(self.params, prompt, pixels)

  def decode(self, turn: Turn, seed: jax.Array, kept_image: tuple[jax.Array, ...] = ()) -> tuple[Generated, Cache]:
    """Generates to the end of every row in one compiled loop. Consumes `turn`. ValueError for arguments of other shapes."""
    arguments.array('seed', seed, (arguments.check_turn(turn),), np.integer)
    turn = self.without_idle(turn)
    return self._decode(self.params, turn.logits, cache=turn.cache, seed=seed, kept_image=kept_image)

  def without_idle(self, turn: Turn) -> Turn:
    """The same without the caches of stages that no row needs any more, in a run whose questions leave early: they are freed."""
    if decided_per(self.model.stages) != QUESTION:
      return turn
    deepest = int(jnp.max(turn.cache.left.stage))
    needed = sum(stack.stage <= deepest for stack in stacks_of(self.model.stages, self.model.cfg.llama.num_layers))
    return Turn(dataclasses.replace(turn.cache, stages=turn.cache.stages[:needed]), turn.logits)

  def step(self, turn: Turn, tokens: jax.Array, active: jax.Array) -> tuple[Turn, Judgement]:
    """Feeds one generated token int32[B] per row; rows with `active` False stay as they are. Consumes `turn`.

    Raises:
      ValueError: arguments of other shapes, no such token, or `max_new_tokens` are used up.
    """
    batch = arguments.check_turn(turn)
    fed = arguments.array('active', active, (batch,), np.bool_)
    values = arguments.array('tokens', tokens, (batch,), np.integer)
    arguments.within('tokens', values, 0, self.model.cfg.llama.vocab_size - 1)
    arguments.check_room(turn.cache, None if fed is None else fed.astype(np.int32), 'raise max_new_tokens')
    count = active.astype(jnp.int32)
    told = self.told(turn.logits, jnp.asarray(tokens))
    (turn, _), judgement = self._extend(self.params, tokens[:, None], count, cache=turn.cache, judge=True, told=told)
    return turn, judgement

  def append(self, turn: Turn, chunk: jax.Array, count: jax.Array) -> tuple[Turn, jax.Array]:
    """Appends a later user turn, int32[B, T] right-padded with `count[b]` real tokens. Consumes `turn`.

    Begin the chunk with the last generated token, which has not been fed.

    Returns:
      (turn, logits float32[B, T, V] of all its positions).

    Raises:
      ValueError: the chunk is longer than the room that prompt and earlier turns left, or does not fit the batch.
    """
    batch = arguments.check_turn(turn)
    arguments.check_chunk('chunk', chunk, ('count', count), batch, self.model.cfg)
    for stage in turn.cache.stages:
      room = int(stage.later_room.min())
      if chunk.shape[1] > room:
        raise ValueError(
          f'the turn has {chunk.shape[1]} tokens, the cache has room for {room} more besides generated ones; raise later_tokens'
        )
    return self._extend(self.params, chunk, count, cache=turn.cache, judge=False)[0]

  def force(self, turn: Turn, tokens: jax.Array, length: jax.Array) -> tuple[Forced, Turn]:
    """Reads given answers int32[B, T], `length` int32[B] of them real, token by token through the gate. Consumes `turn`.

    As in generation the last token of a row is not fed. Rows of length 0 stay as they are.

    Raises:
      ValueError: the answers are longer than the room for them, or do not fit the batch.
    """
    batch = arguments.check_turn(turn)
    real = arguments.check_chunk('tokens', tokens, ('length', length), batch, self.model.cfg)
    arguments.check_room(turn.cache, None if real is None else np.maximum(real - 1, 0), 'raise given_tokens')
    return self._force(self.params, turn.logits, tokens, length, cache=turn.cache)

  def stream(self, prompt: Prompt, pixels: jax.Array) -> Iterator[np.ndarray]:
    """Yields int32[B] token by token, `PAD` for rows that have ended, until all have."""
    padded, pixels = self._padded(prompt, pixels)
    rows, prompt = prompt.length.shape[0], padded
    turn, _ = self._prefill(self.params, prompt, pixels)
    active = np.ones(prompt.length.shape[0], bool)
    for i in range(self.max_new_tokens):
      tokens = np.asarray(sample(turn.logits, self.sampling, prompt.seed, turn.cache.position))
      yield np.where(active, tokens, PAD)[:rows]
      if self.eos_id is not None:
        active = active & (tokens != self.eos_id)
      if not active.any() or i + 1 == self.max_new_tokens:
        return
      turn, _ = self.step(turn, jnp.asarray(tokens), jnp.asarray(active))

  def generate_uncached(self, prompt: Prompt, pixels: jax.Array) -> Generated:
    """As `__call__`, recomputing the whole sequence for every token; the same tokens, no cache memory."""
    padded = self._padded(prompt, pixels)
    return buckets.first_rows(self._uncached(self.params, *padded), prompt.length.shape[0])

  def _padded(self, prompt: Prompt, pixels: jax.Array) -> tuple[Prompt, jax.Array]:
    self._check_prompt(prompt, pixels)
    return buckets.pad_prompt(prompt, pixels, self._num_image)

  def _check_prompt(self, prompt: Prompt, pixels: jax.Array) -> None:
    arguments.check_prompt(prompt, pixels, self.model.cfg, self._num_image)

  def lowered(self, name: str, prompt: Prompt, pixels: jax.Array) -> Any:
    """A program of a batch, `prefill`, `decode` (which takes no `kept_image`) or `uncached`, to be compiled and called apart."""
    if name != 'decode':
      return {'prefill': self._prefill, 'uncached': self._uncached}[name].lower(self.params, prompt, pixels)
    turn, _ = jax.eval_shape(self.start_impl, self.params, prompt, pixels)
    return self._decode.lower(self.params, turn.logits, cache=turn.cache, seed=prompt.seed, kept_image=())

  def compilations(self) -> int:
    """Programs compiled so far."""
    return sum(f._cache_size() for f in (self._prefill, self._extend, self._decode, self._uncached, self._force))

  def fed(
    self, params: dict[str, Any], tokens: jax.Array, active: jax.Array, cache: Cache, told: jax.Array | None
  ) -> tuple[Turn, Judgement]:
    """As `step`, to be traced inside a compiled loop: nothing is checked, and `params` are an argument of that program.

    `told` is what `self.told` makes of the logits that the tokens were drawn from.
    """
    (turn, _), judgement = self._extend_impl(params, tokens[:, None], active.astype(jnp.int32), cache, True, told)
    return turn, judgement

  def told(self, logits: jax.Array, tokens: jax.Array) -> jax.Array | None:
    """What a gate may want to know of tokens int32[B] drawn from float32[B, V]: `Fed.told`; None if the run's does not."""
    index = self.model.gate_stage
    if index is None or not methods.get(self.model.stages[index].gate.name, 'gate').needs_told:
      return None
    log_prob = jax.nn.log_softmax(logits, -1)
    drawn = jnp.take_along_axis(log_prob, tokens[:, None], 1)[:, 0]
    return jnp.stack([-drawn, -jnp.where(jnp.isfinite(log_prob), jnp.exp(log_prob) * log_prob, 0).sum(-1)], -1)

  @property
  def judged_later(self) -> int:
    """How many tokens later the gate judges a token that is fed."""
    return gating.window(self.model, len(self.model.stages) - 1)

  def _apply(self, params, *args, method):
    return self.model.apply(as_variables(params, self._lora, self.model.stages, None), *args, method=method)

  def start_impl(self, params, prompt, pixels):
    image = self._apply(params, normalize(pixels, self.model.cfg.vision), prompt.question, method='reduce_images')
    hidden, traces, cache = self._apply(params, prompt, image.tokens, self.spec, image.group, method='prefill')
    last = jnp.take_along_axis(hidden, (traces[-1].length - 1)[:, None, None], 1, mode='clip')[:, 0]
    kept_image = tuple(t.kept_image for t in traces)
    if self.model.reducer is not None:
      kept_image = tuple(gather_rows(image.index, kept) for kept in kept_image)
    return Turn(cache, self._apply(params, last, method='logits')), kept_image

  def _extend_impl(self, params, tokens, count, cache, judge, told=None):
    hidden, cache, judgement = self._apply(params, tokens, count, cache, judge, told, method='extend')
    logits = self._apply(params, hidden, method='logits')
    last = jnp.take_along_axis(logits, jnp.maximum(count - 1, 0)[:, None, None], 1, mode='clip')[:, 0]
    return (Turn(cache, last), logits), judgement

  def _depth(self, cache: Cache) -> jax.Array | None:
    """int32[B], decoder layers behind which each row left; None in a run without exits."""
    return None if cache.left is None else self._ends()[cache.left.stage]

  def _ends(self) -> jax.Array:
    """int32[I], layers that lie in front of the end of each stage."""
    return jnp.asarray([s.start for s in self.model.stages[1:]] + [self.model.cfg.llama.num_layers])

  def _ended(self, tokens):
    return tokens == self.eos_id if self.eos_id is not None else jnp.zeros(tokens.shape, bool)

  def _has_room(self, cache: Cache) -> jax.Array:
    """bool[B]: `max_new_tokens`, which counts over all turns, is not used up (gated stages evict instead)."""
    room = [stage.generated < stage.budget for stage in cache.stages if not stage.gated]
    return functools.reduce(jnp.logical_and, room, jnp.ones(cache.position.shape, bool))

  def _decode_impl(self, params, logits, cache, seed, kept_image):
    batch = seed.shape[0]
    size, later = self.max_new_tokens, self.judged_later
    first = sample(logits, self.sampling, seed, cache.position)
    state = dict(
      i=jnp.int32(0),
      cache=cache,
      active=~self._ended(first) & self._has_room(cache),
      tokens=jnp.full((batch, size), PAD, jnp.int32).at[:, 0].set(first),
      length=jnp.ones(batch, jnp.int32),
      kept=jnp.ones((batch, size), bool),
      margin=jnp.full((batch, size), jnp.inf, jnp.float32),
      finite=are_numbers(logits),
      told=self.told(logits, first),
      layers=self._depth(cache),
    )
    if state['layers'] is not None:
      state['layers'] = jnp.zeros((batch, size), jnp.int32).at[:, 0].set(state['layers'])

    def feed(s):
      token, active = s['tokens'][:, s['i']], s['active']
      after, judgement = self.fed(params, token, active, s['cache'], s['told'])
      judged = active & (s['i'] >= later) if later else active
      new = jnp.where(active, sample(after.logits, self.sampling, seed, after.cache.position), PAD)
      return dict(
        i=s['i'] + 1,
        cache=after.cache,
        active=active & ~self._ended(new) & self._has_room(after.cache),
        tokens=s['tokens'].at[:, s['i'] + 1].set(new),
        length=s['length'] + active,
        kept=s['kept'].at[:, s['i'] - later].set(jnp.where(judged, judgement.keep, True)),
        margin=s['margin'].at[:, s['i'] - later].set(jnp.where(judged, judgement.margin, jnp.inf)),
        finite=s['finite'] & (~active | (are_numbers(after.logits) & ~jnp.isnan(judgement.margin))),
        told=self.told(after.logits, new),
        layers=None if s['layers'] is None else s['layers'].at[:, s['i'] + 1].set(jnp.where(active, self._depth(after.cache), 0)),
      )

    end = jax.lax.while_loop(lambda s: (s['i'] < size - 1) & s['active'].any(), feed, state)
    told = [end[name] for name in ('tokens', 'length', 'kept', 'margin')]
    return Generated(*told, kept_image, end['cache'].evicted, end['finite'], end['layers']), end['cache']

  def _force_impl(self, params, logits, tokens, length, cache):
    def feed(state, step):
      cache, logits = state
      i, token = step
      log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), token[:, None], 1)[:, 0]
      real, fed = i < length, i < length - 1
      after, judgement = self.fed(params, token, fed, cache, self.told(logits, token))
      out = jnp.where(real, log_prob, 0), real & (logits.argmax(-1) == token), jnp.where(fed, judgement.keep, True)
      return (after.cache, jnp.where(fed[:, None], after.logits, logits)), out

    steps = jnp.arange(tokens.shape[1]), tokens.T
    (cache, logits), (log_prob, best, kept) = jax.lax.scan(feed, (cache, logits), steps)
    later = self.judged_later
    kept = jnp.concatenate([kept[later:], jnp.ones_like(kept[:later])])
    return Forced(log_prob.T, best.T, kept.T, cache.evicted), Turn(cache, logits)

  def _uncached_impl(self, params, prompt, pixels):
    image = self._apply(params, normalize(pixels, self.model.cfg.vision), prompt.question, method='reduce_images')
    batch, slots = prompt.tokens.shape
    size = self.max_new_tokens
    rows = jnp.arange(batch)
    text_slots = slots - self.model.num_image + size
    full = functools.partial(self._apply, params, method='recompute')

    def forward(buffer, length, told):
      now = dataclasses.replace(prompt, tokens=buffer, length=length)
      hidden, judgement = full(now, image.tokens, prompt.length, text_slots, image.group, told)
      logits = self._apply(params, hidden, method='logits')
      token = sample(logits, self.sampling, prompt.seed, length)
      if told is not None:
        told = told.at[rows, length].set(self.told(logits, token), mode='drop')
      return token, judgement, are_numbers(logits), told

    buffer = jnp.pad(prompt.tokens, [(0, 0), (0, size)])
    told = self.told(jnp.zeros((batch, 1)), jnp.zeros(batch, jnp.int32))
    told = told if told is None else jnp.zeros((batch, slots + size, 2), jnp.float32)
    first, judgement, finite, told = forward(buffer, prompt.length, told)
    buffer = buffer.at[rows, prompt.length].set(first)
    state = (jnp.int32(1), buffer, prompt.length + 1, ~self._ended(first), judgement, finite, told)

    def feed(s):
      i, buffer, length, active, _, finite, told = s
      token, judgement, numbers, told = forward(buffer, length, told)
      buffer = buffer.at[rows, length].set(jnp.where(active, token, PAD))
      return i + 1, buffer, length + active, active & ~self._ended(token), judgement, finite & (numbers | ~active), told

    _, buffer, length, _, judgement, finite, _ = jax.lax.while_loop(lambda s: (s[0] < size) & s[3].any(), feed, state)
    answer = prompt.length[:, None] + jnp.arange(size)
    take = lambda x: jnp.take_along_axis(x, answer, 1, mode='clip')
    fed = jnp.arange(size) < (length - prompt.length - 1)[:, None]
    made, layers = jnp.arange(size) < (length - prompt.length)[:, None], None
    if judgement.left is not None:
      behind = jnp.take_along_axis(judgement.left, answer - 1, 1, mode='clip')
      layers = jnp.where(made, self._ends()[behind], 0)
    return Generated(
      jnp.where(made, take(buffer), PAD),
      length - prompt.length,
      jnp.where(fed, take(judgement.keep), True),
      jnp.where(fed, take(judgement.margin), jnp.inf),
      kept_image=(),
      evicted=jnp.zeros(batch, jnp.int32),
      finite=finite,
      layers=layers,
    )
