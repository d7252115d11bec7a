"""Attention without parameters: causal, hollow over the image, with a keep policy (training), and over a cache (decoding).

`attention_received` gives softmax weights themselves, of the query rows that somebody asked for and summed over them.

Axes: B batch, T query, S key, N heads, K kv heads, G query heads per kv head, H head dim, C cache slots.
Softmax is computed in float32 whatever the dtype of q, k and v.
"""

import jax
import jax.numpy as jnp

from dynllava_jax.arrangement import STACKED, Arrangement
from dynllava_jax.ops import layout
from dynllava_jax.ops.int8 import Int8

NEARLY_ONE = 1 - 1e-6
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


def attention_received(q: jax.Array, k: jax.Array, weight: jax.Array, place: jax.Array | None = None) -> jax.Array:
  """How much attention each key receives: the sum of softmax weights over query rows, each row times its `weight`.

  Softmax runs over all that a row sees: itself and what stands before it, so never over right padding. Rows are taken in blocks.

  Args:
    q: float[B, R, N, H], rotated; k: float[B, S, K, H], rotated; query heads in order belong to the kv heads in order.
    weight: float32[B, R], 0 for rows that do not count, such as padding.
    place: int32[B, R], where in the sequence the query rows stand; None: R = S, and row r stands at r.

  Returns:
    float32[B, N, S].
  """
  batch, rows, heads, head_dim = q.shape
  size = k.shape[1]
  grouped = q.reshape(batch, rows, k.shape[2], -1, head_dim)
  total = jnp.zeros((batch, heads, size), jnp.float32)
  for start, end in causal_blocks(rows):
    seen = end if place is None else size
    standing = jnp.arange(start, end)[None] if place is None else place[:, start:end]
    visible = jnp.arange(seen) <= standing[..., None]
    scores = jnp.einsum('brkgh,bskh->bkgrs', grouped[:, start:end], k[:, :seen], preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores * head_dim**-0.5, -jnp.inf), -1)
    received = jnp.einsum('bkgrs,br->bkgs', weights, weight[:, start:end], precision='highest')
    total = total.at[..., :seen].add(received.reshape(batch, heads, seen))
  return total


