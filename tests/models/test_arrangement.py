"""Stacked, tiled or apart, a run computes the same; and what lies apart is not copied for every token."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_invariants import CFG, DYNAMIC, NEW, batch
from test_sites import COMPRESSING, RECYCLING, SELECTING

from dynllava_jax import arrangement
from dynllava_jax import cache as kv
from dynllava_jax.arrangement import APART, CUDA, STACKED, TILED, best_for
from dynllava_jax.config import DENSE
from dynllava_jax.generate import Generator
from dynllava_jax.models.params import cut_params


def test_one_cpu_lies_apart_and_one_tpu_in_tiles():
  here = jax.devices()
  assert arrangement.best(here[:1]) == APART and arrangement.best(here[:2]) == STACKED
  tpu = types.SimpleNamespace(platform='tpu')
  assert arrangement.best([tpu]) == TILED and arrangement.best([tpu, tpu]) == STACKED
  gpu = lambda kind, capability: types.SimpleNamespace(platform='gpu', device_kind=kind, compute_capability=capability)
  assert arrangement.best([gpu('NVIDIA A100-SXM4-80GB', '8.0')]) == CUDA
  assert arrangement.best([gpu('NVIDIA GeForce RTX 2080 Ti', '7.5')]) == arrangement.best([gpu('AMD MI300X', 'gfx942')]) == STACKED
  assert best_for({'a': np.zeros(2)}) == APART
  split = jax.device_put(jnp.zeros(8), jax.sharding.NamedSharding(jax.make_mesh((8,), ('x',)), jax.sharding.PartitionSpec('x')))
  assert best_for({'a': jnp.zeros(2), 'b': split}) == STACKED


def test_projections_are_joined_and_parted(tiny_params):
  first = cut_params(tiny_params, DENSE, APART)['llama']['stage_0_0']['qkv']
  parts = arrangement.parted_projections(first, CFG.llama.num_heads, CFG.llama.num_kv_heads)
  for name, part in zip('qkv', parts, strict=True):
    np.testing.assert_array_equal(part, tiny_params['llama']['layers'][name][0])


@pytest.mark.slow
@pytest.mark.parametrize(
  'stages', [DYNAMIC, SELECTING, RECYCLING, COMPRESSING], ids=['dynamic', 'selecting', 'recycling', 'compressing']
)
def test_all_compute_the_same(stages, tiny_params):
  """Prompt, answer and the cache behind it."""
  found = []
  for lies in (STACKED, dataclasses.replace(TILED, tower='xla'), APART):  # the kernel is for TPUs
    generator = Generator(CFG, stages, tiny_params, max_new_tokens=NEW, eos_id=None, arrangement=lies)
    prompt, pixels = batch()
    turn, kept_image = generator.start(prompt, pixels)
    logits = np.asarray(turn.logits)
    answer, cache = generator.decode(turn, prompt.seed, kept_image)
    assert all(stage.arrangement == lies for stage in cache.stages)
    found.append((logits, answer, [kv.stacked(stage, CFG.llama.num_kv_heads) for stage in cache.stages]))
  logits, answer, cache = found[0]
  for other_logits, other_answer, other_cache in found[1:]:
    np.testing.assert_allclose(logits, other_logits, atol=1e-4)
    for field in ('tokens', 'length', 'kept', 'evicted', 'kept_image'):
      jax.tree.map(np.testing.assert_array_equal, getattr(answer, field), getattr(other_answer, field))
    for a, b in zip(cache, other_cache, strict=True):
      for name in ('k', 'v', 'margin'):
        one, other = (np.moveaxis(np.asarray(getattr(c, name)), -1 if name == 'margin' else 2, 0) for c in (a, b))
        np.testing.assert_allclose(one, other[: len(one)], atol=1e-4)  # tiles may hold more slots
      assert a.length.tolist() == b.length.tolist() and a.generated.tolist() == b.generated.tolist()


@pytest.mark.slow
@pytest.mark.parametrize('rows', [1, 2])
def test_no_step_copies_the_cache(rows, tiny_params):
  """The room for a copy of a layer's cache would be among the program's temporaries."""
  generator = Generator(CFG, DYNAMIC, tiny_params, max_new_tokens=NEW, eos_id=None, later_tokens=4000)
  prompt, pixels = jax.tree.map(lambda x: x[:rows], batch())
  turn, _ = jax.eval_shape(generator.start_impl, generator.params, prompt, pixels)
  program = generator._decode.lower(generator.params, turn.logits, cache=turn.cache, seed=prompt.seed, kept_image=())
  memory = program.compile().memory_analysis()
  layer = turn.cache.stages[0].k[0]
  assert memory.alias_size_in_bytes > 2 * CFG.llama.num_layers * 0.9 * layer.size * 4
  assert memory.temp_size_in_bytes < layer.size * 4
