"""Batches of any size are answered by a bounded number of programs, each row as if it were given alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dynllava_jax import buckets, methods, presets, sharding
from dynllava_jax.config import MeshConfig, Stage
from dynllava_jax.generate import Generator, Sampling
from dynllava_jax.models.dynllava import Prompt

CFG = presets.TINY
STAGES = (Stage(), Stage(start=1, selector='dynamic', image_keep_rate=0.5, text_keep_budget=0.5))
IMAGE = methods.num_image_tokens(CFG)


def batch(rows, text):
  rng = np.random.default_rng(5)
  tokens = rng.integers(1, 60, (rows, text + IMAGE)).astype(np.int32)
  pixels = rng.integers(0, 256, (rows, *[CFG.vision.image_size] * 2, 3)).astype(np.uint8)
  length = IMAGE + 2 + np.arange(rows, dtype=np.int32) % (text - 2)
  start = np.where(np.arange(rows) == 1, -1, 1).astype(np.int32)
  return Prompt(tokens, length, start, np.arange(rows, dtype=np.uint32)), pixels


def test_sizes_of_buckets():
  rows = sorted({buckets.bucket(n, 1) for n in range(1, 65)})
  assert rows == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
  texts = {buckets.bucket(n, buckets.LEAST_TEXT) for n in range(1, 2049)}
  assert len(texts) == 15 and max(texts) == 2048
  assert all(n <= buckets.bucket(n, 16) <= max(16, 1.5 * n) for n in range(1, 2049))


@pytest.fixture(scope='module')
def generator(tiny_params):
  return Generator(CFG, STAGES, tiny_params, max_new_tokens=4, eos_id=7, sampling=Sampling(temperature=1.0))


def test_padded_answers_are_those_of_the_batch_as_it_is(generator):
  prompt, pixels = batch(5, 13)
  padded = generator(prompt, pixels)
  turn, kept_image = generator.start(prompt, pixels)
  exact = generator.decode(turn, prompt.seed, kept_image)[0]
  for field in dataclasses.fields(exact):
    a, b = getattr(padded, field.name), getattr(exact, field.name)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), a, b)
  assert padded.tokens.shape == (5, 4)


def test_batches_of_one_bucket_share_their_programs(generator):
  generator(*batch(6, 16))
  before = generator.compilations()
  for rows, text in ((5, 9), (6, 14), (5, 16)):
    assert generator(*batch(rows, text)).length.shape == (rows,)
  assert next(generator.stream(*batch(5, 12))).shape == (5,)
  assert generator.compilations() == before


def test_arrays_on_several_devices_stay_there():
  mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
  place = sharding.batch_sharding(mesh)
  prompt, pixels = jax.tree.map(lambda x: jax.device_put(x, place), batch(8, 20))
  padded, same = buckets.pad_prompt(prompt, pixels, IMAGE)
  assert padded.tokens.shape == (8, 24 + IMAGE) and padded.tokens.sharding.spec == PartitionSpec(('data', 'fsdp'))
  assert same is pixels and padded.length is prompt.length
  rows = buckets.pad_prompt(*batch(5, 16), IMAGE)[0]
  assert rows.seed.tolist() == [0, 1, 2, 3, 4, 4]
  jitted = jax.jit(lambda p, x: buckets.pad_prompt(p, x, IMAGE)[0].tokens)  # where nothing can be padded on the host
  assert jitted(*jax.tree.map(jnp.asarray, batch(5, 13))).shape == (5, 13 + IMAGE)
