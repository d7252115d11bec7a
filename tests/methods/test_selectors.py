"""What each selector keeps."""

import jax.numpy as jnp
import numpy as np
import pytest

from dynllava_jax import methods
from dynllava_jax.config import ConfigError


def inputs(num_image=16, seeds=(1, 2), predictor=None):
  return methods.SelectorInputs(
    image_hidden=jnp.arange(2.0 * num_image).reshape(2, num_image, 1), seed=jnp.array(seeds, jnp.uint32), image_predictor=predictor
  )


@pytest.mark.parametrize('name', ['uniform', 'random', 'dynamic'])
@pytest.mark.parametrize('budget', [1, 3, 16])
def test_budget_is_exact_ascending_and_distinct(name, budget):
  predictor = lambda x: jnp.concatenate([jnp.sin(x), jnp.cos(x)], -1)
  kept = np.asarray(methods.get(name).select(inputs(predictor=predictor), budget, None).index)
  assert kept.shape == (2, budget)
  assert (np.diff(kept, axis=1) > 0).all() and kept.min() >= 0 and kept.max() < 16


def test_uniform_takes_every_nth():
  np.testing.assert_array_equal(methods.get('uniform').select(inputs(), 4, None).index[0], [0, 4, 8, 12])
  np.testing.assert_array_equal(methods.get('uniform').select(inputs(), 3, None).index[0], [0, 5, 10])


def test_random_depends_on_the_rows_seed_alone():
  a = methods.get('random').select(inputs(seeds=(1, 2)), 5, None).index
  b = methods.get('random').select(inputs(seeds=(2, 1)), 5, None).index
  np.testing.assert_array_equal(a[0], b[1])
  assert (a[0] != a[1]).any()


def test_dynamic_keeps_the_largest_margins_and_judges_text():
  predictor = lambda x: jnp.concatenate([x % 7, jnp.zeros_like(x)], -1)
  np.testing.assert_array_equal(methods.get('dynamic').select(inputs(predictor=predictor), 2, None).index[0], [6, 13])
  margin = methods.get('dynamic').text_margin(jnp.array([[2.0], [-3.0]]), lambda x: jnp.concatenate([x, -x], -1))
  np.testing.assert_array_equal(margin, [4.0, -6.0])


def test_unknown_selector_names_the_known_ones():
  with pytest.raises(ConfigError, match='dynamic, fastv, pyramiddrop, random, sparsevlm, uniform'):
    methods.get('fastvv')
