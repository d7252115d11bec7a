"""Which keys stay of one row, in float64 numpy from the definitions, with grouped heads and without padding."""

import numpy as np


def causal_weights(q, k):
  """q [P, N, H], k [P, K, H] -> softmax [N, P, P]; query heads in order belong to the kv heads in order."""
  scores = np.einsum('tnh,snh->nts', q, np.repeat(k, q.shape[1] // k.shape[1], 1)) / q.shape[-1] ** 0.5
  scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def rotation(position, head_dim, theta):
  half = head_dim // 2
  angle = position * theta ** (-np.arange(half) / half)
  top, side = np.diag(np.cos(angle)), np.diag(np.sin(angle))
  return np.block([[top, -side], [side, top]])


def kept(name, q, u, k, v, image, n, theta, window=64, kernel=5, n_sink=4, lag=128, n_future=512, cross_scoring=False):
  """Sorted places per kv head: of `image` (first, last + 1) or of the whole prompt if None, `n` of them; text besides an image."""
  size, heads = len(q), k.shape[1]
  group = q.shape[1] // heads
  by_group = lambda x: x.reshape(heads, group, *x.shape[1:]).mean(1)
  own = np.arange(size) if image is None else np.arange(*image)
  weights, forced = causal_weights(q, k), []
  if name in ('snapkv', 'pyramidkv'):
    asked = min(window, size) if image is None else min(max(size - image[1], 1), window)
    mean = by_group(weights[:, size - asked :].mean(1))[:, own]
    if image is None:
      forced, mean = list(range(size - 1, size - asked - 1, -1)), mean[:, : size - asked]
    scores = np.zeros((heads, len(own)))
    for j in range(mean.shape[1]):
      scores[:, j] = mean[:, max(j - kernel // 2, 0) : j + kernel // 2 + 1].sum(1) / kernel
  elif name == 'tova':
    forced = [size - 1] if image is None else []
    scores = np.tile(weights[:, -1].mean(0)[own], (heads, 1))
  elif name == 'observed_attention':
    scores = by_group(weights.sum(1) / np.arange(size, 0, -1))[:, own]
  elif name == 'knorm':
    scores = -np.linalg.norm(k, axis=-1).T[:, own]
  elif name == 'keydiff':
    unit = k[own] / np.linalg.norm(k[own], axis=-1, keepdims=True)
    anchor = unit.mean(0)
    scores = -np.einsum('skh,kh->ks', unit, anchor / np.linalg.norm(anchor, axis=-1, keepdims=True))
  elif name == 'streaming_llm':
    forced = list(range(min(n_sink, len(own)))) + list(range(len(own) - 1, n_sink - 1, -1))
    forced, scores = list(own[forced]), np.zeros((heads, len(own)))
  elif name == 'expected_attention':
    turn = np.mean([rotation(size + t, q.shape[-1], theta) for t in range(n_future)], 0)
    everyone = np.zeros((q.shape[1], size))
    for head in range(q.shape[1]):
      asked = u[n_sink:, head]
      spread = np.cov(asked.T, bias=True)
      keys = k[n_sink:, head // group]
      logits = keys @ turn @ asked.mean(0) / q.shape[-1] ** 0.5
      logits += np.einsum('sh,hj,sj->s', keys, turn @ spread @ turn.T, keys) / (2 * q.shape[-1])
      everyone[head, n_sink:] = softmax(logits)
    scores = (by_group(everyone) * np.linalg.norm(v, axis=-1).T)[:, own]
    forced = [j for j in range(n_sink) if j in own]
  elif name == 'lagkv':
    sinks = n_sink if image is None else 0
    forced, scores = list(range(sinks)), np.tile(np.arange(len(own)) / len(own), (heads, 1))
    parts = (len(own) - sinks) // lag
    if parts >= 2:
      begin = sinks + (parts - 1) * lag
      forced += list(own[: begin - 1 : -1])
      for j in range(parts - 1):
        here, behind = (slice(sinks + i * lag, sinks + (i + 1) * lag) for i in (j, j + 1))
        both = []
        for x in (k[own], v[own]):
          low, high = x[behind].min(0), x[behind].max(0)
          both.append(softmax(((x[here] - low) / (high - low)).std(-1, ddof=1).T))
        scores[:, here] = both[0] / 2 + both[1] / 2
        if not cross_scoring:
          scores[:, here] = scores[:, here].argsort(-1).argsort(-1) / lag
  outside = [] if image is None else [j for j in range(size) if j not in own]
  found = []
  for head in range(heads):
    rest = [j for j in own[np.argsort(-scores[head], kind='stable')] if j not in forced]
    found.append(sorted(outside + ([j for j in forced if j in own] + rest)[:n]))
  return found
