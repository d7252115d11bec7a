"""Perplexity as the long-answer evaluations of Dynamic-LLaVA define it (arXiv 2412.00876, section 4.3)."""

from collections.abc import Sequence

import numpy as np


def perplexity(log_probs: Sequence[float]) -> float:
  """exp of the mean negative log-probability of an answer's tokens, `</s>` included. `log_probs`: float[T], T > 0.

  Raises:
    FloatingPointError: a log-probability is not a number, or the result is not finite.
  """
  with np.errstate(over='ignore'):
    value = float(np.exp(-np.mean(np.asarray(log_probs, np.float64))))
  if not np.isfinite(value):
    raise FloatingPointError(
      f'the perplexity of an answer is {value}: the model gives log-probabilities such as {min(log_probs)}; are its weights whole?'
    )
  return value


def mean_perplexity(samples: Sequence[Sequence[float]]) -> float:
  """The reported value: perplexities are averaged over the rounds of a sample, then over samples (not over tokens)."""
  return float(np.mean([np.mean(rounds) for rounds in samples]))
