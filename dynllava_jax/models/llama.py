"""LLaMA decoder (arXiv 2302.13971), cut into stages.

Axes: B batch, T query, S key, N heads, K kv heads, H head dim, D width, F mlp, V vocabulary, L layers, C slots.
A stage is one `nn.scan` over its layers, or over groups of them where they take turns (`stacks`), or one over each run of layers
that have the same parameters. Those of stage i live under `stage_{i}`, stacked [L_i, ...], those of a later run in it, from layer
n, under `stage_{i}_at_{n}`; `cut_layers` and `join_layers` convert from and to what checkpoints hold. Where arrays lie apart
(`arrangement`), layers are unrolled, and those of layer j of the stage live under `stage_{i}_{j}`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax import cache as kv
from dynllava_jax import methods
from dynllava_jax.arrangement import STACKED, Arrangement, part_name, parted_projections
from dynllava_jax.config import LlamaConfig, Stage
from dynllava_jax.methods import Depth, LayerKind, Observed, Rotation, Rows
from dynllava_jax.models import own_view, voting
from dynllava_jax.models.experts import NOISE, ExpertsMlp, Learning, router_init
from dynllava_jax.models.layer_types import Context, LayerOutput, Queries, joined_outputs, stacked_outputs
from dynllava_jax.models.layers import Dtype, batch_split, partitioned, scan_layers
from dynllava_jax.models.lora import adapted, multiply, product
from dynllava_jax.models.matrices import SCALES, plain
from dynllava_jax.models.passing import QUOTA, Passing, quota_per_frame
from dynllava_jax.models.stacks import Stack, scan_groups, stacks_of
from dynllava_jax.ops import layout
from dynllava_jax.ops.attention import attention_received, cached_attention, causal_attention, policy_attention
from dynllava_jax.ops.pruning import Softness
from dynllava_jax.ops.rope import apply_rope, rope_angles
from dynllava_jax.ops.visibility import Visible, attention_distance, visible_attention

LINEAR_INIT = nn.initializers.lecun_normal()
HEADS_INIT = nn.initializers.lecun_normal(in_axis=-2, out_axis=(-3, -1))  # [N, D, H]
LAST = 'last'  # flag of a stage's last layer
LAYER = 'layer'  # what is scanned along for a compressor and for image tokens beside the cache: which layer it is
HEADS_OUT_INIT = nn.initializers.lecun_normal(in_axis=(-3, -2))  # [N, H, D]


class RMSNorm(nn.Module):
  """Root-mean-square norm in float32."""

  eps: float
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[..., D] -> float[..., D]."""
    scale = self.param('scale', partitioned(nn.initializers.ones, None), (x.shape[-1],))
    return rms_norm(x, scale, self.eps, self.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, dtype: Dtype) -> jax.Array:
  """float[..., D] -> float[..., D]."""
  x = x.astype(jnp.float32)
  x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
  return x.astype(dtype) * scale.astype(dtype)


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
  """Normed float[..., D] and float[D, V] -> float32[..., V], multiplied in the dtype of `hidden`."""
  return jnp.einsum('...d,dv->...v', hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


class Block(nn.Module):
  """One decoder layer, and what the pieces of its stage do to it."""

  cfg: LlamaConfig
  dtype: Dtype
  stage: Stage
  layers: range
  arrangement: Arrangement = STACKED
  num_image: int = 0  # image tokens of the run
  experts: bool = False  # whether its MLP is a choice among several

  def _weight(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init=LINEAR_INIT) -> jax.Array:
    return self.param(name, partitioned(init, *axes), shape).astype(self.dtype)

  @nn.compact
  def __call__(self, x: jax.Array, context: Context, cache: tuple[jax.Array, ...] | None, flags: dict[str, jax.Array] | None):
    """Runs the layer.

    Args:
      x: float[B, T, D].
      context: see `Context`.
      cache: this layer's part of `StageCache.per_layer`, or of a `PrunedCache`'s; None without one.
      flags: this layer's, by name: those of the stage's `LayerKind` and weights that it has, `LAST` and `LAYER`; None if nothing
        needs any.

    Returns:
      (float[B, T, D], `LayerOutput`).
    """
    cfg, rows = self.cfg, context.rows
    width, heads, head_dim = cfg.hidden_size, cfg.num_heads, cfg.head_dim
    kind, kind_options = methods.bound(self.stage.layers if rows else None, 'layers', default=LayerKind())
    details, passing, ballot, whole = {}, None, None, x
    if kind.routing is not None and kind.routing.layers(cfg.num_layers, kind_options)[self.layers[0]]:
      passing = Passing.of_layer(self.stage, self.layers, cfg.num_layers, x, rows, flags)
      x, context = passing.entered, passing.angles(context)
    with jax.named_scope('attention'):
      y = RMSNorm(cfg.rms_norm_eps, self.dtype, name='attention_norm')(x)
      unrotated, k, v = self._projected(y)
      votes = voting.votes_of(self.stage, y, flags, rows is not None or cache is not None)
      if context.unmerged is not None:
        unrotated, k, v = (layout.gather_rows(a, context.unmerged) for a in (unrotated, k, v))
      q, k = apply_rope(unrotated, context.cos, context.sin), apply_rope(k, context.cos, context.sin)
      if context.keys_alone:
        return x, LayerOutput(k, v)
      if cache is not None:
        old_k, old_v, first, *voted = cache
        beside = {}
        if votes is not None:
          beside, ballot = voting.over_cache(votes, voted, context)
        if context.candidates is not None:
          image = own_view.image_of(self.stage, q, context, flags[LAYER] - self.layers.start, self.num_image)
          beside = dict(image=image, image_seen=context.candidates.present)
        y = cached_attention(q, k, v, old_k, old_v, context.cache_length, first, self.arrangement, **beside)
      elif context.visible is not None:
        visible = context.visible
        if context.generated is not None:
          visible = dataclasses.replace(visible, image=own_view.of_rows(self.stage, q, k, context, self.num_image))
        y = visible_attention(q, k, v, visible)
      elif context.policy is not None:
        y = policy_attention(q, k, v, context.policy)
      elif votes is not None:
        y, survival, details = voting.over_rows(q, k, v, votes, context)
      elif kind.attend is not None:
        y = kind.attend(q, k, v, rows, flags, kind_options)
      else:
        y = causal_attention(q, k, v)
      if context.target is not None:
        details |= {'distance': attention_distance(q, k, context.target, rows.image_start)}
      if context.unmerged is not None:
        y = layout.mean_rows(y, context.unmerged, x.shape[1])
      out = self._weight('o', (heads, head_dim, width), ('heads', 'head_dim', 'embed'), HEADS_OUT_INIT)
      if self.arrangement.apart:
        y = adapted(self, 'o', y, product(self, 'o', 'btx,xd->btd', y.reshape(*y.shape[:2], -1), out.reshape(-1, width)))
      else:
        y = multiply(self, 'o', 'btnh,nhd->btd', y, out)
      if kind.attend is not None:
        details |= {'attention_output': y}
      x = x + y
    with jax.named_scope('mlp'):
      y = RMSNorm(cfg.rms_norm_eps, self.dtype, name='mlp_norm')(x)
      if self.experts:
        y, seen = ExpertsMlp(cfg, self.dtype, name='experts')(y, self._router(), context.learning, (flags or {}).get(NOISE))
        details |= seen
      elif kind.mlp is not None:
        own = dict(zip(('gate', 'up', 'down'), self._mlp_weights()))
        scales = {n: self.get_variable(SCALES, n) for n in own if self.has_variable(SCALES, n)}
        y, seen = kind.mlp(y, tuple(plain(own, scales, self.dtype).values()), rows, flags, kind_options)
        details |= seen | {'mlp_output': y}
      else:
        gate, up, down = self._mlp_weights()
        gate, up = (multiply(self, n, 'btd,df->btf', y, w) for n, w in (('gate', gate), ('up', up)))
        y = multiply(self, 'down', 'btf,fd->btd', jax.nn.silu(gate) * up, down)
      x = x + (y if passing is None else passing.weigh_mlp(y))
    attention = None
    if context.queries is not None:
      with jax.named_scope('ranking'):
        attention = jax.lax.cond(
          flags[LAST],
          lambda: image_attention(layout.gather_rows(q, context.queries.place), k, context.queries, rows),
          lambda: jnp.zeros((x.shape[0], heads, rows.num_image), jnp.float32),
        )
    output = LayerOutput(k, v, attention=attention, details=details, ballot=ballot)
    if passing is not None:
      x, output = passing.leave(whole, x, output)
    if rows is not None and self.stage.compressor is not None:
      with jax.named_scope('compressor'):
        compressor, options = methods.bound(self.stage.compressor, 'compressor')
        angles = lambda positions: rope_angles(positions, head_dim, cfg.rope_theta, cfg.rope_scaling)
        rotation = Rotation(context.positions, context.next_position, angles)
        depth = Depth(flags[LAYER], self.layers, cfg.num_layers)
        left = compressor.compress(Observed(q, unrotated, k, v, rows, rotation, depth), options)
        output = LayerOutput(left.k, left.v, left.length, left.first, left.shift, attention, details | left.details)
    if context.room and self.stage.revisit is not None:
      split = lambda x: layout.split_rows(x, rows.image_start, rows.num_image)
      (k, image_k), (v, image_v) = split(k), split(v)
      output = dataclasses.replace(output, k=k, v=v, candidates=jnp.stack([image_k, image_v], 2))
    if context.room and votes is not None:
      output = voting.left_of_prompt(output, self.stage, votes, survival, context, self.arrangement)
    elif context.room:
      held_k, held_v = kv.with_room(output.k, output.v, context.room, self.arrangement)
      output = dataclasses.replace(output, k=held_k, v=held_v)
    return batch_split(x if context.frozen is None else jnp.where(context.frozen[..., None], whole, x)), output

  def _mlp_weights(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(gate [D, F], up [D, F], down [F, D])."""
    width, mlp = self.cfg.hidden_size, self.cfg.mlp_dim
    gate, up = (self._weight(name, (width, mlp), ('embed', 'mlp')) for name in ('gate', 'up'))
    return gate, up, self._weight('down', (mlp, width), ('mlp', 'embed'))

  def _router(self) -> jax.Array:
    """float32[D, E]."""
    shape = self.cfg.hidden_size, self.cfg.experts.count
    return self.param('router', partitioned(router_init, 'embed', None), shape).astype(jnp.float32)

  def _projected(self, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normed float[B, T, D] -> queries float[B, T, N, H], keys and values float[B, T, K, H], not rotated."""
    width, heads, kv_heads, head_dim = y.shape[-1], self.cfg.num_heads, self.cfg.num_kv_heads, self.cfg.head_dim
    if self.arrangement.apart:
      size = heads + 2 * kv_heads
      qkv = product(self, 'qkv', 'btd,dx->btx', y, self._weight('qkv', (width, size * head_dim), ('embed', None)))
      parts = jnp.split(qkv.reshape(*y.shape[:2], size, head_dim), [heads, heads + kv_heads], 2)
      return tuple(adapted(self, name, y, part) for name, part in zip('qkv', parts))
    # Heads first: no transposed copy of every layer's weights while decoding on TPU.
    kv_shape, kv_axes = (kv_heads, width, head_dim), ('kv_heads', 'embed', 'head_dim')
    q = self._weight('q', (heads, width, head_dim), ('heads', 'embed', 'head_dim'), HEADS_INIT)
    k, v = (self._weight(name, kv_shape, kv_axes, HEADS_INIT) for name in 'kv')
    return tuple(multiply(self, n, 'btd,ndh->btnh', y, w) for n, w in (('q', q), ('k', k), ('v', v)))


def image_attention(q: jax.Array, k: jax.Array, queries: Queries, rows: Rows) -> jax.Array:
  """What the image rows receive from some query rows: q float[B, R, N, H], k float[B, S, K, H] -> float32[B, N, P]."""
  received = attention_received(q, k, queries.weight, queries.place)
  return layout.take_image_rows(received.swapaxes(1, 2), rows.image_start, rows.num_image).swapaxes(1, 2)


class Llama(nn.Module):
  """Embedding, stages, final norm and output head."""

  cfg: LlamaConfig
  stages: tuple[Stage, ...]
  dtype: Dtype
  remat: str = 'none'
  arrangement: Arrangement = STACKED
  num_image: int = 0  # image tokens of the run

  def setup(self):
    cfg = self.cfg
    self.embedding = self.param(
      'embedding', partitioned(nn.initializers.normal(1.0), 'vocab', 'embed'), (cfg.vocab_size, cfg.hidden_size)
    )
    for i in range(len(self.stages)):
      layers = self.layers_of(i)
      if self.arrangement.apart:
        of_group = [self._settings(stack) for stack in self.stacks_in(i)]
        blocks = [Block(*of_group[n % len(of_group)], cfg.has_experts(layer)) for n, layer in enumerate(layers)]
        setattr(self, f'stage_{i}', blocks)
      for part in self.parts_of(i) if not self.arrangement.apart else ():
        block = scan_layers(Block, len(part), (nn.broadcast, 0, 0), self.remat)
        module = block(*self._settings(self.stacks_in(i)[0]), cfg.has_experts(part[0]))
        setattr(self, part_name(i, layers.start, part[0]), module)
    self.norm = RMSNorm(cfg.rms_norm_eps, self.dtype)
    if not cfg.tie_embeddings:
      self.head = self.param('head', partitioned(LINEAR_INIT, 'embed', 'vocab'), (cfg.hidden_size, cfg.vocab_size))

  def _settings(self, stack: Stack) -> tuple[Any, ...]:
    """Of a `Block`."""
    return self.cfg, self.dtype, self.stages[stack.stage], stack.layers, self.arrangement, self.num_image

  def stacks_in(self, index: int) -> list[Stack]:
    """The stacks of a stage."""
    return [stack for stack in stacks_of(self.stages, self.cfg.num_layers) if stack.stage == index]

  def layers_of(self, index: int) -> range:
    """Decoder layers of a stage."""
    ends = [s.start for s in self.stages[1:]] + [self.cfg.num_layers]
    return range(self.stages[index].start, ends[index])

  def parts_of(self, index: int) -> list[range]:
    """The layers of a stage, in parts with the same parameters, each of which is scanned."""
    layers = self.layers_of(index)
    parts = (range(max(run.start, layers.start), min(run.stop, layers.stop)) for run in self.cfg.runs)
    return [part for part in parts if part]

  def embed(self, tokens: jax.Array) -> jax.Array:
    """int32[B, T] -> float[B, T, D]."""
    return batch_split(self.embedding.astype(self.dtype)[tokens])

  def run_stage(
    self,
    index: int,
    x: jax.Array,
    positions: jax.Array,
    *,
    policy: jax.Array | None = None,
    cache: Sequence[kv.StageCache] | None = None,
    chosen: jax.Array | None = None,
    rows: Rows | None = None,
    queries: Queries | None = None,
    next_position: jax.Array | None = None,
    room: int = 0,
    unmerged: jax.Array | None = None,
    visible: Visible | None = None,
    target: jax.Array | None = None,
    generated: jax.Array | None = None,
    weights: dict[str, jax.Array] | None = None,
    learning: Learning | None = None,
    frozen: jax.Array | None = None,
    keys_alone: bool = False,
    count: jax.Array | None = None,
    softness: Softness | None = None,
  ) -> tuple[jax.Array, tuple[LayerOutput, ...]]:
    """Runs the layers of one stage.

    Args:
      index: stage number.
      x: float[B, T, D]; positions: int32[B, T], rotary positions; int32[B, N] with `unmerged`.
      policy: float[B, T] keep weight per key, for training.
      cache: of each of its stacks, for decoding; chosen: int32[B, k], what is seen of its candidates; None for all.
      unmerged, visible, target, generated, learning, frozen, keys_alone, count, softness: as in `Context`.
      rows, queries, next_position, room: as in `Context`; with `rows` the layers are what the stage's pieces make of them, without
        they are plain.
      weights: by name, float[L, ...], what methods keep for each of these layers beside the blocks' own weights.

    Returns:
      (float[B, T, D], `LayerOutput` of each stack of the stage).
    """
    stage, layers, flags = self.stages[index], self.layers_of(index), dict(weights or {})
    if rows is not None and stage.layers is not None:
      kind, options = methods.bound(stage.layers, 'layers')
      flags |= {
        name: jnp.asarray(marks[layers.start : layers.stop]) for name, marks in kind.flags(self.cfg.num_layers, options).items()
      }
    if rows is not None and methods.routing_of(stage)[0] is not None:
      flags[QUOTA] = jnp.asarray(quota_per_frame(stage, layers, self.cfg.num_layers, rows.num_image), jnp.int32)
    if queries is not None:
      flags[LAST] = jnp.arange(layers.start, layers.stop) == layers.stop - 1
    cos, sin = rope_angles(positions, self.cfg.head_dim, self.cfg.rope_theta, self.cfg.rope_scaling)
    shared = dict(rows=rows, queries=queries, room=room, unmerged=unmerged, visible=visible, generated=generated, target=target)
    shared |= dict(learning=learning, frozen=frozen, keys_alone=keys_alone, count=count, softness=softness)
    context = Context(cos, sin, policy, **shared)
    held = None
    if cache is not None:
      held = [stack.per_layer for stack in cache]
      context = dataclasses.replace(context, candidates=cache[0].candidates, chosen=chosen)
      if cache[0].candidates is not None:
        flags[LAYER] = jnp.arange(layers.start, layers.stop)
    if rows is not None and stage.compressor is not None:
      flags[LAYER] = jnp.arange(layers.start, layers.stop)
      context = dataclasses.replace(context, positions=positions, next_position=next_position)
    return self._run(index, x, context, None if cache is None else [stack.length for stack in cache], held, flags)

  def _run(self, index, x, context, lengths, held, flags) -> tuple[jax.Array, tuple[LayerOutput, ...]]:
    """The layers of a stage, scanned or one by one; `lengths` and `held` of each of its stacks, None without a cache."""
    run, stacks = getattr(self, f'stage_{index}'), self.stacks_in(index)
    contexts = [context if lengths is None else dataclasses.replace(context, cache_length=lengths[j]) for j in range(len(stacks))]
    if not self.arrangement.apart and len(stacks) == 1:
      outputs, start = [], stacks[0].layers.start
      for part in self.parts_of(index):
        rows = slice(part.start - start, part.stop - start)
        mine = (held and held[0], flags or None)
        if len(part) < len(stacks[0].layers):
          mine = jax.tree.map(lambda a, rows=rows: a[rows], mine)
        x, output = getattr(self, part_name(index, start, part.start))(x, contexts[0], *mine)
        outputs.append(output)
      return x, (joined_outputs(outputs),)
    if not self.arrangement.apart:
      blocks = [Block(*self._settings(stack), parent=None) for stack in stacks]
      return scan_groups(blocks, nn.unbox(run.variables), self.remat, x, contexts, held, flags)
    outputs: list[list[LayerOutput]] = [[] for _ in stacks]
    for i, block in enumerate(run):
      turn, j = divmod(i, len(stacks))
      of_layer = None if held is None else tuple(None if a is None else a[turn] for a in held[j])
      x, output = block(x, contexts[j], of_layer, {name: marks[i] for name, marks in flags.items()} or None)
      outputs[j].append(output)
    return x, tuple(map(stacked_outputs, outputs))

  def entering_projections(self, index: int, x: jax.Array, positions: jax.Array, names: str) -> tuple[jax.Array, ...]:
    """What the first layer of stage `index` makes of rows that reach it, float[B, T, D] at rotary positions int32[B, T].

    Returns:
      For each letter of `names`, rotated queries float[B, T, N, H] for 'q', rotated keys float[B, T, K, H] for 'k'.
    """
    cfg = self.cfg
    stage = getattr(self, f'stage_{index}')
    held = nn.unbox((stage[0] if self.arrangement.apart else stage).variables)
    if not self.arrangement.apart:
      held = jax.tree.map(lambda w: w[0], held)
    first = plain(held['params'], held.get(SCALES), self.dtype)
    if self.arrangement.apart:
      first |= dict(zip('qkv', parted_projections(first['qkv'], cfg.num_heads, cfg.num_kv_heads)))
    y = rms_norm(x, first['attention_norm']['scale'], cfg.rms_norm_eps, self.dtype)
    angles = rope_angles(positions, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    return tuple(apply_rope(jnp.einsum('btd,ndh->btnh', y, first[name]), *angles) for name in names)

  def entering_attention(self, index: int, x: jax.Array, positions: jax.Array, rows: Rows, queries: Queries) -> jax.Array:
    """What the image rows of a stream that reaches stage `index` would receive in its first layer: float32[B, N, P]."""
    asked = (layout.gather_rows(a, queries.place) for a in (x, positions))
    (q,), (k,) = self.entering_projections(index, *asked, 'q'), self.entering_projections(index, x, positions, 'k')
    return image_attention(q, k, queries, rows)

  def output(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float[..., D] -> (the same after the final norm, the head float[D, V]); `head_logits` of them are the logits."""
    return self.norm(x), self.embedding.T if self.cfg.tie_embeddings else self.head

  def logits(self, x: jax.Array) -> jax.Array:
    """Final norm and head: float[..., D] -> float32[..., V]."""
    return head_logits(*self.output(x))
