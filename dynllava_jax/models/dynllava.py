"""Dynamic-LLaVA: vision tower, projector, staged decoder and selectors put together (arXiv 2412.00876).

The methods of `DynLlava` are the ways to run it: `prefill` and `extend` (with a KV cache), `recompute`
(without), `train_forward` (as a method is trained). All shapes are static: they follow from the batch, the
text bucket and the stage list. Axes: B batch, S sequence, T new tokens, P image tokens, M kept ones, D width.
"""

import dataclasses
import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax import cache as kv
from dynllava_jax import methods, pruned_cache
from dynllava_jax.arrangement import STACKED, Arrangement
from dynllava_jax.config import DENSE, ConfigError, ModelConfig, Objective, Piece, Stage, judges_instructions
from dynllava_jax.config.groups import groups_of
from dynllava_jax.methods.exits import decided_per
from dynllava_jax.models import exiting, experts, filling, gating, memory, reduction, revisiting, trained
from dynllava_jax.models.batch import Prompt, StageTrace, TrainInputs, TrainOutput, instruct_start_of
from dynllava_jax.models.clip import VisionTower, next_block
from dynllava_jax.models.clip_text import with_question
from dynllava_jax.models.groups import modules_of
from dynllava_jax.models.layer_types import LayerOutput
from dynllava_jax.models.layers import Dtype
from dynllava_jax.models.llama import Llama, head_logits
from dynllava_jax.models.projector import Projector, TokenPacker
from dynllava_jax.models.pyramid import first_router
from dynllava_jax.models.reduction import Judgement
from dynllava_jax.models.revisiting import Chooser
from dynllava_jax.ops import layout

OBJECTIVE = Objective()


