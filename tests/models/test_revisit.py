"""Generated tokens that choose among image tokens: caching, neighbours and padding change nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from test_invariants import CFG, NEW, ROWS, TEXT, batch

from dynllava_jax import sharding
from dynllava_jax.config import Piece, RelevanceConfig, Stage
from dynllava_jax.generate import Generator
from dynllava_jax.models.params import init_params

K = 3
CUT = (Stage(), Stage(start=1, selector='dynamic', image_tokens=8))
RUNS = {
  # A cut and a gate first, and the layer behind them chooses.
  'attention': (*CUT, Stage(start=2, revisit=Piece('attention', {'tokens': K}))),
  'each_layer': (Stage(), Stage(start=2, revisit=Piece('attention', {'tokens': K, 'each_layer': True}))),
  'transformer': (Stage(), dataclasses.replace(CUT[1], revisit=Piece('transformer', {'tokens': K}))),
}


def learned(score):
  """The tiny model with such a score."""
  return dataclasses.replace(CFG, relevance=RelevanceConfig(score=score, width=16))


@pytest.fixture(scope='module', params=list(RUNS))
def run(request, gating_params):
  cfg, params = CFG, gating_params
  if request.param == 'transformer':
    cfg = learned('transformer')
    fresh = sharding.unboxed(init_params(cfg, jax.random.key(1)))
    params = params | {'relevance': fresh['relevance']}
  generator = Generator(cfg, RUNS[request.param], params, max_new_tokens=NEW, eos_id=None)
  return generator, jax.device_get(generator(*batch()))


def test_cached_equals_uncached(run):
  generator, cached = run
  uncached = jax.device_get(generator.generate_uncached(*batch()))
  np.testing.assert_array_equal(cached.tokens, uncached.tokens)
  np.testing.assert_array_equal(cached.kept, uncached.kept)


def test_rows_do_not_depend_on_each_other_or_on_padding(run):
  generator, together = run
  order = [2, 0, 3, 1]
  shuffled = jax.device_get(generator(*batch([ROWS[i] for i in order], numbers=order)))
  np.testing.assert_array_equal(shuffled.tokens, together.tokens[order])
  np.testing.assert_array_equal(jax.device_get(generator(*batch(text=TEXT + 7))).tokens, together.tokens)
