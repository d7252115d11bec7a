"""A LLaMA decoder with grouped queries in a few lines of float64 numpy: what tests compare the sites of the real one with."""

import numpy as np


def norm(x, scale, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotate(x, positions, theta):
  """x [S, N, H], rotated."""
  half = x.shape[-1] // 2
  angles = positions[:, None] * theta ** (-np.arange(half) / half)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
  return np.concatenate([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


def layer(x, params, index, cfg, positions, visible=None):
  """x [S, D] through one layer: (stream behind it, softmax weights [N, S, S], rotated keys and values [K, S, H])."""
  p = {k: np.asarray(v['scale'] if isinstance(v, dict) else v, np.float64)[index] for k, v in params['layers'].items()}
  y = norm(x, p['attention_norm'], cfg.rms_norm_eps)
  q, k, v = (np.einsum('sd,ndh->snh', y, p[name]) for name in 'qkv')
  q, k = rotate(q, positions, cfg.rope_theta), rotate(k, positions, cfg.rope_theta)
  group = cfg.num_heads // cfg.num_kv_heads
  scores = np.einsum('tnh,snh->nts', q, np.repeat(k, group, 1)) / cfg.head_dim**0.5
  scores = np.where(np.tri(len(x), dtype=bool) if visible is None else visible, scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  x = x + np.einsum('nts,snh,nhd->td', weights, np.repeat(v, group, 1), p['o'])
  y = norm(x, p['mlp_norm'], cfg.rms_norm_eps)
  gate = y @ p['gate']
  x = x + (gate / (1 + np.exp(-gate)) * (y @ p['up'])) @ p['down']
  return x, weights, k.swapaxes(0, 1), v.swapaxes(0, 1)
