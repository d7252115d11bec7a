"""Runs whose generated tokens are judged by a gate of their own: with and without a cache, together and alone, turn by turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_invariants import CFG, NEW, ROWS, batch

from dynllava_jax.config import ConfigError, Piece, Stage
from dynllava_jax.generate import Generator
from dynllava_jax.serving.stepping import of_tokens

GUARD = {'share': 0.5, 'sinks': 1, 'window': 2}
RUNS = {
  # A window, and a later stage that cuts and revisits: what a gate decides holds behind it too.
  'surprisal': (
    Stage(),
    Stage(start=1, gate=Piece('surprisal', GUARD)),
    Stage(start=2, selector='uniform', image_tokens=8, revisit=Piece('attention', {'tokens': 3})),
  ),
  'novelty': (Stage(), Stage(start=2, selector='uniform', image_tokens=8, gate=Piece('novelty', {'share': 0.4}))),
}


@pytest.fixture(scope='module', params=list(RUNS))
def run(request, tiny_params):
  generator = Generator(CFG, RUNS[request.param], tiny_params, max_new_tokens=NEW, eos_id=None)
  return generator, jax.device_get(generator(*batch()))


def test_cached_equals_uncached(run):
  generator, cached = run
  uncached = jax.device_get(generator.generate_uncached(*batch()))
  np.testing.assert_array_equal(cached.tokens, uncached.tokens)
  np.testing.assert_array_equal(cached.kept, uncached.kept)
  np.testing.assert_allclose(cached.margin, uncached.margin, atol=1e-4)
  assert (~cached.kept).sum() > 0


def test_given_answers_are_judged_as_generated_ones_and_rows_do_not_depend_on_each_other(run):
  generator, together = run
  order = [2, 0, 3, 1]
  turn, _ = generator.start(*batch([ROWS[i] for i in order], numbers=order))
  forced, turn = generator.force(turn, jnp.asarray(together.tokens[order]), jnp.full(len(ROWS), NEW))
  assert forced.best.all()
  np.testing.assert_array_equal(forced.kept, together.kept[order])
  last = turn.cache.stages[-1]
  window = generator.judged_later
  np.testing.assert_array_equal(last.generated, together.kept[order][:, : NEW - 1].sum(1))
  assert window == (0 if last.recent is None else last.recent.shape[1])


def test_what_was_told_token_by_token_is_put_where_it_belongs():
  """Decisions about tokens of an earlier answer are not this one's, and those not judged are held."""
  assert of_tokens([False, True, False, True], 2) == [False, True, True, True]
  assert of_tokens([True], 2) == [True] and of_tokens([False, True], 0) == [False, True]


def test_a_guard_that_fills_the_room_is_refused(tiny_params):
  stages = (Stage(), Stage(start=2, text_keep_budget=0.3, gate=Piece('novelty', {'share': 0.3, 'window': 4})))
  generator = Generator(CFG, stages, tiny_params, max_new_tokens=NEW, eos_id=None)
  with pytest.raises(ConfigError, match='gate novelty guards 4 tokens, but text_keep_budget 0.3 leaves room for 3 of 10'):
    generator(*batch())
