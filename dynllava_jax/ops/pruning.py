"""Attention whose queries vote on what stands before them: a key that one query drops is gone for all later ones.

Dynamic Context Pruning (arXiv 2305.15805): a layer's query i keeps key j with a probability that follows from a score of the two;
what is left of a key is the product over all queries so far, its own vote included. While training the probability is that of
alpha-entmax (arXiv 1905.05702) over (score, 0), by bisection; in generation it is 1 where the score is above 0, and 0 elsewhere.
Axes: B batch, T query, S key, C cache slots, N heads, K kv heads, G query heads per kv head, H head dim, R interaction dim.
Scores, votes and softmax are computed in float32 whatever the dtype of what they are made of.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.ops.attention import causal_blocks

REACH = 64.0  # the log odds that are looked for lie in +- this
HALVINGS = 32
SMALLEST_POWER = 1e-6  # alpha - 1 below which alpha-entmax is the softmax, in float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Votes:
  """What a layer's rows vote by: score[i, j] = q[i] . k[j] / sqrt(R) + bias.

  Attributes:
    q, k: float[B, T, R]; bias: float[1].
  """

  q: jax.Array
  k: jax.Array
  bias: jax.Array

  def scores(self, keys: jax.Array) -> jax.Array:
    """Of all rows with float[B, S, R]: float32[B, T, S]."""
    q, keys = self.q.astype(jnp.float32), keys.astype(jnp.float32)
    return jnp.einsum('btr,bsr->bts', q, keys, precision='highest') * q.shape[-1] ** -0.5 + self.bias.astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softness:
  """How votes are weighed while training: `alpha` float32[], 1 for a sigmoid, larger for a steeper step.

  `dense`: bool[B], rows whose votes do not count; None for none.
  """

  alpha: jax.Array
  dense: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Survival:
  """What is left of the keys.

  Attributes:
    of_keys: float32[B, T, S], 1 on and above the diagonal.
    scores: float32[B, T, S], of what stands before a row; arbitrary elsewhere.
    total: float32[B], its sum over real queries but the last one, and real keys.
    value: float32[B, S], how much each key's being there counts behind the last real query: its score with that, +inf for the query
      itself, -inf for a key that is gone or none.
  """

  of_keys: jax.Array
  scores: jax.Array
  total: jax.Array
  value: jax.Array


@jax.custom_jvp
def log_keep(score: jax.Array, alpha: jax.Array) -> jax.Array:
  """Log of the first entry of two-class alpha-entmax of (score, 0): float32[...] -> float32[...], -inf where that is 0.

  No gradient to `alpha`, float32[], which is 1 or more.
  """
  return _log_odds(score, alpha)[0]


def _log_odds(score: jax.Array, alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(log p, log (1 - p)), where ln_a(p) - ln_a(1 - p) = score for ln_a(x) = (x^(alpha - 1) - 1) / (alpha - 1), by bisection."""
  power = jnp.maximum(alpha - 1, SMALLEST_POWER)
  wanted = power * score

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) / 2
    found = jnp.expm1(power * jax.nn.log_sigmoid(middle)) - jnp.expm1(power * jax.nn.log_sigmoid(-middle))
    return jnp.where(found < wanted, middle, low), jnp.where(found < wanted, high, middle)

  low, high = jax.lax.fori_loop(0, HALVINGS, halve, (jnp.full_like(score, -REACH), jnp.full_like(score, REACH)))
  middle = (low + high) / 2
  sure = lambda x, log: jnp.where(x >= 1, 0.0, jnp.where(x <= -1, -jnp.inf, log))
  return sure(wanted, jax.nn.log_sigmoid(middle)), sure(-wanted, jax.nn.log_sigmoid(-middle))


@log_keep.defjvp
def _log_keep_jvp(primals, tangents):
  score, alpha = primals
  log_p, log_q = _log_odds(score, alpha)
  inside = jnp.isfinite(log_p) & jnp.isfinite(log_q)
  p, q = jnp.where(inside, log_p, 0), jnp.where(inside, log_q, 0)
  slope = 1 / (jnp.exp((alpha - 1) * p) + jnp.exp(p + (alpha - 2) * q))
  return log_p, jnp.where(inside, slope, 0) * tangents[0]


