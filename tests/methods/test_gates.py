"""Gates of generated text: the running share, its guard and its ties, what each scores, and the cache slots that follow from it."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynllava_jax import cache as kv
from dynllava_jax import methods
from dynllava_jax.config import ConfigError, Piece, Stage
from dynllava_jax.methods.gate import Fed, Gate, GateOptions, judge, new_state
from dynllava_jax.presets import TINY

T = 64
BY_TOKEN = Gate(score=lambda fed, state, options: fed.hidden[:, 0])  # whatever a stream of numbers says


def run(streams: np.ndarray, options: GateOptions, gate: Gate = BY_TOKEN, active: np.ndarray | None = None):
  """float32[B, N] scores, fed one by one: (bool[N, B] decisions as they fall, the state at the end)."""
  rows, steps = streams.shape
  active = np.ones((steps, rows), bool) if active is None else active

  def step(state, inputs):
    score, on = inputs
    keep, _, state = judge(gate, options, Fed(hidden=score[:, None], token=score.astype(jnp.int32)), state, on)
    return state, keep

  start = new_state(gate, options, rows, steps, 1)
  state, keep = jax.jit(lambda s, a: jax.lax.scan(step, start, (s, a)))(streams.T, active)
  return np.asarray(keep), jax.device_get(state)


def streams(kind: str, rows: int = 300) -> np.ndarray:
  rng = np.random.default_rng(5)
  noise = rng.normal(size=(rows, T)).astype(np.float32)
  return {'iid': noise, 'drift': noise.cumsum(1), 'ties': (rng.random((rows, T)) < 0.1).astype(np.float32)}[kind]


@pytest.mark.parametrize('kind', ['iid', 'drift', 'ties'])
@pytest.mark.parametrize('share, sinks, window', [(0.5, 0, 0), (0.5, 4, 4), (0.25, 2, 4)])
def test_every_row_is_within_two_points_of_its_share(kind, share, sinks, window):
  _, state = run(streams(kind), GateOptions(share=share, gain=0.5, sinks=sinks, window=window))
  held = state.kept.mean(1)
  assert abs(held - share).max() <= 0.02, abs(held - share).max()
  assert state.kept[:, :sinks].all() and state.kept[:, T - window :].all()


def test_without_feedback_the_share_is_missed():
  """So the test above can fail."""
  _, state = run(streams('drift'), GateOptions(share=0.5, gain=0.0))
  assert abs(state.kept.mean(1) - 0.5).max() > 0.2


def test_the_rule_is_that_of_a_plain_loop():
  options = GateOptions(share=0.4, gain=0.25, sinks=1, window=2)
  scores = np.round(streams('iid', 20), 1)
  _, state = run(scores, options)
  for row, kept in zip(scores, state.kept):
    held = [True] * T
    for number in range(1, T - 2):
      rank = (np.sum(row[:number] <= row[number]) + 0.5) / (number + 1)
      missing = 0.4 * (number + 2) - (sum(held[:number]) + 2)
      held[number] = rank >= 1 - min(max(0.4 + 0.25 * missing, 0), 1)
    np.testing.assert_array_equal(kept, held)


def test_a_replay_decides_the_same_and_a_row_alone_too():
  options = GateOptions(share=0.5, window=3)
  scores = streams('drift', 8)[:, :24]
  _, state = run(scores, options)
  _, again = run(scores[[3, 1]], options)
  np.testing.assert_array_equal(again.kept, state.kept[[3, 1]])
  # A row that pauses is where it was: the same tokens at other steps.
  active = np.ones((48, 8), bool)
  active[1::2] = False
  _, paused = run(np.repeat(scores, 2, 1), options, active=active)
  np.testing.assert_array_equal(paused.kept[:, :24], state.kept)
  np.testing.assert_array_equal(paused.fed, 24)


def test_a_number_as_threshold_judges_when_the_window_is_left():
  keep, state = run(np.array([[5.0, -1, 2, -3, 4, -5]], np.float32), GateOptions(threshold=0.0, sinks=2, window=2))
  np.testing.assert_array_equal(keep[:, 0], [True, True, True, True, True, False])  # the sinks, then 2.0 and -3.0 when they leave
  np.testing.assert_array_equal(state.kept, [[True, True, True, False, True, True]])


def scored(name: str, tokens, hidden=None, told=None, **options):
  """What a gate of `methods` scores a stream of one row, int[N]."""
  gate, options = methods.bound(Piece(name, options), 'gate')
  hidden = np.eye(8, dtype=np.float32)[np.asarray(tokens) % 8] if hidden is None else np.asarray(hidden, np.float32)
  state = new_state(gate, options, 1, len(tokens), hidden.shape[1])
  step = jax.jit(lambda fed, state: judge(gate, options, fed, state, jnp.array([True]))[2])
  for i, token in enumerate(tokens):
    fed = Fed(hidden=hidden[None, i], token=jnp.array([token]), told=None if told is None else jnp.asarray(told[i])[None])
    state = step(fed, state)
  return np.asarray(state.scores)[0]


def test_frequency_counts_the_context_or_reads_a_corpus(tmp_path):
  np.testing.assert_array_equal(scored('frequency', [3, 3, 5, 3]), [0, -1, 0, -2])
  table = tmp_path / 'token_counts.npy'
  np.save(table, np.array([0, 0, 0, 7, 0, 1]))
  expected = -np.log(np.array([8, 8, 2, 1]) / 14)
  np.testing.assert_allclose(scored('frequency', [3, 3, 5, 4], table=str(table)), expected, rtol=1e-6)
  for bad in (np.zeros(3, int), np.ones(3), np.ones((2, 2), int)):
    np.save(tmp_path / 'bad.npy', bad)
    methods.frequency.read.cache_clear()
    with pytest.raises(ConfigError, match='bad.npy.* expected a count for each token id'):
      scored('frequency', [1], table=str(tmp_path / 'bad.npy'))
  np.savez(tmp_path / 'several.npz', a=np.ones(3, int))
  (tmp_path / 'text.npy').write_text('hello')
  os.mkfifo(tmp_path / 'pipe')
  for name in ('nowhere.npy', 'several.npz', 'text.npy', 'pipe', '.'):
    with pytest.raises(ConfigError, match=f'{name}.*data preparation writes one'):
      scored('frequency', [1], table=str(tmp_path / name))


def test_novelty_is_the_distance_to_what_is_held():
  along = lambda degrees: [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]
  hidden = [along(a) for a in (0, 90, 60, 0)]
  cosine = lambda degrees: 1 - np.cos(np.radians(degrees))
  # A threshold of 0.6 drops the third, 30 degrees from the second; the last one is compared with the first.
  np.testing.assert_allclose(scored('novelty', range(4), hidden, threshold=0.6), [2, 1, cosine(30), 0], atol=1e-6)
  hidden[3] = along(60)
  np.testing.assert_allclose(scored('novelty', range(4), hidden, threshold=0.6)[3], cosine(30), atol=1e-6)
  np.testing.assert_allclose(scored('novelty', range(4), hidden, threshold=0.6, against='all')[3], 0, atol=1e-6)


def test_surprisal_and_entropy_are_what_was_told():
  told = [[1.5, 0.25], [0.5, 2.0]]
  np.testing.assert_array_equal(scored('surprisal', [1, 2], told=told), [1.5, 0.5])
  np.testing.assert_array_equal(scored('entropy', [1, 2], told=told), [0.25, 2.0])


def test_chance_is_the_same_again_and_uniform():
  drawn = scored('random', list(range(64)))
  np.testing.assert_array_equal(drawn, scored('random', list(range(64))))
  assert 0.35 < drawn.mean() < 0.65 and len(set(drawn.tolist())) == 64


def window_cache(budget=1.0, window=2):
  zeros = jnp.zeros((1, 1, 12, 1, 1))
  spec = kv.CacheSpec(max_new_tokens=8)
  return kv.from_prompt(zeros, zeros, jnp.array([2]), gated=True, text_keep_budget=budget, spec=spec, window=window)


def fed(cache, decisions, margins=None):
  """Numbers 1, 2, ... as keys, with the decision that falls while each is fed."""
  append = jax.jit(kv.append_judged)
  for i, keep in enumerate(decisions):
    k = jnp.full((1, 1, 1, 1, 1), float(i + 1))
    margin = jnp.inf if margins is None else margins[i]
    cache = append(cache, k, -k, jnp.array([keep]), jnp.array([margin], jnp.float32), jnp.array([True]), jnp.array([i]))
  return cache


def visible(cache):
  return sorted(np.asarray(cache.k)[0, 0, 2 : int(cache.length[0]), 0, 0].tolist())


def test_a_dropped_token_gives_its_slot_to_the_newest():
  cache = fed(window_cache(), [True, True, False, True])  # the first is dropped when the third is fed
  assert visible(cache) == [2, 3, 4]
  cache = fed(window_cache(), [True, True, True, False, False])  # then the second and the third
  assert visible(cache) == [1, 4, 5]
  np.testing.assert_array_equal(cache.generated, [3])


def test_a_full_row_gives_up_the_weakest_that_was_judged():
  cache = fed(window_cache(budget=0.5), [True] * 6, [np.inf, np.inf, 3.0, 1.0, 2.0, 5.0])
  assert visible(cache) == [1, 4, 5, 6]  # room for 4: of the judged 3, 1, 2 and 5 those of 1 and 2 went
  np.testing.assert_array_equal(cache.evicted, [2])


def test_a_run_judges_once_and_by_what_the_model_has():
  at = lambda *stages: methods.check_run(TINY, (Stage(), *stages))
  novelty, predictor = Piece('novelty', {'share': 0.5}), Piece('predictor')
  at(Stage(start=1, gate=novelty), Stage(start=2, selector='uniform', image_keep_rate=0.5))
  at(Stage(start=1, selector='dynamic', image_keep_rate=0.5, gate=novelty))
  with pytest.raises(ConfigError, match='layer 1: gate novelty: generated tokens are judged at layer 2 too'):
    at(Stage(start=1, gate=novelty), Stage(start=2, selector='dynamic', image_keep_rate=0.5))
  with pytest.raises(ConfigError, match='gate predictor: needs a text predictor'):
    methods.check_run(dataclasses.replace(TINY, predictor=None), (Stage(gate=predictor),))
  with pytest.raises(ConfigError, match='recency keeps a window'):
    at(Stage(start=1, gate=Piece('recency', {'share': 0.5})))
