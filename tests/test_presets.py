"""The published sizes, checked without allocating them."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from dynllava_jax import costs, presets, sharding
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import DENSE, MeshConfig, Stage
from dynllava_jax.models.dynllava import DynLlava, Prompt
from dynllava_jax.models.params import abstract_params, count_parameters, cut_params

DYNAMIC = (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.2, text_keep_budget=0.5))
FASTV = (Stage(), Stage(start=3, selector='uniform', image_keep_rate=0.25))  # same token counts as FastV K=3, R=75 %
CLIP_L = 303_507_456  # openai/clip-vit-large-patch14-336, vision part


@pytest.mark.parametrize(
  'cfg, decoder, projector',
  [
    (presets.LLAVA_1_5_7B, 6_738_415_616, 4096 * 1024 + 4096 + 4096**2 + 4096),
    (presets.LLAVA_1_5_13B, 13_015_864_320, 5120 * 1024 + 5120 + 5120**2 + 5120),
  ],
  ids=['7b', '13b'],
)
def test_parameter_counts(cfg, decoder, projector):
  params = sharding.unboxed(abstract_params(cfg, with_tail=True))
  assert count_parameters(params['llama']) == decoder
  assert count_parameters(params['projector']) == projector
  assert count_parameters(params['vision']) + count_parameters(params['vision_tail']) == CLIP_L


def test_the_last_vision_layer_is_not_part_of_the_program():
  params = sharding.unboxed(abstract_params(presets.LLAVA_1_5_7B, with_tail=True))
  assert params['vision']['layers']['fc1']['kernel'].shape[0] == 23
  assert params['vision_tail']['layers']['fc1']['kernel'].shape[0] == 1


@pytest.mark.parametrize('cfg', [presets.DYNAMIC_LLAVA_7B, presets.DYNAMIC_LLAVA_13B], ids=['7b', '13b'])
@pytest.mark.parametrize('stages', [DENSE, DYNAMIC], ids=['dense', 'dynamic'])
def test_cache_bytes_are_those_of_the_arrays(cfg, stages):
  spec = CacheSpec(max_new_tokens=256)
  size = 64 + cfg.vision.num_patches
  model = DynLlava(cfg, stages, jnp.bfloat16)
  array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
  prompt = Prompt(array(1, size), array(1), array(1), array(1, dtype=jnp.uint32))
  image = array(1, cfg.vision.num_patches, cfg.llama.hidden_size, dtype=jnp.bfloat16)
  params = jax.eval_shape(lambda p: cut_params(p, stages), sharding.unboxed(abstract_params(cfg)))
  _, traces, cache = jax.eval_shape(lambda p, a, b: model.apply({'params': p}, a, b, spec, method='prefill'), params, prompt, image)
  allocated = [2 * c.k.size * c.k.dtype.itemsize for c in cache.stages]
  assert allocated == costs.cache_bytes(cfg, stages, 64, spec, 2)
  per_token = 2 * cfg.llama.hidden_size * 2
  if stages is DYNAMIC:
    assert traces[1].kept_image.shape == (1, 115)
    assert allocated == [2 * (640 + 256) * per_token, (cfg.llama.num_layers - 2) * (179 + 128 + 1) * per_token]
  else:
    assert allocated == [cfg.llama.num_layers * (640 + 256) * per_token]


@pytest.mark.parametrize(
  'cfg, paper, true',
  [
    (presets.DYNAMIC_LLAVA_7B, (10.07, 2.49, 3.20), (7.63, 1.88, None)),
    (presets.DYNAMIC_LLAVA_13B, (19.60, 4.66, 5.96), (None, None, None)),
  ],
  ids=['7b', '13b'],
)
def test_flops_are_the_published_ones(cfg, paper, true):
  for stages, expected, expected_true in zip((DENSE, DYNAMIC, FASTV), paper, true):
    assert costs.paper_flops(costs.paper_setting(cfg, stages)) / 1e12 == pytest.approx(expected, abs=0.006)
    if expected_true:
      assert costs.decoder_flops(cfg, stages) / 1e12 == pytest.approx(expected_true, abs=0.006)


def test_7b_shardings_split_every_large_weight():
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
  boxed = abstract_params(presets.DYNAMIC_LLAVA_7B)
  places, shapes = sharding.shardings(boxed, mesh), sharding.unboxed(boxed)
  held = sum(math.prod(place.shard_shape(leaf.shape)) for place, leaf in zip(jax.tree.leaves(places), jax.tree.leaves(shapes)))
  assert held < 1.02 * count_parameters(shapes) / 8
  assert places['llama']['layers']['q'].spec == PartitionSpec(None, 'tensor', 'fsdp', None)
