"""Tokens drawn by chance: every row by settings of its own, as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.sampling import Sampling, Settings, draw, penalised, sample

KINDS = [Sampling(), Sampling(temperature=0.7), Sampling(temperature=2.0, top_k=3), Sampling(temperature=1.3, top_p=0.6),
         Sampling(temperature=1.0, top_k=5, top_p=0.9)]  # fmt: skip


def test_rows_of_a_batch_are_drawn_as_if_alone():
  logits = jax.random.normal(jax.random.key(0), (5, 40)) * 3
  column = lambda name: jnp.asarray([getattr(k, name) for k in KINDS])
  settings = Settings(column('temperature'), column('top_k'), column('top_p'))
  seed, drawn = jnp.arange(5, dtype=jnp.uint32), []
  together = jax.jit(draw)
  for step in range(40):
    drawn.append(np.asarray(together(logits, settings, seed, jnp.full(5, step))))
  drawn = np.stack(drawn, 1)
  for row, kind in enumerate(KINDS):
    alone = jax.jit(lambda step: sample(logits[row : row + 1], kind, seed[row : row + 1], step))
    assert drawn[row].tolist() == [int(alone(jnp.full(1, step))[0]) for step in range(40)]
  assert len(set(drawn[0])) == 1 and len(set(drawn[2])) <= 3 < len(set(drawn[1]))
  probs = np.sort(np.asarray(jax.nn.softmax(logits[3] / 1.3)))[::-1]
  nucleus = int(np.searchsorted(np.cumsum(probs), 0.6)) + 1
  assert set(drawn[3]) <= set(np.argsort(-np.asarray(logits[3]))[:nucleus].tolist())


def test_seen_tokens_become_less_likely():
  logits, seen = jnp.asarray([[2.0, -1.0, 3.0, -4.0]] * 2), jnp.asarray([[True, True, False, False]] * 2)
  out = penalised(logits, seen, jnp.asarray([2.0, 1.0]))
  np.testing.assert_array_equal(out, [[1.0, -2.0, 3.0, -4.0], [2.0, -1.0, 3.0, -4.0]])
