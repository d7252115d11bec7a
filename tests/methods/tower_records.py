"""What the recorded vision tower gives for the recorded images, for tests of methods behind it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import GOLDEN

from dynllava_jax.convert.records.bases import Base, open_record
from dynllava_jax.methods.base import TowerNeeds, TowerOutput
from dynllava_jax.models.clip import VisionTower

RECORDS = GOLDEN / 'methods'


@functools.cache
def base() -> Base:
  """The recorded language model with the deeper tower, and its case."""
  return open_record(RECORDS / 'visionzip', None).base('../../public_b/checkpoint', '../clip_deep')


@functools.cache
def case(method: str) -> dict[str, np.ndarray]:
  """The recorded arrays of a method."""
  return open_record(RECORDS / method, None).case


@functools.cache
def towers() -> TowerOutput:
  """For both recorded images, with attention and keys of all blocks; features are those of block L-2."""
  needs = TowerNeeds(class_feature=True, class_attention=tuple(range(6)), key_mean=(3, 4, 5))
  vision, params = base().info.model.vision, base().params
  whole = dataclasses.replace(vision, select_layer=-1)
  layers = jax.tree.map(lambda *x: jnp.concatenate(x), params['vision']['layers'], params['vision_tail']['layers'])
  pixels = jnp.asarray(base().case['pixel_values']).transpose(0, 2, 3, 1)[:2]
  run = lambda cfg, params, needs: jax.jit(VisionTower(cfg, jnp.float32, needs).apply)({'params': params}, pixels)
  seen = run(whole, params['vision'] | {'layers': layers}, needs)
  own = run(vision, params['vision'], TowerNeeds(class_feature=True))
  return dataclasses.replace(seen, features=own.features, class_feature=own.class_feature)


def at_block(tower: TowerOutput, attention: int = 4, keys: int = 4) -> TowerOutput:
  """With rows of these blocks in place of those of block L-2, and no others."""
  one = lambda by_block, block: {4: by_block[block]}
  return dataclasses.replace(tower, class_attention=one(tower.class_attention, attention), key_mean=one(tower.key_mean, keys))
