"""Dynamic Pyramid Network: pooling by hand, routes decided on the host, the record, and what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from dynllava_jax import methods, presets
from dynllava_jax.config import ConfigError, PyramidConfig, Stage
from dynllava_jax.convert.records import pyramid
from dynllava_jax.convert.records.bases import open_record
from dynllava_jax.methods import SelectorInputs, dpn
from dynllava_jax.models.batch import Prompt
from dynllava_jax.models.pyramid import first_router

CFG = PyramidConfig(layers=(1, 2, 3), kernels=((1, 2, 4), (1, 2, 4), (1, 2)), router_id=9)


@pytest.mark.slow
def test_every_recorded_quantity_agrees():
  record = open_record(GOLDEN / 'methods' / 'dpn', None)
  found = list(pyramid.verify(record, alone=False))
  assert [str(q) for q in found if not q.ok] == []
  compared = {q.name.rpartition(': ')[2].partition('[')[0] for q in found}
  given = ('ids', 'labels', 'image_features', 'train/gumbel', 'train/draws', 'train/routing_loss')
  assert [k for k in record.case if k not in compared and k not in given and not k.endswith('prompt_ids')] == []


def test_squares_become_their_largest_numbers():
  image = jnp.asarray(np.random.default_rng(1).permutation(49).astype(np.float32).reshape(1, 49, 1))
  grid = np.asarray(image).reshape(7, 7)
  pooled, first = dpn.pool(image, dpn.Options(kernel=2))
  np.testing.assert_array_equal(pooled.reshape(3, 3), grid[:6, :6].reshape(3, 2, 3, 2).max((1, 3)))
  assert first.tolist() == [0, 2, 4, 14, 16, 18, 28, 30, 32]
  padded = np.pad(grid, (0, 1), constant_values=-np.inf)
  pooled, first = dpn.pool(image, dpn.Options(kernel=2, ceil=True))
  np.testing.assert_array_equal(pooled.reshape(4, 4), padded.reshape(4, 2, 4, 2).max((1, 3)))
  assert first.tolist()[-4:] == [42, 44, 46, 48]
  pooled, _ = dpn.pool(image, dpn.Options(kernel=1))
  np.testing.assert_array_equal(pooled, image)


def test_what_is_pooled_is_multiplied_by_the_likelihood_of_its_kernel_unpooled_tokens_too():
  image = jnp.ones((2, 16, 3))
  routes = lambda: ((1, 2, 4), jnp.asarray([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]))
  inputs = SelectorInputs(image_hidden=image, seed=jnp.zeros(2, jnp.uint32), routes=routes)
  for kernel, budget, column in ((1, 16, 0), (2, 4, 1), (4, 1, 2)):
    chosen = dpn.select(inputs, budget, dpn.Options(kernel=kernel))
    np.testing.assert_array_equal(chosen.vectors[:, 0, 0], routes()[1][:, column])
  with pytest.raises(ConfigError, match='kernel 2 leaves 4 of 16 image tokens, not 8'):
    dpn.select(inputs, 8, dpn.Options(kernel=2))
  with pytest.raises(ConfigError, match=r'the router knows the kernels \[1, 2, 4\], the stage asks for 3'):
    dpn.select(inputs, 1, dpn.Options(kernel=3))
  with pytest.raises(ConfigError, match='15 image tokens are no square grid'):
    dpn.pool(image[:, :15], dpn.Options(kernel=1))


def test_runs_without_a_router_in_front_of_the_layer_are_refused():
  stages = (Stage(), Stage(start=2, selector='dpn', image_tokens=4, options={'kernel': 2}))
  for model, held in (
    (presets.TINY, 'none'),
    (dataclasses.replace(presets.TINY, dpn=PyramidConfig(layers=(1,), kernels=((2,),))), '.1'),
  ):
    with pytest.raises(ConfigError, match=f"stage at layer 2: selector 'dpn' needs a pooling router .* has .*{held}"):
      methods.check_run(model, stages)
  with pytest.raises(ConfigError, match='is for training'):
    dpn.refuse(None, 4, dpn.RoutedOptions())


def test_routes_are_stage_lists():
  stages = dpn.route_stages(CFG, 144, (1, 4, 0))
  assert [(s.start, s.selector, s.image_tokens) for s in stages] == [(0, 'all', 0), (1, 'dpn', 144), (2, 'dpn', 9)]
  assert dpn.route_stages(CFG, 49, (2, 1, 0), ceil=True)[1].image_tokens == 16


def test_rows_are_asked_together_as_long_as_they_agree():
  """A grid of fewer than 16 tokens is left alone, and its row is not asked; neither is one without image."""
  likely = [[0, 1, 0], [2, 1, 0], [2, 2, 1], [0, 0, 1]]  # kernels by number
  asked = []

  def probe(route, rows):
    asked.append((route, rows))
    return [np.eye(3)[[likely[row][depth] for row in rows]] for depth in range(3)]

  assert dpn.routes_of(CFG, 144, [True] * 4 + [False], probe) == [(1, 2, 1), (4, 0, 0), (4, 0, 0), (1, 1, 2), (4, 0, 0)]
  assert asked[0] == ((1, 1, 1), [0, 1, 2, 3]) and ((1, 1, 1), [0, 3]) in asked and not any(route[:1] == (4,) for route, _ in asked)


def test_the_first_router_token_behind_the_image_counts():
  tokens = np.zeros((2, 24), np.int32)
  tokens[0, [0, 18, 20]] = tokens[1, [3, 4]] = 9
  prompt = Prompt(jnp.asarray(tokens), jnp.asarray([21, 5]), jnp.asarray([1, -1]), jnp.zeros(2, jnp.uint32))
  left = jnp.asarray([[0, 1, 5, 17, 18, 19, 20, -1], [0, 1, 2, 3, 4, -1, -1, -1]])
  x = jnp.broadcast_to(left[..., None], (2, 8, 3)).astype(jnp.float32)
  assert first_router(x, left, prompt, 9, 16)[0, 0] == 18