def hollow_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, image_start: jax.Array, image_index: jax.Array, window: int
) -> jax.Array:
  """Causal attention in which an image row sees the text before the image, and of the image only what is near.

  Keys that no row of a block of image queries sees are not computed: what is left is the text and a band of the image.

  Args:
    q: float[B, S, N, H]; k, v: float[B, S, K, H].
    image_start: int32[B], -1 for rows without image, whose text must fit into S - P.
    image_index: int32[B, P], which token of the whole image each image row is, ascending.
    window: an image row sees those up to `window - 1` before it, itself included.

  Returns:
    float[B, S, N, H].
  """
  num_image = image_index.shape[1]
  slots = q.shape[1] - num_image
  text_q, image_q = layout.split_rows(q, image_start, num_image)
  text_k, image_k = layout.split_rows(k, image_start, num_image)
  text_v, image_v = layout.split_rows(v, image_start, num_image)
  place = layout.text_places(image_start, num_image, slots)
  text = []
  for start, end in causal_blocks(slots):
    seen = end + num_image
    visible = jnp.arange(seen) <= place[:, start:end, None]
    text.append(jax.nn.dot_product_attention(text_q[:, start:end], k[:, :seen], v[:, :seen], mask=visible[:, None]))
  image = []
  size = max(SMALLEST_BLOCK, window // 2)
  for start in range(0, num_image, size):
    end, first = min(start + size, num_image), max(start - window + 1, 0)
    distance = image_index[:, start:end, None] - image_index[:, None, first:end]
    near = (distance >= 0) & (distance < window)
    before = jnp.broadcast_to(jnp.arange(slots) < image_start[:, None, None], (*near.shape[:2], slots))
    keys, values = (jnp.concatenate([t, x[:, first:end]], 1) for t, x in ((text_k, image_k), (text_v, image_v)))
    visible = jnp.concatenate([before, near], -1)
    image.append(jax.nn.dot_product_attention(image_q[:, start:end], keys, values, mask=visible[:, None]))
  return layout.join_rows(jnp.concatenate(text, 1), jnp.concatenate(image, 1), image_start)


def policy_attention(q: jax.Array, k: jax.Array, v: jax.Array, policy: jax.Array) -> jax.Array:
  """Causal attention in which key s takes part with weight `policy[s]`, and each query always sees itself.

  The authors' training softmax (golden record `unit_softmax`): the row maximum is over all visible keys, dropped ones
  included; `eps / S` is added to every key, those that are not visible too.

  Args:
    q: float[B, T, N, H]; k, v: float[B, T, K, H]; policy: float[B, T], 1 = keep, 0 = drop.

  Returns:
    float[B, T, N, H].
  """
  return _policy_attention(q, k, v, policy.astype(jnp.float32))


@jax.custom_vjp
def _policy_attention(q: jax.Array, k: jax.Array, v: jax.Array, policy: jax.Array) -> jax.Array:
  return _policy_forward(q, k, v, policy)[0]


def _policy_weights(
  q: jax.Array, k: jax.Array, policy: jax.Array, start: int, largest: jax.Array | None = None
) -> tuple[jax.Array, ...]:
  """Of a block of queries from `start` on: (exp(score - largest), what it is weighed with, each row's largest score).

  Args:
    q: float[B, T, K, G, H]; k: float[B, S, K, H]; policy: float32[B, S].
    largest: float32[B, K, G, T, 1] if it is known.
  """
  query, key = start + jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
  scores = jnp.einsum('btkgh,bskh->bkgts', q, k, preferred_element_type=jnp.float32)
  scores = jnp.where(key <= query, scores * q.shape[-1] ** -0.5, -jnp.inf)
  largest = scores.max(-1, keepdims=True) if largest is None else largest
  return jnp.exp(scores - largest), jnp.where(key == query, 1.0, policy[:, None, None, None]), largest


def _policy_forward(q, k, v, policy):
  batch, length, _, head_dim = q.shape
  grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
  # What eps gives to every key is one vector for all queries. So no score is computed for keys that are not visible.
  leaked = POLICY_EPS / length * v.astype(jnp.float32).sum(1)[:, None, :, None]
  blocks, kept = [], []
  for start, end in causal_blocks(length):
    exponentials, keep, largest = _policy_weights(grouped[:, start:end], k[:, :end], policy[:, :end], start)
    weights = exponentials * keep
    total = weights.sum(-1, keepdims=True) + POLICY_EPS
    out = jnp.einsum('bkgts,bskh->btkgh', weights.astype(v.dtype), v[:, :end], preferred_element_type=jnp.float32)
    blocks.append((out + leaked) / _by_query(total))
    kept.append((largest, total))
  out = jnp.concatenate(blocks, 1)
  return out.reshape(q.shape).astype(v.dtype), (q, k, v, policy, out, kept)


def _policy_backward(residuals, gradient):
  """Scores are computed again, so that no [T, S] matrix is kept."""
  q, k, v, policy, out, kept = residuals
  length, scale = q.shape[1], q.shape[-1] ** -0.5
  grouped, gradient = (x.reshape(out.shape) for x in (q, gradient))
  exact = gradient.astype(jnp.float32)
  along = (exact * out).sum(-1).transpose(0, 2, 3, 1)[..., None]  # [B, K, G, T, 1]
  leaked = POLICY_EPS / length * v.astype(jnp.float32).sum(1)[:, None, :, None]
  leaking = (exact * leaked).sum(-1).transpose(0, 2, 3, 1)[..., None]
  of_q, of_k, of_v, of_policy, of_leaked = [], 0.0, 0.0, 0.0, 0.0
  whole = lambda x: jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
  for (start, end), (largest, total) in zip(causal_blocks(length), kept):
    rows, keys = slice(start, end), slice(0, end)
    exponentials, keep, _ = _policy_weights(grouped[:, rows], k[:, keys], policy[:, keys], start, largest)
    is_largest = exponentials > NEARLY_ONE
    exponentials /= total
    along_v = jnp.einsum('btkgh,bskh->bkgts', gradient[:, rows], v[:, keys], preferred_element_type=jnp.float32)
    of_keep = exponentials * (along_v - along[..., rows, :])
    # The largest score takes part through eps alone: nearly all else cancels.
    through_largest = (leaking[..., rows, :] - POLICY_EPS * along[..., rows, :]) / total
    of_scores = ((of_keep * keep + jnp.where(is_largest, through_largest, 0)) * scale).astype(k.dtype)
    weights = (exponentials * keep).astype(v.dtype)
    own = jnp.arange(end) == jnp.arange(start, end)[:, None]
    of_q.append(jnp.einsum('bkgts,bskh->btkgh', of_scores, k[:, keys], preferred_element_type=jnp.float32))
    of_k += whole(jnp.einsum('bkgts,btkgh->bskh', of_scores, grouped[:, rows], preferred_element_type=jnp.float32))
    of_v += whole(jnp.einsum('bkgts,btkgh->bskh', weights, gradient[:, rows], preferred_element_type=jnp.float32))
    of_policy += whole(jnp.where(own, 0, of_keep).sum((1, 2, 3)))
    of_leaked += (exact[:, rows] / _by_query(total)).sum((1, 3))
  of_v += POLICY_EPS / length * of_leaked[:, None]
  of_q = jnp.concatenate(of_q, 1).reshape(q.shape)
  return of_q.astype(q.dtype), of_k.astype(k.dtype), of_v.astype(v.dtype), of_policy


def _by_query(x: jax.Array) -> jax.Array:
  """[B, K, G, T, 1] -> [B, T, K, G, 1]."""
  return x.transpose(0, 3, 1, 2, 4)


_policy_attention.defvjp(_policy_forward, _policy_backward)


def cached_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache_k: jax.Array | Int8,
  cache_v: jax.Array | Int8,
  cache_length: jax.Array,
  cache_first: jax.Array | None = None,
  arrangement: Arrangement = STACKED,
  image: jax.Array | None = None,
  image_seen: jax.Array | None = None,
  seen: jax.Array | None = None,
  among: jax.Array | None = None,
) -> jax.Array:
  """New tokens attend to the cache and, causally, to each other.

  The cache is read as it was before these tokens: their own keys are joined at the level of the scores, so
  the cache is neither copied nor written here.

  Args:
    q: float[B, T, N, H]; k, v: float[B, T, K, H] of the T new tokens.
    cache_k, cache_v: float[B, C, K, H], their axes as `arrangement` has them; of int8 ones the scales take part in float32.
    cache_length: int32[B], the first `cache_length[b]` slots of row b are real,
    cache_first: int32[B], but for the first `cache_first[b]`; None for none of them.
    image: float[B, M, 2, K, H], keys and values beside the cache; None for none.
    image_seen: bool[B], rows that see them.
    seen: bool[B, T, C], slots that each new token sees, instead of those up to `cache_length`, and among: bool[B, T, T], what each
      sees of the new ones; None for these.

  Returns:
    float[B, T, N, H].
  """
  batch, length, heads, head_dim = q.shape
  (cache_k, scale_k), (cache_v, scale_v) = _parts(cache_k, q.dtype), _parts(cache_v, v.dtype)
  slots = cache_k.shape[arrangement.keys.index('c')]
  if seen is None:
    seen = (jnp.arange(slots) < cache_length[:, None])[:, None]
    if cache_first is not None:
      seen = seen & (jnp.arange(slots) >= cache_first[:, None, None])
  if arrangement.flat:
    if length == 1:
      held = (cache_k, scale_k), (cache_v, scale_v)
      return _flat_cached_attention(q[:, 0], k[:, 0], v[:, 0], *held, seen[:, 0])[:, None]
    cache_k, cache_v = (x.reshape(batch, slots, *k.shape[2:]) for x in (cache_k, cache_v))  # for many tokens worth a copy
  grouped = q.reshape(batch, length, k.shape[2], -1, head_dim) * jnp.asarray(head_dim**-0.5, q.dtype)
  if arrangement.apart:  # `einsum` would give the cache as the first factor, and XLA's CPU compiler transpose it
    by_head = grouped.transpose(0, 2, 3, 1, 4)
    flat = by_head.reshape(batch, by_head.shape[1], -1, head_dim)
    old = jnp.matmul(flat, cache_k, preferred_element_type=jnp.float32).reshape(*by_head.shape[:4], slots)
  else:
    old = jnp.einsum('btkgh,bckh->bkgtc', grouped, cache_k, preferred_element_type=jnp.float32)
  if scale_k is not None:
    old *= scale_k[:, :, None, None]
  old = jnp.where(seen[:, None, None], old, -jnp.inf)
  new = jnp.einsum('btkgh,bskh->bkgts', grouped, k, preferred_element_type=jnp.float32)
  new = jnp.where(jnp.tril(jnp.ones((length, length), bool)) if among is None else among[:, None, None], new, -jnp.inf)
  parts = [old, new]
  if image is not None:
    beside = jnp.einsum('btkgh,bmkh->bkgtm', grouped, image[:, :, 0], preferred_element_type=jnp.float32)
    parts.append(jnp.where(image_seen[:, None, None, None, None], beside, -jnp.inf))
  weights = jax.nn.softmax(jnp.concatenate(parts, -1), -1)
  if scale_v is not None:
    weights = weights.at[..., :slots].multiply(scale_v[:, :, None, None])
  of_old, of_new, of_image = jnp.split(weights.astype(v.dtype), [slots, slots + length], -1)
  if arrangement.apart:
    out = jnp.matmul(of_old.reshape(*flat.shape[:3], slots), cache_v).reshape(by_head.shape).transpose(0, 3, 1, 2, 4)
  else:
    out = jnp.einsum('bkgtc,bckh->btkgh', of_old, cache_v)
  out += jnp.einsum('bkgts,bskh->btkgh', of_new, v)
  if image is not None:
    out += jnp.einsum('bkgtm,bmkh->btkgh', of_image, image[:, :, 1])
  return out.reshape(batch, length, heads, head_dim)


