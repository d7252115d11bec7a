"""What generation gives: a conversation so far, answers, given answers read.

Axes: B batch, T = max_new_tokens, V vocabulary, M kept image tokens.
"""

import dataclasses

import jax

from dynllava_jax.cache import Cache

PAD = 0  # token after the end of a row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turn:
  """A conversation so far: the cache and float32[B, V] logits of the token to come."""

  cache: Cache
  logits: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
  """Answers of a batch.

  Attributes:
    tokens: int32[B, T], `PAD` after a row's end. The last real token was never fed to the model.
    length: int32[B], real tokens, the end token included.
    kept: bool[B, T], whether the gate kept each fed token (True where nothing was judged).
    margin: float32[B, T], keep minus drop logit behind it; +inf where nothing was judged.
    kept_image: tuple of int32[B, M], patches of the image tokens that entered each stage; of tokens that a reducer made the
      patch that each stands for, -1 for the class token. Empty for uncached decoding.
    evicted: int32[B], kept tokens given up because a bounded cache was full; of layers that prune their context tokens of any kind,
      added up over the layers.
    layers: int32[B, T], decoder layers that each token was drawn behind; None in runs without exits.
    finite: bool[B], whether all logits that tokens were drawn from, and all margins, were numbers.
  """

  tokens: jax.Array
  length: jax.Array
  kept: jax.Array
  margin: jax.Array
  kept_image: tuple[jax.Array, ...]
  evicted: jax.Array
  finite: jax.Array
  layers: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forced:
  """Given answers of a batch, read as if the model had generated them.

  Attributes:
    log_prob: float32[B, T] of each given token, 0 beyond a row's end.
    best: bool[B, T], whether greedy decoding would have chosen it; False beyond the end.
    kept: bool[B, T], as in `Generated`.
    evicted: int32[B], as in `Generated`, over all turns so far.
  """

  log_prob: jax.Array
  best: jax.Array
  kept: jax.Array
  evicted: jax.Array
