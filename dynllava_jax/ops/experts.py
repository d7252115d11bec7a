"""Tokens that pass some of several experts each: which ones, how much they count, and the products themselves.

In use every token passes its `top_k` experts. In training an expert has room for so many tokens, the second choice is a sample, and
a loss balances the load (GShard, arXiv 2006.16668; deepspeed 0.9.5 `top1gating`, `top2gating`, with two differences: padding takes
no place and is in no mean, and nothing is drawn or dropped outside of training).

Axes: N tokens of a batch, E experts, K choices, C places, D width, F mlp.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

EPS = float(jnp.finfo(jnp.float32).eps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routes:
  """Where tokens go.

  Attributes:
    expert: int32[N, K]; weight: float32[N, K], 0 where a token lost its place.
    place: int32[N, K], in the expert's buffer, -1 where there was none left; None in use, where there are no places.
    balance: float32[], the loss that balances the load; load: float32[E], share of the tokens that chose each expert first.
    capacity: int32[], places of an expert.
  """

  expert: jax.Array
  weight: jax.Array
  place: jax.Array | None = None
  balance: jax.Array | None = None
  load: jax.Array | None = None
  capacity: jax.Array | None = None


def choose(logits: jax.Array, top_k: int, noise: jax.Array | None = None) -> jax.Array:
  """int32[N, K] of router logits float32[N, E]: the best, and the best of the others with `noise` added to their logits."""
  first = logits.argmax(-1)
  if top_k == 1:
    return first[:, None].astype(jnp.int32)
  others = logits if noise is None else logits + noise
  second = jnp.where(jnp.arange(logits.shape[-1]) == first[:, None], -jnp.inf, others).argmax(-1)
  return jnp.stack([first, second], -1).astype(jnp.int32)


def used(logits: jax.Array, top_k: int) -> Routes:
  """Routes in use. Of two experts the weights add up to 1; a single one counts as much as its gate."""
  expert = choose(logits, top_k)
  return Routes(expert, _normed(jnp.take_along_axis(jax.nn.softmax(logits, -1), expert, -1)))


def _normed(gates: jax.Array) -> jax.Array:
  return gates if gates.shape[-1] == 1 else gates / jnp.maximum(gates.sum(-1, keepdims=True), EPS)


def places(tokens: int, experts: int, top_k: int, factor: float) -> int:
  """Most places that an expert has for so many tokens."""
  return min(tokens, math.ceil(tokens / experts * factor * top_k))


def trained(logits: jax.Array, top_k: int, noise: jax.Array, real: jax.Array, factor: float) -> Routes:
  """Routes in training.

  First choices come first, in the order of the tokens, second ones behind all of them; what lies beyond the capacity is lost. With
  one choice those keep their places that drew the largest numbers.

  Args:
    logits: float32[N, E].
    noise: float32[N, E], of a Gumbel distribution for two choices, uniform for one.
    real: bool[N], tokens that are no padding.
    factor: the capacity is so many times the tokens that an expert had if all had equally many.
  """
  number = logits.shape[-1]
  gates = jax.nn.softmax(logits, -1)
  expert = choose(logits, top_k, noise)
  chosen = jax.nn.one_hot(expert, number, dtype=jnp.int32) * real[:, None, None]  # [N, K, E]
  tokens = real.sum()
  capacity = jnp.ceil(tokens / number * factor * top_k).astype(jnp.int32)
  if top_k == 1:
    luck = jnp.where(chosen[:, 0] > 0, noise, -1.0)
    before = jnp.argsort(jnp.argsort(-luck, axis=0), axis=0)[:, None]  # how many drew a larger one
  else:
    within = jnp.cumsum(chosen, 0) - 1
    behind = jnp.pad(jnp.cumsum(chosen.sum(0), 0)[:-1], [(1, 0), (0, 0)])
    before = within + behind
  place = (before * chosen).sum(-1)
  held = (chosen.sum(-1) > 0) & (place < capacity)
  weight = jnp.where(held, jnp.take_along_axis(gates, expert, -1), 0.0)
  over = jnp.maximum(tokens, 1)
  load = chosen[:, 0].sum(0) / over
  mean = jnp.where(real[:, None], gates, 0).sum(0) / over
  return Routes(expert, _normed(weight), jnp.where(held, place, -1), number * (mean * load).sum(), load, capacity)


def through(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, routes: Routes) -> jax.Array:
  """What the experts make of tokens float[N, D]: float[N, D]; gate and up float[E, D, F], down float[E, F, D].

  Tokens are sorted by expert, so that nothing is padded and nothing lost.
  """
  count, top_k = routes.expert.shape
  flat = routes.expert.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  sizes = jnp.bincount(flat, length=gate.shape[0]).astype(jnp.int32)
  rows = x[order // top_k]
  hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
  out = jax.lax.ragged_dot(hidden, down, sizes)
  back = out[jnp.argsort(order)].reshape(count, top_k, -1)
  return jnp.einsum('nk,nkd->nd', routes.weight.astype(x.dtype), back)


def through_places(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, routes: Routes, size: int) -> jax.Array:
  """As `through`, by buffers of `size` places for each expert, which a mesh can split by expert; lost tokens get 0."""
  count, top_k = routes.expert.shape
  number = gate.shape[0]
  slot = jnp.where(routes.place >= 0, routes.expert * size + routes.place, number * size)
  token = jnp.broadcast_to(jnp.arange(count)[:, None], (count, top_k))
  source = jnp.full(number * size, count, jnp.int32).at[slot].set(token, mode='drop')
  rows = jnp.concatenate([x, jnp.zeros_like(x[:1])])[source].reshape(number, size, -1)
  hidden = jax.nn.silu(jnp.einsum('ecd,edf->ecf', rows, gate)) * jnp.einsum('ecd,edf->ecf', rows, up)
  out = jnp.einsum('ecf,efd->ecd', hidden, down).reshape(number * size, -1)
  back = jnp.where((routes.place >= 0)[..., None], out[jnp.minimum(slot, number * size - 1)], 0)
  return jnp.einsum('nk,nkd->nd', routes.weight.astype(x.dtype), back)