def _parts(held: jax.Array | Int8, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
  """What multiplies, and its scales float32[B, K, C]."""
  return (held.values.astype(dtype), held.scale) if isinstance(held, Int8) else (held, None)


def _flat_cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, held_k: tuple, held_v: tuple, real: jax.Array) -> jax.Array:
  """One new token, and a cache whose heads lie side by side: a matrix for each row.

  Every query head is spread over the places of all kv heads, zeros but for its own. So it is multiplied with much that is zero,
  which costs a matrix unit nothing: what takes its time is to be fed with the cache, and that is read once, as it lies.

  Args:
    q: float[B, N, H]; k, v: float[B, K, H]; real: bool[B, C], slots that are seen.
    held_k, held_v: float[B, C, K H], and scales float32[B, K, C] or None.

  Returns:
    float[B, N, H].
  """
  batch, heads, head_dim = q.shape
  (cache_k, scale_k), (cache_v, scale_v) = held_k, held_v
  grouped = q.reshape(batch, k.shape[1], -1, head_dim) * jnp.asarray(head_dim**-0.5, q.dtype)
  flat = grouped.reshape(q.shape)
  own = jnp.arange(cache_k.shape[-1]) // head_dim == jnp.arange(heads)[:, None] // grouped.shape[2]  # [N, K H]
  exact = 'highest' if q.dtype == jnp.float32 else None
  # [H, K H]: a product with it copies, and lays out as products do.
  repeat = jnp.tile(jnp.eye(head_dim, dtype=q.dtype), k.shape[1])
  spread = jnp.where(own, jnp.einsum('bnh,hx->bnx', flat, repeat, precision=exact), 0)
  of_heads = lambda scale: jnp.repeat(scale, grouped.shape[2], 1)  # [B, N, C]
  old = jnp.einsum('bnx,bcx->bnc', spread, cache_k, preferred_element_type=jnp.float32)
  old = jnp.where(real[:, None], old if scale_k is None else old * of_heads(scale_k), -jnp.inf)
  new = jnp.einsum('bkgh,bkh->bkg', grouped, k, preferred_element_type=jnp.float32).reshape(batch, heads, 1)
  largest = jnp.maximum(old.max(-1, keepdims=True), new)
  old, new = jnp.exp(old - largest), jnp.exp(new - largest)
  total = old.sum(-1, keepdims=True) + new
  of_old, of_new = old / total, (new / total).astype(v.dtype)
  of_old = (of_old if scale_v is None else of_old * of_heads(scale_v)).astype(v.dtype)
  out = jnp.where(own, jnp.einsum('bnc,bcx->bnx', of_old, cache_v), 0)
  out = jnp.einsum('bnx,hx->bnh', out, repeat, precision=exact)
  return out + (of_new.reshape(*grouped.shape[:3], 1) * v[:, :, None]).reshape(out.shape)
