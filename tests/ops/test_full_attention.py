"""The tower's attention, by whatever kernel, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dynllava_jax import presets
from dynllava_jax.models.clip import VisionTower
from dynllava_jax.ops.full_attention import full_attention, rows_for


def test_only_the_flash_kernel_wants_more_rows():
  assert [rows_for(kernel, 577) for kernel in ('xla', 'cudnn', 'flash')] == [577, 577, 640]
  assert rows_for('flash', 256) == 256


@pytest.mark.parametrize('length', [130, pytest.param(256, marks=pytest.mark.slow)])
def test_the_flash_kernel_computes_the_same(length):
  rows = rows_for('flash', length)
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, rows, 2, 16))
  expected = full_attention(*(x[:, :length] for x in (q, k, v)), length)
  with pltpu.force_tpu_interpret_mode():
    found = full_attention(q, k, v, length, 'flash')
  np.testing.assert_allclose(found[:, :length], expected, atol=3e-6)


@pytest.mark.slow
def test_a_tower_with_the_flash_kernel_has_the_same_features():
  cfg = presets.TINY.vision
  pixels = jax.random.normal(jax.random.key(1), (2, cfg.image_size, cfg.image_size, 3))
  plain = VisionTower(cfg, jnp.float32)
  params = jax.jit(plain.init)(jax.random.key(0), pixels)
  with pltpu.force_tpu_interpret_mode():
    found = jax.jit(VisionTower(cfg, jnp.float32, kernel='flash').apply)(params, pixels)
  np.testing.assert_allclose(found.features, plain.apply(params, pixels).features, atol=2e-5)
