"""The jitted step: parts of a batch, memory, precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynllava_jax import presets, sharding
from dynllava_jax.config import (
  IGNORE,
  ConfigError,
  ExitHeadConfig,
  ExpertsConfig,
  MemoryConfig,
  MeshConfig,
  Piece,
  SparsityConfig,
  Stage,
  TrainConfig,
)
from dynllava_jax.config.groups import groups_of
from dynllava_jax.data.batches import Batch
from dynllava_jax.models import cross_entropy as module
from dynllava_jax.models.cross_entropy import cross_entropy
from dynllava_jax.models.params import cut_params, init_params
from dynllava_jax.training.step import State, cut_abstract, make_train_step, new_watch, split_frozen, state_shardings

P = presets.TINY.vision.num_patches
TEXT = 14
DYNAMIC = (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.25))
CFG = TrainConfig(
  model=presets.TINY,
  stages=DYNAMIC,
  sparsity=SparsityConfig(image_keep_rate=0.25, min_answer_len=4, dense_share=0.3),
  frozen=('vision', 'projector'),
  batch_size=8,
  steps=10,
)
SPLIT = MeshConfig(data=2, fsdp=2, tensor=2)


def batch(rows=8):
  """Long and short answers, a row without image."""
  rng, size = np.random.default_rng(0), TEXT + P
  length = rng.integers(P + 8, size + 1, rows).astype(np.int32)
  start = length - rng.integers(2, 7, rows).astype(np.int32)
  at = np.arange(size)
  tokens = np.where(at < length[:, None], rng.integers(3, presets.TINY.llama.vocab_size, (rows, size)), 0).astype(np.int32)
  labels = np.where((at >= start[:, None]) & (at < length[:, None]), tokens, IGNORE).astype(np.int32)
  image = np.where(np.arange(rows) == 1, -1, 1).astype(np.int32)
  pixels = rng.integers(0, 256, (rows, *(presets.TINY.vision.image_size,) * 2, 3), np.uint8)
  return Batch(pixels, tokens, labels, length, image, start, np.arange(rows, dtype=np.uint32))


def begin(cfg, optimizer, params, mesh):
  """(state, frozen) at step 0, on the mesh."""
  trained, frozen = split_frozen(cut_params(jax.tree.map(jnp.copy, params), cfg.stages), cfg.held, cfg.only)
  state = jax.device_put(
    State(jnp.int32(0), trained, optimizer.init(trained), new_watch(cfg)), state_shardings(cfg, optimizer, mesh)
  )
  return state, jax.device_put(frozen, sharding.shardings(split_frozen(cut_abstract(cfg), cfg.held, cfg.only)[1], mesh))


def one_step(cfg, params, optimizer):
  mesh = sharding.make_mesh(cfg.mesh)
  with sharding.on_mesh(mesh):
    step = make_train_step(cfg, optimizer, mesh)
    state, metrics = step(*begin(cfg, optimizer, params, mesh), jax.device_put(batch(), sharding.batch_sharding(mesh)))
  return jax.device_get((state.params, metrics))


@pytest.fixture(scope='module')
def whole(tiny_params):
  return one_step(dataclasses.replace(CFG, mesh=SPLIT), tiny_params, optax.sgd(1.0))


def assert_same_update(one, other, params, cfg=CFG):
  """The whole move agrees to 1e-6 of its length; every array to 3e-6 of its own, as far as float32 resolves that."""
  start = split_frozen(cut_params(params, cfg.stages), cfg.held)[0]
  length = lambda x: float(np.linalg.norm(x))
  apart, moved = [], []
  for (path, a), b, p in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), jax.tree.leaves(start)):
    apart.append(length(a - b))
    moved.append(length(a - p))
    assert apart[-1] <= 3e-6 * moved[-1] + 1e-7 * length(p), path
  assert length(apart) <= 1e-6 * length(moved)


def test_parts_of_a_batch_give_the_update_of_the_whole(whole, tiny_params):
  """Rows with more and fewer labels, one without image, answers too short to be judged, rows run dense."""
  params, metrics = whole
  parted, told = one_step(dataclasses.replace(CFG, mesh=SPLIT, accumulate=2), tiny_params, optax.sgd(1.0))
  assert_same_update(params, parted, tiny_params)
  assert told.keys() == metrics.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(told[name], value, rtol=2e-6, err_msg=name)


def test_number_of_parts_must_divide_the_rows_of_a_device():
  mesh = sharding.make_mesh(SPLIT)
  sharding.check_batch(8, mesh, 2)
  with pytest.raises(ConfigError, match='accumulate: 4 does not divide the 2 rows that each of 4 devices has of a batch of 8'):
    sharding.check_batch(8, mesh, 4)


def plain_cross_entropy(hidden, head, labels):
  log_probs = jax.nn.log_softmax(hidden[:, :-1].astype(jnp.float32) @ head)
  picked = [log_probs[b, t, labels[b, t + 1]] for b, t in zip(*np.nonzero(np.asarray(labels)[:, 1:] != IGNORE))]
  return -sum(picked) / len(picked)


@pytest.mark.parametrize('chunk', [4, 5, 64], ids=['whole chunks', 'a rest', 'one chunk'])
def test_chunks_of_positions_give_loss_and_gradients_of_all_logits(chunk, monkeypatch):
  monkeypatch.setattr(module, 'CHUNK', chunk)
  keys = jax.random.split(jax.random.key(0), 3)
  hidden, head = jax.random.normal(keys[0], (2, 13, 6)), jax.random.normal(keys[1], (6, 11))
  labels = jnp.where(jax.random.bernoulli(keys[2], 0.5, (2, 13)), jnp.arange(26).reshape(2, 13) % 11, IGNORE)
  expected = jax.value_and_grad(plain_cross_entropy, (0, 1))(hidden, head, labels)
  found = jax.jit(jax.value_and_grad(lambda h, w: cross_entropy(h, labels, w), (0, 1)))(hidden, head)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
def test_a_method_that_cuts_in_training_moves_the_decoder(tiny_params):
  """The step knows no method: whatever its forward leaves out, labels go with their rows."""
  cut = (Stage(), Stage(start=2, selector='pyramiddrop', image_keep_rate=0.5))
  metrics = one_step(dataclasses.replace(CFG, stages=cut), tiny_params, optax.sgd(1.0))[1]
  whole = one_step(dataclasses.replace(CFG, stages=(Stage(),)), tiny_params, optax.sgd(1.0))[1]
  assert metrics['supervised_tokens'] == whole['supervised_tokens'] > 0
  assert metrics['grad_norm/llama'] > 0 and 0 < abs(metrics['loss'] / whole['loss'] - 1) < 0.5


@pytest.mark.slow
def test_a_step_over_a_mesh_that_splits_experts():
  """Of experts and routers alone; noise, places and balance are those of one device."""
  llama = dataclasses.replace(presets.TINY.llama, experts=ExpertsConfig(layers=(0, 2)))
  model = dataclasses.replace(presets.TINY, llama=llama)
  params = sharding.unboxed(init_params(model, jax.random.key(0)))
  cfg = TrainConfig(model=model, only=('llama/*/experts', 'llama/*/router'), batch_size=8, steps=10)
  whole, split = (dataclasses.replace(SPLIT, **sizes) for sizes in (dict(data=8, fsdp=1, tensor=1), dict(data=1, expert=2)))
  run = lambda mesh: one_step(dataclasses.replace(cfg, mesh=mesh), params, optax.sgd(1.0))
  (one, told), (other, metrics) = run(whole), run(split)
  assert set(one['llama']) == {'stage_0', 'stage_0_at_2'} and set(one['llama']['stage_0']) == {'experts', 'router'}
  assert 0 < told['expert_load'] < 1 and told['expert_balance'] > 0
  for name in ('loss', 'ce', 'expert_balance', 'expert_load'):
    np.testing.assert_allclose(metrics[name], told[name], rtol=1e-5, err_msg=name)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


PLAIN = dataclasses.replace(presets.TINY, predictor=None)
LEAVING = tuple(Stage(start=i, exit=Piece('confidence') if i else None) for i in range(3))
BROUGHT = {
  'exits': dict(model=dataclasses.replace(PLAIN, exit_head=ExitHeadConfig()), stages=LEAVING),
  'memory': dict(model=dataclasses.replace(PLAIN, memory=MemoryConfig(slots=8, rank=4)), stages=(Stage(),), reducer=Piece('icae')),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', BROUGHT)
def test_a_method_learns_alike_on_any_mesh_and_in_parts(name):
  """What it brings moves; rows split over devices, weights split too, and parts of a batch give one update."""
  cfg = dataclasses.replace(CFG, **BROUGHT[name], mesh=MeshConfig(data=8))
  params = sharding.unboxed(init_params(cfg.model, jax.random.key(2)))
  plain, metrics = one_step(cfg, params, optax.sgd(1.0))
  split, _ = one_step(dataclasses.replace(cfg, mesh=SPLIT, accumulate=2), params, optax.sgd(1.0))
  assert_same_update(plain, split, params, cfg)
  for group in groups_of(cfg.model):
    assert metrics[f'grad_norm/{group}'] > 0
