"""Generated tokens that choose among image tokens: caching, neighbours and padding change nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from programs import program
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


@pytest.mark.slow
def test_prompts_see_all_of_the_image_and_generated_tokens_do_not(gating_params):
  """The first token of an answer comes out of the prompt; only behind it anything changes."""
  prompt, pixels = batch(ROWS[:1], numbers=[0])
  stages = RUNS['attention']
  free = tuple(dataclasses.replace(s, revisit=None) for s in stages)
  first, second = [], []
  for run in (stages, free):
    generator = Generator(CFG, run, gating_params, max_new_tokens=NEW, eos_id=None)
    turn, _ = generator.start(prompt, pixels)
    first.append(np.asarray(turn.logits))
    fed = first[0].argmax(-1).astype(np.int32)
    second.append(np.asarray(generator.step(turn, fed, np.ones(1, bool))[0].logits))
  np.testing.assert_allclose(*first, rtol=1e-5, atol=1e-5)
  assert np.abs(second[0] - second[1]).max() > 1e-4


@pytest.mark.slow
def test_what_a_word_looked_at_is_what_its_answer_was_made_with(gating_params):
  """`looked.follow` decodes as the generator does; it names patches that the stage still had, each once."""
  generator = Generator(CFG, RUNS['attention'], gating_params, max_new_tokens=NEW, eos_id=None)
  prompt, pixels = batch(ROWS[:1], numbers=[0])
  answer = jax.device_get(generator(prompt, pixels))
  tokens, looked = program('looked').follow(generator, prompt, pixels, None)
  np.testing.assert_array_equal(tokens, answer.tokens[0])
  _, kept = generator.start(prompt, pixels)
  assert len(looked) == NEW - 1
  for patches in looked:
    assert len(set(patches.tolist())) == K
    assert set(patches.tolist()) <= set(np.asarray(kept[2])[0].tolist())