def pruned_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, votes: Votes, length: jax.Array, softness: Softness | None = None
) -> tuple[jax.Array, Survival]:
  """Each query sees itself and what is left of what stands before it.

  Scores of a block of queries are made again on the way back; of earlier queries a block knows what they have left, in logs.

  Args:
    q: float[B, S, N, H]; k, v: float[B, S, K, H].
    votes: of these rows.
    length: int32[B], real rows; padding stands behind them and has no vote.
    softness: of training; None for the step function.

  Returns:
    (float[B, S, N, H], what is left of the keys).
  """
  batch, size, _, head_dim = q.shape
  grouped = q.reshape(batch, size, k.shape[2], -1, head_dim)
  left, total = jnp.zeros((batch, size), jnp.float32), jnp.zeros(batch, jnp.float32)
  outputs, survivals, every_score = [], [], []
  for start, end in causal_blocks(size):
    mine = Votes(votes.q[:, start:end], votes.k[:, :end], votes.bias)
    block = jax.checkpoint(_attend, static_argnums=7)
    out, survival, scores, added = block(
      grouped[:, start:end], k[:, :end], v[:, :end], mine, left[:, :end], length, softness, start
    )
    outputs.append(out)
    survivals.append(jnp.pad(jnp.exp(survival), [(0, 0), (0, 0), (0, size - end)], constant_values=1.0))
    every_score.append(jnp.pad(scores, [(0, 0), (0, 0), (0, size - end)]))
    left = left.at[:, :end].set(survival[:, -1])
    total += added
  out = jnp.concatenate(outputs, 1).reshape(q.shape).astype(v.dtype)
  survivals, every_score = (jnp.concatenate(parts, 1) for parts in (survivals, every_score))
  return out, Survival(survivals, every_score, total, _values(votes, left, length))


def _attend(q, k, v, votes: Votes, left, length, softness: Softness | None, start: int):
  """A block of queries from `start` on: (its output, log of what is left and scores [B, T, S], its part of `Survival.total`)."""
  query, key = start + jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
  scores = votes.scores(votes.k)
  log = jnp.where(scores > 0, 0.0, -jnp.inf) if softness is None else log_keep(scores, softness.alpha)
  counts = (key < query) & (query < length[:, None, None])
  if softness is not None and softness.dense is not None:
    counts &= ~softness.dense[:, None, None]
  survival = left[:, None] + jnp.cumsum(jnp.where(counts, log, 0.0), axis=1)
  real = (query < length[:, None, None] - 1) & (key < length[:, None, None])
  # Keys behind the block are whole, and are not in `survival`.
  behind = jnp.where(query[:, 0] < length[:, None] - 1, jnp.maximum(length[:, None] - k.shape[1], 0), 0).sum(-1)
  total = jnp.where(real, jnp.exp(survival), 0.0).sum((1, 2)) + behind
  weights = jnp.einsum('btkgh,bskh->bkgts', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  weights = jax.nn.softmax(jnp.where(key <= query, weights + survival[:, None, None], -jnp.inf), -1)
  out = jnp.einsum('bkgts,bskh->btkgh', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return out, survival, scores, total


def _values(votes: Votes, left: jax.Array, length: jax.Array) -> jax.Array:
  """`Survival.value`, from the log of what the last query left, float32[B, S]."""
  key, last = jnp.arange(left.shape[1]), length[:, None] - 1
  newest = jnp.take_along_axis(votes.q, jnp.maximum(last, 0)[..., None], 1)
  scores = dataclasses.replace(votes, q=newest).scores(votes.k)[:, 0]
  return jnp.where((key > last) | (left == -jnp.inf), -jnp.inf, jnp.where(key == last, jnp.inf, scores))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ballot:
  """What votes of new tokens over a cache come to.

  Attributes:
    seen: bool[B, T, C], slots that each new token sees, and among: bool[B, T, T], what each sees of the new ones.
    old: float32[B, C] and new: float32[B, T], as `Survival.value`, of the slots and of the new tokens.
    key: float[B, T, R], what later tokens score the new ones by.
  """

  seen: jax.Array
  among: jax.Array
  old: jax.Array
  new: jax.Array
  key: jax.Array


def vote(votes: Votes, keys: jax.Array, held: jax.Array, count: jax.Array) -> Ballot:
  """New tokens vote, one after the other, on what a cache holds and on each other.

  Args:
    votes: of T new tokens; keys: float[B, C, R], the slots'.
    held: bool[B, C], slots in use.
    count: int32[B], how many of the new tokens are real; the others have no vote.
  """
  step = jnp.arange(votes.q.shape[1])
  has_vote = (step < count[:, None])[..., None]
  of_old, of_new = votes.scores(keys), votes.scores(votes.k)
  dropped = lambda drops: jnp.cumsum(drops, 1, dtype=jnp.int32) > 0
  seen = held[:, None] & ~dropped(has_vote & (of_old <= 0))
  left = ~dropped(has_vote & (of_new <= 0) & (step[:, None] > step))
  last = jnp.maximum(count - 1, 0)[:, None]
  of_last = lambda scores: jnp.take_along_axis(scores, last[..., None], 1)[:, 0]
  return Ballot(
    seen=seen,
    among=left & (step[:, None] >= step),
    old=jnp.where(seen[:, -1], of_last(of_old), -jnp.inf),
    new=jnp.where(left[:, -1] & has_vote[..., 0], jnp.where(step == last, jnp.inf, of_last(of_new)), -jnp.inf),
    key=votes.k,
  )