class DynLlava(nn.Module):
  """The model for one reducer and stage list. `params` come from `cut_params(checkpoint, stages, arrangement)`."""

  cfg: ModelConfig
  stages: tuple[Stage, ...] = DENSE
  dtype: Dtype = jnp.float32
  remat: str = 'none'
  reducer: Piece | None = None
  arrangement: Arrangement = STACKED

  def setup(self):
    methods.check_run(self.cfg, self.stages, self.reducer)
    self.vision = VisionTower(self.cfg.vision, self.dtype, methods.tower_needs(self.cfg, self.reducer), self.arrangement.tower)
    self.projector = (TokenPacker if self.cfg.packer else Projector)(self.cfg, self.dtype)
    self.llama = Llama(self.cfg.llama, self.stages, self.dtype, self.remat, self.arrangement, self.num_image)
    for name, module in modules_of(self.cfg, self.dtype, self.stages).items():
      setattr(self, name, module)

  def run_layers(
    self,
    index: int,
    x: jax.Array,
    positions: jax.Array,
    drawn: jax.Array | None = None,
    gone: jax.Array | None = None,
    **how: Any,
  ) -> tuple[jax.Array, tuple[LayerOutput, ...]]:
    """`Llama.run_stage`, with what methods keep per layer; `drawn` float32[B, layers, S, E] is the noise of experts in training.

    For those that are not bool[B] `gone`, if given, `exiting.run_stage`.
    """
    weights = {}
    if drawn is not None:
      layers = self.llama.layers_of(index)
      weights[experts.NOISE] = drawn[:, layers.start : layers.stop, : x.shape[1]].swapaxes(0, 1)
    for name, group in groups_of(self.cfg).items():
      if group.layered and group.asked(self.stages):
        weights |= {f'{name}/{leaf}': rows for leaf, rows in getattr(self, name)()[index].items()}
    run = self.llama.run_stage if gone is None else functools.partial(exiting.run_stage, self.llama, gone=gone)
    return run(index, x, positions, weights=weights, **how)

  @property
  def num_image(self) -> int:
    """Image tokens that the language model sees."""
    return methods.num_image_tokens(self.cfg, self.reducer)

  def vision_features(self, pixels: jax.Array) -> jax.Array:
    """Normalised pixels float[B, R, R, 3] -> tower features float[B, P, vision width]."""
    return self.vision(pixels).features

  def look(self, pixels: jax.Array, question: jax.Array | None = None) -> methods.TowerOutput:
    """Normalised pixels float[B, R, R, 3] -> what the tower gives to the reducer; `question` as in `Prompt`."""
    tower, needs, params = self.vision(pixels), methods.tower_needs(self.cfg, self.reducer), self.variables['params']
    methods.check_tail(self.cfg, self.reducer, 'vision_tail' in params)
    if needs.question:
      return with_question(tower, params, self.cfg, question)
    if not needs.next_block:
      return tower
    above = jax.tree.map(lambda w: w[0], params['vision_tail']['layers'])
    query, keys = next_block(above, jnp.concatenate([tower.class_feature[:, None], tower.features], 1), self.cfg.vision)
    return dataclasses.replace(tower, next_query=query, next_keys=keys)

  def reduce_images(self, pixels: jax.Array, question: jax.Array | None = None) -> methods.Reduced:
    """Normalised pixels float[B, R, R, 3] -> image tokens float[B, P, D], and the patch that each stands for.

    Without a reducer tokens are numbered row by row of their own grid. `question` as in `Prompt`.
    """
    tower = self.look(pixels, question)
    if self.reducer is None:
      tokens = self.projector(tower if self.cfg.packer else tower.features)
      return methods.Reduced(tokens, jnp.broadcast_to(jnp.arange(self.num_image), tokens.shape[:2]))
    kind, options = methods.bound(self.reducer, 'reducer')
    reduced = kind.reduce(tower, self.projector, options)
    return memory.compressed(self, reduced, options) if kind.compresses else reduced

  def encode_images(self, pixels: jax.Array) -> jax.Array:
    """The image tokens alone: float[B, P, D]."""
    return self.reduce_images(pixels).tokens

  def logits(self, hidden: jax.Array) -> jax.Array:
    """float[..., D] -> float32[..., V], by the exit head in a run with exits."""
    return head_logits(*self.exit_head(hidden)) if decided_per(self.stages) else self.llama.logits(hidden)

  def prefill(self, prompt: Prompt, image: jax.Array, spec: kv.CacheSpec, group: jax.Array | None = None):
    """Runs a prompt and fills a cache.

    Args:
      prompt: the batch, S = text bucket + P.
      image, group: `tokens` float[B, M, D] and `group` of `reduce_images`; rows without image take any.
      spec: what the cache must have room for.

    Returns:
      (hidden float[B, S', D] of what remains, one `StageTrace` per stage, `Cache`).
    """
    x = layout.merge_image(self.llama.embed(prompt.tokens), image.astype(self.dtype), prompt.image_start)
    state = self.start(x, prompt, group)
    weights = reduction.query_weights(self.stages, x, prompt.length, prompt.image_start, self.num_image)
    caches, traces, attention, judging = [], [], None, gating.start(self, x.shape[0], spec)
    leaving = exiting.prompted(self, x)
    for i in range(len(self.stages)):
      entry = state.x
      state, seen, details = self.reduce(i, state, prompt, attention, weights, answer_start=None)
      stream = state.x
      room = kv.room_behind(*self.gate(i), spec)
      state, attention, outputs = self._run_stage(i, state, prompt, prompt.length, weights, room, **leaving.view())
      leaving.judge(i, state)
      kept = state.image_index, state.positions, state.rotary, state.length
      traces.append(StageTrace(entry, stream, *kept, seen, details, tuple(out.details for out in outputs), state.unmerged))
      caches += [filling.stage_cache(self, i, state, stream, out, prompt, spec) for out in outputs]
    x, left = leaving.end(state.x, state.length)
    return x, tuple(traces), kv.Cache(tuple(caches), prompt.length, judging, left)

  def extend(self, tokens: jax.Array, count: jax.Array, cache: kv.Cache, judge: bool, told: jax.Array | None = None):
    """Runs new tokens on top of a cache.

    A chunk of a later user turn is appended as it is (`judge=False`), but where instructions are judged: there the gated stages
    keep what their predictor keeps and the last token, and the whole chunk sees all of itself. A generated token (T = 1,
    `judge=True`) attends to itself and the cache, and stays in the gated stages only if it is kept.

    Args:
      tokens: int32[B, T], right-padded; count: int32[B], real ones, 0 for rows that have ended.
      cache: consumed; donate it.
      judge: static; told: float32[B, 2], `Fed.told` of generated tokens, if the run's gate looks at it.

    Returns:
      (hidden float[B, T, D], new cache, `Judgement` with [B] entries, of chunks with [B, T]).
    """
    if judge and tokens.shape[1] != 1:
      raise ValueError(f'only single tokens are judged, got {tokens.shape[1]} at once')
    batch, length = tokens.shape
    active = count > 0
    shape = (batch,) if judge else (batch, length)
    keep, margin = jnp.ones(shape, bool), jnp.full(shape, kv.NEVER_EVICTED, jnp.float32)
    x = self.llama.embed(tokens)
    steps = jnp.arange(length)
    positions = cache.position[:, None] + steps
    last = steps == count[:, None] - 1
    new, looked, judging = [], [], cache.gate
    held = iter(cache.stages)
    leaving = exiting.course(self, x, count, cache, judge)
    for i, stage in enumerate(self.stages):
      stacks = list(itertools.islice(held, len(self.llama.stacks_in(i))))
      if not stacks:  # nobody needs the rest
        break
      selector = methods.get(stage.selector)
      if judge and i == self.gate_stage:
        keep, margin, judging = gating.feed(self, x[:, 0], tokens[:, 0], told, judging, active)
      elif judge and selector.text_margin and stage.gate is None:
        margin = selector.text_margin(x[:, 0], self.text_predictor)
        keep = keep & (margin > 0)
      elif not judge and judges_instructions((stage,)):
        margin = selector.text_margin(x, self.instruct_predictor)
        keep = keep & ((margin > 0) | last)
      rotary = kv.rotary_positions(stacks[0], positions)
      view = {}
      if judge and (choosing := self.chooser_of(i)):
        looked.append(choosing.look(x, rotary, stacks[0].candidates))
        view = dict(chosen=looked[-1], generated=jnp.ones(tokens.shape, bool) if choosing.each_layer else None)
      if isinstance(stacks[0], pruned_cache.PrunedCache):
        view = dict(count=count)
      x, outputs = self.run_layers(i, x, rotary, cache=stacks, **view, **leaving.view(i))
      leaving.judge(i, x)
      number = cache.gate and cache.gate.fed
      for old, out in zip(stacks, outputs):
        if out.ballot is not None:
          new.append(pruned_cache.append(old, x, out.k, out.v, out.ballot, cache.position, count, judge))
          continue
        chunk = kv.read_for(old, x), out.k, out.v
        if judge:
          new.append(kv.append_judged(*chunk, keep, margin, leaving.caches(i, active), number))
        else:
          new.append(kv.append_chunk(*chunk, leaving.counts(i, count), keep))
    x, left = leaving.end(x)
    return x, kv.Cache(tuple(new), cache.position + count, judging, left), Judgement(keep, margin, tuple(looked))

  def recompute(
    self,
    prompt: Prompt,
    image: jax.Array,
    answer_start: jax.Array,
    text_slots: int,
    group: jax.Array | None = None,
    told: jax.Array | None = None,
  ):
    """One full forward over prompt and generated tokens: decoding without a cache.

    The kept set is the gate's: a generated token stays where `keep > drop`, the newest is always present.
    So cached and uncached decoding agree (the authors' uncached path ranks by another quantity).

    Args:
      prompt: prompt and generated tokens; `length` counts both.
      image: float[B, P, D].
      answer_start: int32[B], position of the first generated token.
      text_slots: static; positions kept for text in reduced stages (text bucket + max_new_tokens); group: as in `prefill`.
      told: float32[B, S, 2], `Fed.told` by position, if the run's gate looks at it.

    Returns:
      (hidden float[B, D] at the newest position, `Judgement` with [B, S] entries, that of the newest token
      being of use to later calls only; keep is True outside the generated tokens).
    """
    x = layout.merge_image(self.llama.embed(prompt.tokens), image.astype(self.dtype), prompt.image_start)
    for stage in self.stages:
      if stage.compressor is not None:
        raise ConfigError(f'stage at layer {stage.start}: {stage.compressor.name} shrinks a cache, and uncached decoding has none')
    state = self.start(x, prompt, group)
    weights = reduction.query_weights(self.stages, x, answer_start, prompt.image_start, self.num_image)
    attention, until = None, None
    leaving = exiting.replay(self, x, prompt.length, answer_start)
    for i in range(len(self.stages)):
      state, _, _ = self.reduce(i, state, prompt, attention, weights, answer_start=answer_start, text_slots=text_slots)
      if i == self.gate_stage:
        state, until = gating.replay(self, state, prompt, answer_start, told)
      view = revisiting.view(self.chooser_of(i), state, prompt.image_start, answer_start, until)
      view |= leaving.view(state)
      state, attention, _ = self._run_stage(i, state, prompt, answer_start, weights, **view)
      leaving.judge(i, state)
    newest = jnp.maximum(state.length - 1, 0)[:, None]
    hidden, left = leaving.end(layout.gather_rows(state.x, newest)[:, 0])
    return hidden, dataclasses.replace(state.judgement, left=left)

  def train_forward(self, prompt: Prompt, image: jax.Array, inputs: TrainInputs, objective: Objective = OBJECTIVE) -> TrainOutput:
    """Forward of training, as the run's method has it: masks in place of gathers, cuts, choices, or nothing of it.

    Args:
      prompt: the batch; image: float[B, P, D].
      inputs: answers, labels, and what was drawn.
      objective: settings of the methods.
    """
    x = layout.merge_image(self.llama.embed(prompt.tokens), image.astype(self.dtype), prompt.image_start)
    return trained.parts(self.cfg, self.stages)[0].forward(self, x, prompt, inputs, objective)

  def chooser_of(self, index: int) -> Chooser | None:
    """How the generated tokens of stage `index` choose among its image tokens; None if they see all."""
    return revisiting.chooser(index, self.stages[index], self.num_image, self.llama, self.relevance)

  @property
  def gate_stage(self) -> int | None:
    """The stage with a gate of its own."""
    return next((i for i, stage in enumerate(self.stages) if stage.gate is not None), None)

  def gate(self, index: int) -> tuple[bool, float]:
    """Whether stage `index` holds only kept generated tokens, and its share of room for them."""
    judging = [s for s in self.stages[: index + 1] if methods.judges(s)]
    return (True, judging[-1].text_keep_budget) if judging else (False, 1.0)

  def start(self, x: jax.Array, prompt: Prompt, group: jax.Array | None) -> reduction.State:
    """What reaches the first stage."""
    state = reduction.start(x, prompt.length, self.num_image)
    if not methods.unmerged_tokens(self.cfg, self.reducer):
      return state
    if group is None:
      raise ValueError(f'group: None, but {self.reducer.name} unmerges; pass `reduce_images(...).group`')
    return reduction.unmerge(state, prompt.image_start, group)

  def _run_stage(
    self,
    index: int,
    state: reduction.State,
    prompt: Prompt,
    prompt_length: jax.Array,
    weights: dict[int, jax.Array | None],
    room: int = 0,
    **view: Any,
  ) -> tuple[reduction.State, jax.Array | None, tuple[LayerOutput, ...]]:
    """Runs a stage's layers, and what its pieces and the next stage's selector make them do besides.

    The second of the result is the attention that the selector looks at, None if it does not.

    `room`, and of `view` `visible`, `generated` and `frozen`, as in `Context`; `gone` as in `run_layers`.
    """
    stage, queries = self.stages[index], None
    ranks_next = index + 1 < len(self.stages) and methods.selector_of(self.stages[index + 1])[0].attention == 'previous'
    if ranks_next:
      queries = reduction.ranking_queries(state, prompt.image_start, prompt_length, weights[index + 1])
    rows = state.rows(prompt.image_start) if ranks_next or stage.layers or stage.compressor or stage.revisit else None
    behind = prompt_length if state.shift is None else prompt_length - state.shift
    more = dict(rows=rows, queries=queries, next_position=behind, room=room, unmerged=state.unmerged, **view)
    x, outputs = self.run_layers(index, state.x, state.rotary, **more)
    last = outputs[-1].attention
    return dataclasses.replace(state, x=x), None if last is None else last[-1], outputs

  def routes(self, layer: int, state: reduction.State, prompt: Prompt) -> tuple[tuple[int, ...], jax.Array]:
    """(kernels, float32[B, E] how likely each is) of the pooling router in front of a layer."""
    cfg = self.cfg.dpn
    places = jnp.where(jnp.arange(state.x.shape[1]) < state.length[:, None], state.positions, -1)
    hidden = first_router(state.x, places, prompt, cfg.router_id, self.num_image)
    return cfg.kernels[cfg.layers.index(layer)], self.dpn(hidden)[layer]

  def reduce(
    self,
    index: int,
    state: reduction.State,
    prompt: Prompt,
    attention: jax.Array | None,
    weights: dict[int, jax.Array | None],
    answer_start: jax.Array | None,
    text_slots: int | None = None,
  ) -> tuple[reduction.State, jax.Array | None, dict[str, jax.Array]]:
    """Applies a stage's selector to the sequence that reaches it: (what goes on, the attention it ranked by, its details).

    With `answer_start` (no cache) earlier generated tokens are judged too, and `text_slots` is the room
    for text; in a prefill everything but image tokens and what is rejected of an instruction stays.
    """
    stage = self.stages[index]
    if stage.selector == 'all':
      return state, None, {}
    selector, options = methods.selector_of(stage)
    reached = state.image_index.shape[1]
    budget = stage.kept_image_tokens(self.num_image)
    prompt_length = prompt.length if answer_start is None else answer_start
    if selector.attention == 'entering':
      queries = reduction.ranking_queries(state, prompt.image_start, prompt_length, weights[index])
      rows = state.rows(prompt.image_start)
      attention = self.llama.entering_attention(index, state.x, state.rotary, rows, queries)
    chosen = selector.select(
      methods.SelectorInputs(
        image_hidden=layout.take_image_rows(state.x, prompt.image_start, reached),
        seed=prompt.seed,
        image_predictor=self.image_predictor,
        text_predictor=self.text_predictor,
        attention=attention if selector.attention else None,
        routes=None if self.dpn is None else functools.partial(self.routes, stage.start, state, prompt),
      ),
      budget,
      options,
    )
    keep = reduction.kept_rows(state, chosen.index, prompt.image_start, self.num_image)
    if judges_instructions((stage,)):
      margin = selector.text_margin(state.x, self.instruct_predictor)
      judged = (state.positions >= instruct_start_of(prompt)[:, None]) & (state.positions < prompt_length[:, None] - 1)
      keep = keep & (~judged | (margin > 0))
    more = 0 if chosen.more is None else chosen.more.shape[1]
    if answer_start is None:
      size = state.x.shape[1] - reached + budget + more
    else:
      size = text_slots + budget + more
      if selector.text_margin and stage.gate is None:
        margin = selector.text_margin(state.x, self.text_predictor)
        generated = (state.positions >= answer_start[:, None]) & (state.positions < prompt.length[:, None])
        newest = state.positions == prompt.length[:, None] - 1
        keep = keep & (~generated | newest | (margin > 0))
        rows = jnp.arange(keep.shape[0])[:, None]
        old = state.judgement
        judgement = reduction.Judgement(
          old.keep.at[rows, state.positions].set(~generated | (margin > 0), unique_indices=True),
          old.margin.at[rows, state.positions].set(jnp.where(generated, margin, jnp.inf), unique_indices=True),
        )
        state = dataclasses.replace(state, judgement=judgement)
    state = reduction.compact(*reduction.choose(state, chosen, keep, prompt.image_start), size)
    if selector.renumbers(options):
      state = reduction.renumbered(state, prompt_length)
    return state, attention if selector.attention else None, chosen.details
