"""Attention without parameters: causal, with a keep policy (training), and over a cache (decoding).

Axes: B batch, T query, S key, N heads, K kv heads, G query heads per kv head, H head dim, C cache slots.
Softmax is computed in float32 whatever the dtype of q, k and v.
"""

import jax
import jax.numpy as jnp

POLICY_EPS = 1e-6  # as in the authors' `softmax_with_policy`
# A block of queries computes no scores beyond its own last position: 4 blocks leave out 3/8 of them. Smaller ones than this do not
# fill a TPU's matrix unit, and are not worth the time to compile them.
CAUSAL_BLOCKS = 4
SMALLEST_BLOCK = 128


def causal_blocks(length: int) -> list[tuple[int, int]]:
  """First and last + 1 query of each block."""
  size = max(-(-length // CAUSAL_BLOCKS), SMALLEST_BLOCK)
  return [(start, min(start + size, length)) for start in range(0, length, size)]


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Each query sees itself and what stands before it; right padding therefore needs no mask.

  Args:
    q: float[B, T, N, H]; k, v: float[B, T, K, H].

  Returns:
    float[B, T, N, H].
  """
  blocks = []
  for start, end in causal_blocks(q.shape[1]):
    visible = jnp.arange(end) <= jnp.arange(start, end)[:, None]
    blocks.append(jax.nn.dot_product_attention(q[:, start:end], k[:, :end], v[:, :end], mask=visible[None, None]))
  return jnp.concatenate(blocks, 1)


def policy_attention(q: jax.Array, k: jax.Array, v: jax.Array, policy: jax.Array) -> jax.Array:
  """Causal attention in which key s takes part with weight `policy[s]`, and each query always sees itself.

  The authors' training softmax (golden record `unit_softmax`): the row maximum is over all visible keys, dropped ones
  included; `eps / S` is added to every key, those that are not visible too.

  Args:
    q: float[B, T, N, H]; k, v: float[B, T, K, H]; policy: float[B, T], 1 = keep, 0 = drop.

  Returns:
    float[B, T, N, H].
  """
  batch, length, heads, head_dim = q.shape
  grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
  policy = policy.astype(jnp.float32)[:, None, None, None]
  # What eps gives to every key is one vector for all queries. So no score is computed for keys that are not visible.
  leaked = POLICY_EPS / length * v.astype(jnp.float32).sum(1)[:, None, :, None]
  blocks = []
  for start, end in causal_blocks(length):
    query, key = jnp.arange(start, end)[:, None], jnp.arange(end)
    scores = jnp.einsum('btkgh,bskh->bkgts', grouped[:, start:end], k[:, :end], preferred_element_type=jnp.float32)
    scores = jnp.where(key <= query, scores * head_dim**-0.5, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)) * jnp.where(key == query, 1.0, policy[..., :end])
    total = weights.sum(-1).transpose(0, 3, 1, 2)[..., None] + POLICY_EPS
    out = jnp.einsum('bkgts,bskh->btkgh', weights.astype(v.dtype), v[:, :end], preferred_element_type=jnp.float32)
    blocks.append(((out + leaked) / total).astype(v.dtype))
  return jnp.concatenate(blocks, 1).reshape(batch, length, heads, head_dim)


def cached_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, cache_k: jax.Array, cache_v: jax.Array, cache_length: jax.Array
) -> jax.Array:
  """New tokens attend to the cache and, causally, to each other.

  The cache is read as it was before these tokens: their own keys are joined at the level of the scores, so
  the cache is neither copied nor written here.

  Args:
    q: float[B, T, N, H]; k, v: float[B, T, K, H] of the T new tokens.
    cache_k, cache_v: float[B, C, K, H].
    cache_length: int32[B], the first `cache_length[b]` slots of row b are real.

  Returns:
    float[B, T, N, H].
  """
  batch, length, heads, head_dim = q.shape
  slots = cache_k.shape[1]
  grouped = q.reshape(batch, length, k.shape[2], -1, head_dim) * jnp.asarray(head_dim**-0.5, q.dtype)
  old = jnp.einsum('btkgh,bckh->bkgtc', grouped, cache_k, preferred_element_type=jnp.float32)
  old = jnp.where((jnp.arange(slots) < cache_length[:, None])[:, None, None, None], old, -jnp.inf)
  new = jnp.einsum('btkgh,bskh->bkgts', grouped, k, preferred_element_type=jnp.float32)
  new = jnp.where(jnp.tril(jnp.ones((length, length), bool)), new, -jnp.inf)
  weights = jax.nn.softmax(jnp.concatenate([old, new], -1), -1).astype(v.dtype)
  out = jnp.einsum('bkgtc,bckh->btkgh', weights[..., :slots], cache_v) + jnp.einsum('bkgts,bskh->btkgh', weights[..., slots:], v)
  return out.reshape(batch, length, heads, head_dim)
