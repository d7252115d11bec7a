"""Choosing tokens: fixed-budget top-k for inference, straight-through Gumbel-softmax for training.

Predictor outputs have two columns: column 0 = keep, column 1 = drop.
"""

import jax
import jax.numpy as jnp


def keep_margin(logits: jax.Array) -> jax.Array:
  """float32[...] keep minus drop of predictor logits float[..., 2]; a token is kept when it is > 0."""
  logits = logits.astype(jnp.float32)
  return logits[..., 0] - logits[..., 1]


def top_indices(scores: jax.Array, budget: int) -> jax.Array:
  """Indices of the `budget` largest scores, ascending: int32[B, M] from float[B, P]. Ties: lowest index."""
  return jnp.sort(jax.lax.top_k(scores, budget)[1], axis=-1).astype(jnp.int32)


def gumbel_keep(logits: jax.Array, noise: jax.Array, tau: jax.Array) -> jax.Array:
  """Straight-through hard Gumbel-softmax sample of the keep decision (arXiv 1611.01144).

  Args:
    logits: float[..., 2]; noise: float[..., 2] of Gumbel(0, 1); tau: temperature.

  Returns:
    float32[...], exactly 0 or 1, with the gradient of the soft sample. A tie keeps.
  """
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
  soft = jax.nn.softmax((log_probs + noise) / tau, -1)[..., 0]
  perturbed = log_probs + noise
  hard = (perturbed[..., 0] >= perturbed[..., 1]).astype(jnp.float32)
  return hard - jax.lax.stop_gradient(soft) + soft


def threshold_keep(scores: jax.Array) -> jax.Array:
  """float32[...], 1 where a score is above 0, else 0, with the gradient of its sigmoid."""
  soft = jax.nn.sigmoid(scores.astype(jnp.float32))
  return (scores > 0).astype(jnp.float32) - jax.lax.stop_gradient(soft) + soft
