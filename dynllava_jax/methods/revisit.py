"""Visual relevance per decoding step: each generated token attends to those of a stage's image tokens that matter to it.

What enters a stage with a `revisit` piece are candidates. They stay in its cache; prompt rows and later user turns see all of them,
a generated token sees `tokens` of them, chosen once per token at the stage's entry and shared by its layers. `attention` has no
weights: it looks as the stage's first layer does, so the layer that chooses is the one that the stage starts at. `dot`, `mlp` and
`transformer` are learned (`config.RelevanceConfig`).

Axes: B batch, T query rows, M candidates, D width, W width of the scores, N heads, K kv heads, H head dim.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax.config import ConfigError, ModelConfig, RelevanceConfig, Stage
from dynllava_jax.config.parsing import require
from dynllava_jax.methods.base import Origin

Weights = Mapping[str, jax.Array]
Rotate = Callable[[jax.Array], jax.Array]  # float[B, T, W] -> the same, rotated by the rows' positions
EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How many candidates a generated token attends to: `tokens` of them, or `keep_rate` of the run's image tokens, cut off."""

  tokens: int = 0
  keep_rate: float = 0.0

  def __post_init__(self):
    require(self.tokens >= 0, f'tokens is {self.tokens}, expected a positive number')
    require(0 <= self.keep_rate <= 1, f'keep_rate is {self.keep_rate}, expected a share in (0, 1]')
    require((self.tokens > 0) != (self.keep_rate > 0), 'give either tokens or keep_rate, how many image tokens a token attends to')

  def count(self, num_image: int) -> int:
    """k of a run with `num_image` image tokens."""
    return self.tokens or int(self.keep_rate * num_image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions(Options):
  """`each_layer`: every layer of the stage chooses for itself; else the first one does for all."""

  each_layer: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Revisit(Origin):
  """Scores candidates for query rows.

  Attributes:
    score: (queries, keys, weights, rotate of the query rows) -> float32[B, T, M].
    queries: (normed hidden states float[B, T, D], rotate, weights) -> float[B, T, W]; None: rotated queries float[B, T, N, H] of
      the stage's first layer.
    keys: the same of the candidates -> float[B, M, E], kept in the cache; None: that layer's float[B, M, K, H], which are there.
    weights: (width D, `RelevanceConfig`) -> shapes by name, inputs before outputs.
  """

  score: Callable[[jax.Array, jax.Array, Weights, Rotate | None], jax.Array]
  queries: Callable[[jax.Array, Rotate, Weights], jax.Array] | None = None
  keys: Callable[[jax.Array, Rotate, Weights], jax.Array] | None = None
  weights: Callable[[int, RelevanceConfig], dict[str, tuple[int, ...]]] = lambda width, cfg: {}
  options: type = Options
  source: str = 'this project'


def choose(scores: jax.Array, count: int) -> jax.Array:
  """The `count` best candidates of each row, int32[..., count] of float[..., M]; ties go to the lowest index."""
  return jax.lax.top_k(scores.astype(jnp.float32), count)[1].astype(jnp.int32)


def seen(index: jax.Array, candidates: int) -> jax.Array:
  """bool[..., M] of int32[..., k]: which candidates were chosen."""
  return (index[..., None] == jnp.arange(candidates)).any(-2)


def normed(x: jax.Array) -> jax.Array:
  """Root-mean-square norm without a scale, float32[..., D]."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS)


def attention_score(q: jax.Array, k: jax.Array, weights: Weights, rotate: Rotate | None = None) -> jax.Array:
  """Softmax over the candidates in each head, then the mean over heads."""
  batch, rows, heads, head_dim = q.shape
  grouped = q.reshape(batch, rows, k.shape[2], heads // k.shape[2], head_dim)
  scores = jnp.einsum('btkgh,bmkh->bkgtm', grouped, k, preferred_element_type=jnp.float32) * head_dim**-0.5
  return jax.nn.softmax(scores, -1).mean((1, 2))


def _query(x: jax.Array, rotate: Rotate, weights: Weights) -> jax.Array:
  return rotate(x @ weights['q'])


def _key(x: jax.Array, rotate: Rotate, weights: Weights) -> jax.Array:
  return rotate(x @ weights['k'])


def _dot(q: jax.Array, k: jax.Array) -> jax.Array:
  return jnp.einsum('btw,bmw->btm', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _additive(q: jax.Array, k: jax.Array, weights: Weights, rotate: Rotate | None) -> jax.Array:
  return jnp.einsum('btmw,wo->btm', jnp.tanh(q[:, :, None] + k[:, None]), weights['v'], preferred_element_type=jnp.float32)


def _block_keys(x: jax.Array, rotate: Rotate, weights: Weights) -> jax.Array:
  return jnp.concatenate([rotate(x @ weights['k']), rotate(x @ weights['pointer']), x @ weights['v']], -1)


def _block(q: jax.Array, k: jax.Array, weights: Weights, rotate: Rotate | None) -> jax.Array:
  """One cross-attention over the candidates and an MLP; what comes out points at candidates, which is the head."""
  keys, pointers, values = jnp.split(k, 3, -1)
  seen = jnp.einsum('btm,bmw->btw', jax.nn.softmax(_dot(q, keys), -1), values)
  y = q + rotate(seen @ weights['o'])
  hidden = jax.nn.gelu(normed(y) @ weights['up'])
  return _dot(y + hidden @ weights['down'], pointers)


def _projections(width: int, cfg: RelevanceConfig) -> dict[str, tuple[int, ...]]:
  return {'q': (width, cfg.width), 'k': (width, cfg.width)}


def _block_weights(width: int, cfg: RelevanceConfig) -> dict[str, tuple[int, ...]]:
  size = cfg.width
  more = {'pointer': (width, size), 'v': (width, size), 'o': (size, size), 'up': (size, 4 * size), 'down': (4 * size, size)}
  return _projections(width, cfg) | more


REVISITS: dict[str, Revisit] = {
  'attention': Revisit(score=attention_score, options=AttentionOptions),
  'dot': Revisit(score=lambda q, k, weights, rotate: _dot(q, k), queries=_query, keys=_key, weights=_projections),
  'mlp': Revisit(
    score=_additive, queries=_query, keys=_key, weights=lambda width, cfg: _projections(width, cfg) | {'v': (cfg.width, 1)}
  ),
  'transformer': Revisit(score=_block, queries=_query, keys=_block_keys, weights=_block_weights),
}


def check_revisit(
  model: ModelConfig, stage: Stage, piece: Any, options: Any, candidates: int, num_image: int, unmerges: bool
) -> None:
  """Raises ConfigError unless generated tokens can choose among a stage's `candidates`; `piece`, `options`: its revisit."""
  at = f'stage at layer {stage.start}: revisit {stage.revisit.name}'
  count = options.count(num_image)
  if not 0 < count <= candidates:
    raise ConfigError(f'{at}: each token is to see {count} image tokens, the stage has {candidates}')
  if piece.keys is not None and (model.relevance is None or model.relevance.score != stage.revisit.name):
    held = 'none' if model.relevance is None else f'those of {model.relevance.score}'
    raise ConfigError(
      f'{at}: needs weights, and this model has {held}; train them with configs/digits.py:revisit, or use revisit attention'
    )
  if stage.compressor is not None or stage.layers is not None or unmerges:
    other = stage.compressor or stage.layers
    raise ConfigError(f'{at}: does not go together with {other.name if other else "unmerging"}; use one of them')
