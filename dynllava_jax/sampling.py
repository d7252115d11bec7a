"""How the next token is drawn from a row's logits: the most likely one, or by chance, every row by settings of its own.

Axes: B rows, V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dynllava_jax import arguments

SMALLEST_TEMPERATURE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is drawn: greedy at temperature 0, else after top-k (0: off) and top-p (nucleus; 1.0: off) filtering."""

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    arguments.number('sampling.temperature', self.temperature, 0, math.inf)
    if 0 < self.temperature < SMALLEST_TEMPERATURE:
      raise ValueError(f'sampling.temperature: {self.temperature} overflows float32 logits; 0 takes the most likely token')
    arguments.integer('sampling.top_k', self.top_k, 0, 2**31 - 1)
    arguments.number('sampling.top_p', self.top_p, 0, 1, above=True)


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
  """`Sampling` of every row: temperature float32[B], top_k int32[B], top_p float32[B]."""

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array


def are_numbers(logits: jax.Array) -> jax.Array:
  """bool[B]: whether a row of float32[B, V] logits is finite; a model that computes something else would answer with token 0."""
  return jnp.isfinite(logits).all(-1)


def sample(logits: jax.Array, sampling: Sampling, seed: jax.Array, step: jax.Array) -> jax.Array:
  """`draw` with the same settings, static, for all rows."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, -1).astype(jnp.int32)
  full = lambda value, dtype: jnp.full(logits.shape[0], value, dtype)
  settings = Settings(full(sampling.temperature, jnp.float32), full(sampling.top_k, jnp.int32), full(sampling.top_p, jnp.float32))
  return draw(logits, settings, seed, step)


def draw(logits: jax.Array, settings: Settings, seed: jax.Array, step: jax.Array) -> jax.Array:
  """Draws one token per row.

  Args:
    logits: float32[B, V]; settings: of each row.
    seed: uint32[B]; step: int32[B], tokens seen. A row's draw depends on these two, its settings and its logits alone.

  Returns:
    int32[B].
  """
  likeliest = jnp.argmax(logits, -1).astype(jnp.int32)
  hot = settings.temperature > 0

  def by_chance():
    scaled = logits / jnp.where(hot, settings.temperature, 1)[:, None]
    filters = hot & ((settings.top_k > 0) | (settings.top_p < 1))
    scaled = jax.lax.cond(filters.any(), lambda: _filtered(scaled, settings), lambda: scaled)
    keys = jax.vmap(lambda s, t: jax.random.fold_in(jax.random.key(s), t))(seed, step)
    return jnp.where(hot, jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32), likeliest)

  return jax.lax.cond(hot.any(), by_chance, lambda: likeliest)


def _filtered(logits: jax.Array, settings: Settings) -> jax.Array:
  """The logits float32[B, V] with -inf where top-k, then top-p leaves a token out."""
  rows, size = jnp.arange(logits.shape[0])[:, None], logits.shape[-1]
  order = jnp.argsort(-logits, -1)
  ranked = jnp.take_along_axis(logits, order, -1)
  last = jnp.take_along_axis(ranked, jnp.clip(settings.top_k - 1, 0, size - 1)[:, None], -1)
  ranked = jnp.where((settings.top_k > 0)[:, None] & (ranked < last), -jnp.inf, ranked)
  probs = jax.nn.softmax(ranked, -1)
  outside = (jnp.cumsum(probs, -1) - probs >= settings.top_p[:, None]) & (settings.top_p < 1)[:, None]
  ranked = jnp.where(outside.at[:, 0].set(False), -jnp.inf, ranked)  # the most likely token always stays
  return logits.at[rows, order].set(ranked, unique_indices=True)


def penalised(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
  """Logits float32[B, V] of tokens that bool[B, V] `seen` names made less likely by float32[B] `penalty` (1: not at all).

  As in CTRL (arXiv 1909.05858, section 4.1) and transformers: positive ones are divided by it, negative ones multiplied.
  """
  penalty = penalty[:, None]
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
