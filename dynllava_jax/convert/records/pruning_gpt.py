"""A small GPT-2 whose layers prune their context, as the authors of Dynamic Context Pruning run it: only their record needs it.

Blocks are those of GPT-2 (as in github.com/karpathy/nanoGPT, which theirs goes back to): learned positions,
layer norm with bias before attention and MLP, tanh-approximated GELU, a head that shares the embedding. Votes, survival, attention
and cache are this project's own.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import cache as kv
from dynllava_jax import pruned_cache
from dynllava_jax.arrangement import STACKED
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import EXACT, GRADIENT, LOGITS, LOSS, Quantity, compare, in_range
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.described import NUMBER, NUMBERS, WHOLE
from dynllava_jax.losses import cross_entropy
from dynllava_jax.ops.attention import cached_attention
from dynllava_jax.ops.pruning import Softness, Survival, Votes, pruned_attention, vote

SCORE = 1e-4
LAST = 6  # positions whose logits of a training step were recorded
Weights = dict[str, Any]


class Gpt:
  """The recorded model. Axes: B batch, T tokens, D width, V vocabulary."""

  def __init__(self, record: Record):
    whole = lambda name: record.setting('gpt_config', name, kind=WHOLE)
    self.layers, self.heads, self.vocab = whole('n_layer'), whole('n_head'), whole('vocab_size')
    self.places, self.eps = whole('block_size'), record.setting('gpt_config', 'layer_norm_eps', kind=NUMBER)

  def names(self) -> list[str]:
    """Of its tensors."""
    norms = [f'{name}.{part}' for name in ('ln_1', 'ln_2') for part in ('weight', 'bias')]
    linear = [f'{name}.{part}' for name in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj') for part in ('weight', 'bias')]
    voting = ['attn.q_int.weight', 'attn.k_int.weight', 'attn.int_bias']
    ends = [
      'transformer.wte.weight',
      'transformer.wpe.weight',
      'transformer.ln_f.weight',
      'transformer.ln_f.bias',
      'lm_head.weight',
    ]
    return ends + [f'transformer.h.{i}.{name}' for i in range(self.layers) for name in norms + linear + voting]

  def ids(self, record: Record, name: str, rank: int = 2) -> np.ndarray:
    """Recorded tokens; ConversionError for some that the model does not have or has no place for."""
    ids = record.given(name, (None,) * rank, whole=True).astype(np.int32)
    if ids.shape[-1] > self.places:
      raise ConversionError(f'{record.at}: array {name!r} has {ids.shape[-1]} tokens in a row, block_size is {self.places}')
    return in_range(record.at, name, ids, 0, self.vocab)

  def embed(self, w: Weights, ids: jax.Array, positions: jax.Array) -> jax.Array:
    """int32[B, T] twice -> float32[B, T, D]."""
    return w['transformer.wte.weight'][ids] + w['transformer.wpe.weight'][positions]

  def norm(self, w: Weights, name: str, x: jax.Array) -> jax.Array:
    """Layer norm."""
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
    return scaled * w[f'{name}.weight'] + w[f'{name}.bias']

  def linear(self, w: Weights, name: str, x: jax.Array) -> jax.Array:
    """x W^T + b; without b where there is none."""
    return x @ w[f'{name}.weight'].T + w.get(f'{name}.bias', 0.0)

  def enter(self, w: Weights, layer: int, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, Votes]:
    """Queries, keys and values float32[B, T, N, H] of a layer, and its votes."""
    at = f'transformer.h.{layer}.attn'
    y = self.norm(w, f'transformer.h.{layer}.ln_1', x)
    q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in jnp.split(self.linear(w, f'{at}.c_attn', y), 3, -1))
    return q, k, v, Votes(self.linear(w, f'{at}.q_int', y), self.linear(w, f'{at}.k_int', y), w[f'{at}.int_bias'])

  def leave(self, w: Weights, layer: int, x: jax.Array, attended: jax.Array) -> jax.Array:
    """The rest of the layer, given what its heads attended to."""
    at = f'transformer.h.{layer}'
    x = x + self.linear(w, f'{at}.attn.c_proj', attended.reshape(x.shape))
    y = jax.nn.gelu(self.linear(w, f'{at}.mlp.c_fc', self.norm(w, f'{at}.ln_2', x)), approximate=True)
    return x + self.linear(w, f'{at}.mlp.c_proj', y)

  def logits(self, w: Weights, x: jax.Array) -> jax.Array:
    """float32[B, T, V]."""
    return self.norm(w, 'transformer.ln_f', x) @ w['lm_head.weight'].T

  def forward(self, w: Weights, ids: jax.Array, length: jax.Array, softness: Softness | None, size: int = 0):
    """A whole sequence: (logits, `Survival` of each layer, what each leaves in a cache of `size` slots)."""
    x = self.embed(w, ids, jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape))
    survivals: list[Survival] = []
    left = []
    for layer in range(self.layers):
      q, k, v, votes = self.enter(w, layer, x)
      attended, survival = pruned_attention(q, k, v, votes, length, softness)
      x = self.leave(w, layer, x, attended)
      survivals.append(survival)
      if size:
        left.append(pruned_cache.of_prompt(k, v, votes.k, survival, size, STACKED))
    return self.logits(w, x), survivals, left

  def step(self, w: Weights, token: jax.Array, cache: pruned_cache.PrunedCache):
    """One token int32[B] on top of a cache: (logits float32[B, V], the new cache)."""
    x, ones = self.embed(w, token[:, None], cache.length[:, None]), jnp.ones_like(token)
    new = []
    for layer, (k, v, key, held) in enumerate(zip(cache.k, cache.v, cache.key, cache.per_layer[-1])):
      q, new_k, new_v, votes = self.enter(w, layer, x)
      ballot = vote(votes, key, held, ones)
      x = self.leave(w, layer, x, cached_attention(q, new_k, new_v, k, v, None, seen=ballot.seen, among=ballot.among))
      new.append((new_k, new_v, ballot))
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *new)
    return self.logits(w, x)[:, 0], pruned_cache.append(cache, x, *stacked, cache.length, ones, True)

  def begin(self, w: Weights, ids: jax.Array, length: jax.Array, steps: int):
    """Prompts: (logits float32[B, V] of the next token, a cache with room for all)."""
    logits, _, left = self.forward(w, ids, length, None, ids.shape[1] + steps)
    k, v, held = jax.tree.map(lambda *parts: jnp.stack(parts), *left)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    spec = kv.CacheSpec(max_new_tokens=steps)
    settings = dict(tokens=0, spec=spec, shift=None, arrangement=STACKED)
    return logits[jnp.arange(len(ids)), length - 1], pruned_cache.from_prompt(k, v, held, positions, length, **settings)


def verify(record: Record, weights: dict[str, np.ndarray]) -> Iterator[Quantity]:
  """The arrays `train...` and `infer...`."""
  gpt, w = Gpt(record), jax.tree.map(jnp.asarray, weights)
  if missing := sorted(set(gpt.names()) - weights.keys()):
    raise ConversionError(f'{record.folder}/weights.npz: gpt/{missing[0]} is missing')
  for alpha in record.setting('train_alphas', kind=NUMBERS):
    yield from _train(record, gpt, w, alpha)
  yield from _infer(record, gpt, w)


def _train(record: Record, gpt: Gpt, w: Weights, alpha: float) -> Iterator[Quantity]:
  at, gamma = f'train_a{alpha}/', record.setting('gamma', kind=NUMBER)
  ids, targets = (gpt.ids(record, f'train/{name}') for name in ('ids', 'targets'))
  if targets.shape != ids.shape:
    raise ConversionError(f'{record.at}: train/targets has shape {targets.shape}, train/ids {ids.shape}')
  ids = jnp.asarray(ids)
  length = jnp.full(len(ids), ids.shape[1], jnp.int32)
  labels = jnp.asarray(np.pad(targets, [(0, 0), (1, 0)]))  # ours are those of the position before

  def losses(w: Weights):
    logits, survivals, _ = gpt.forward(w, ids, length, Softness(jnp.float32(alpha)))
    ce = cross_entropy(jnp.pad(logits, [(0, 0), (0, 1), (0, 0)]), labels)
    entries = (length * (length - 1)).astype(jnp.float32)
    sparsity = gamma * jnp.stack([s.total / entries for s in survivals]).mean()
    return ce + sparsity, (ce, sparsity, logits, jnp.stack([s.of_keys for s in survivals]))

  (total, (ce, sparsity, logits, survival)), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(w)
  yield compare(f'{at}logits', logits[:, -LAST:], record.array(f'{at}logits'), LOGITS)
  yield compare(f'{at}survival', survival, record.array(f'{at}survival'), LOGITS)
  for name, ours in (('ce_loss', ce), ('sparsity_loss', sparsity), ('loss', total)):
    yield compare(f'{at}{name}', ours, record.array(f'{at}{name}'), LOSS, relative=True)
  for key in (k for k in record.case if k.startswith(f'{at}grad/')):
    if key.removeprefix(f'{at}grad/') not in gradients:
      raise ConversionError(f'{record.at}: array {key!r} is about a parameter that the model does not have')
    yield compare(key, gradients[key.removeprefix(f'{at}grad/')], record.case[key], GRADIENT, relative=True)


def _infer(record: Record, gpt: Gpt, w: Weights) -> Iterator[Quantity]:
  """Each row alone and all in one batch, with a cache; then whole sequences at once."""
  ids = gpt.ids(record, 'infer/prompt_ids')
  valid = record.given('infer/prompt_valid', ids.shape, whole=True)
  length = jnp.asarray(valid.sum(-1), jnp.int32)
  every = [gpt.ids(record, f'infer{row}/tokens', 1) for row in range(len(ids))]
  new = [len(tokens) - int(n) for tokens, n in zip(every, length)]
  if min(new) < 1 or min(length) < 1:
    raise ConversionError(f'{record.at}: inferN/tokens are to be a prompt of infer/prompt_valid and what was generated behind it')
  ids, steps = jnp.asarray(ids), max(new)
  begin, step, forward = (
    jax.jit(gpt.begin, static_argnums=3),
    jax.jit(gpt.step),
    jax.jit(lambda w, i, n: gpt.forward(w, i, n, None)),
  )

  def decode(ids: jax.Array, length: jax.Array):
    logits, cache = begin(w, ids, length, steps)
    every, alive, tokens = [logits], [(cache.position >= 0).sum(-1)], []
    for number in range(steps):
      tokens.append(jnp.argmax(every[-1], -1).astype(jnp.int32))
      if number + 1 < steps:
        logits, cache = step(w, tokens[-1], cache)
        every.append(logits)
        alive.append((cache.position >= 0).sum(-1))
    return np.stack(tokens, 1), np.stack(every, 1), np.stack(alive, -1)

  together = decode(ids, length)
  for row, whole in enumerate(every):
    at, given, count = f'infer{row}/', int(length[row]), new[row]
    array = lambda name, at=at: record.array(at + name)
    yield compare(f'{at}prompt_len', given, array('prompt_len'), EXACT)
    for where, index, (tokens, logits, alive) in (
      ('', 0, decode(ids[row : row + 1], length[row : row + 1])),
      ('in a batch: ', row, together),
    ):
      yield compare(f'{where}{at}tokens', np.concatenate([ids[row, :given], tokens[index, :count]]), whole, EXACT)
      yield compare(f'{where}{at}logits', logits[index, :count], array('logits'), LOGITS)
      yield compare(f'{where}{at}held per step', alive[:, index, :count], array('alive')[:, given - 1 : given - 1 + count], EXACT)
    _, survivals, _ = forward(w, jnp.asarray(whole)[None], jnp.full(1, len(whole), jnp.int32))
    survival, scores = (np.stack([getattr(s, name)[0] for s in survivals]) for name in ('of_keys', 'scores'))
    yield compare(f'{at}survival', survival > 0, array('survival'), EXACT)
    yield compare(f'{at}raw', np.tril(scores, -1), np.tril(array('raw'), -1), SCORE)
    yield compare(f'{at}alive', np.tril(survival).sum(-1).astype(np.int32), array('alive'), EXACT)
