"""LoRA: what is trained, what is stored, what it belongs to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import CFG as STEP
from test_step import DYNAMIC as STEP_STAGES
from test_step import batch, begin
from test_training import BASE, dynamic, largest_difference, parameters

from dynllava_jax import checkpoint, presets, sharding
from dynllava_jax.checkpoint import CheckpointError
from dynllava_jax.config import ConfigError, LoraConfig
from dynllava_jax.models.batch import TrainInputs
from dynllava_jax.models.dynllava import DynLlava, Prompt
from dynllava_jax.models.lora import as_variables, init_adapters, merged
from dynllava_jax.models.params import cut_params
from dynllava_jax.training import loop
from dynllava_jax.training.adapters import held_as
from dynllava_jax.training.step import make_train_step

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1, base='float32')


def adapters_of(cfg, lora):
  """Adapters that do something: B is not zero."""
  adapters = sharding.unboxed(init_adapters(cfg.llama, lora, jax.random.key(1)))
  return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)


def test_adapters_beside_the_weights_equal_adapters_merged_into_them(tiny_params):
  """All seven matrices; int8 weights with their scales come close, rows dropped at random do not."""
  cfg, rows = presets.TINY, batch(2)
  prompt = Prompt(*(jnp.asarray(getattr(rows, n)) for n in ('tokens', 'length', 'image_start', 'seed')))
  adapters = adapters_of(cfg, LORA)
  image = jax.random.normal(jax.random.key(2), (2, cfg.vision.num_patches, cfg.llama.hidden_size))

  @jax.jit
  def hidden(groups, keys=None):
    model = DynLlava(cfg)
    variables = as_variables(groups, LORA if 'adapters' in groups else None, model.stages, keys)
    return model.apply(variables, prompt, image, TrainInputs(prompt.length), method='train_forward').hidden

  dense = lambda groups: cut_params(groups, DynLlava(cfg).stages)
  beside = hidden(dense(tiny_params | {'adapters': adapters}))
  llama = merged(jax.tree.map(jnp.copy, tiny_params['llama']), adapters, LORA.scale)
  np.testing.assert_allclose(beside, hidden(dense(tiny_params | {'llama': llama})), atol=2e-5)
  plain = hidden(dense(tiny_params))
  moved = float(jnp.abs(beside - plain).mean())
  assert moved > 0.1
  rounded = hidden(dense(held_as(tiny_params, 'int8') | {'adapters': adapters}))
  assert 0 < float(jnp.abs(rounded - beside).mean()) < 0.1 * moved
  keys = jax.random.key_data(jax.random.split(jax.random.key(3), 2))
  dropped = hidden(dense(tiny_params | {'adapters': adapters}), keys)
  assert 0.01 * moved < float(jnp.abs(dropped - beside).mean()) < moved


def test_parts_of_a_batch_drop_what_the_whole_drops_and_hold_less(tiny_params, one_device):
  cfg = dataclasses.replace(STEP, lora=LORA, init_from='base', frozen=('vision', 'projector'))
  mesh = one_device
  params = tiny_params | {'adapters': adapters_of(presets.TINY, LORA)}
  results, held = [], []
  with sharding.on_mesh(mesh):
    for accumulate in (1, 4):
      cfg = dataclasses.replace(cfg, accumulate=accumulate)
      state, frozen = begin(cfg, optax.sgd(1.0), params, mesh)
      assert set(state.params) == {'adapters', 'image_predictor', 'text_predictor'}
      rows = jax.device_put(batch(), sharding.batch_sharding(mesh))
      step = make_train_step(cfg, optax.sgd(1.0), mesh).lower(state, frozen, rows).compile()
      held.append(step.memory_analysis().temp_size_in_bytes)
      results.append(jax.device_get(step(state, frozen, rows)[0].params['adapters']))
  start = cut_params(params, STEP_STAGES)['adapters']
  for (path, a), b, p in zip(jax.tree_util.tree_leaves_with_path(results[0]), jax.tree.leaves(results[1]), jax.tree.leaves(start)):
    assert np.linalg.norm(a - b) <= 3e-6 * np.linalg.norm(a - p) + 1e-7 * np.linalg.norm(p), path
  assert held[1] <= 0.45 * held[0], held


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """A mesh of one device, where sums have one order."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ('data', 'fsdp', 'tensor'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda cfg: mesh)
    yield mesh


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('base')
  loop.train(dataclasses.replace(BASE, steps=1), workdir)
  return workdir


def lora_run(base):
  """One predictor is trained; the other is frozen, but the base has none, so that it has to be stored too."""
  cfg = dynamic(init_from=str(base / loop.CHECKPOINTS), lora=LORA, steps=4, save_every=2)
  return dataclasses.replace(cfg, frozen=('vision', 'projector', 'text_predictor'))


@pytest.fixture(scope='module')
def run(base, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('lora')
  loop.train(lora_run(base), workdir)
  return workdir


def test_a_checkpoint_holds_what_its_base_does_not_and_loads_as_the_whole(base, run):
  stored = checkpoint.stored_params(run / loop.CHECKPOINTS)
  assert {name.split('/')[0] for name in stored} == {'adapters', 'image_predictor', 'text_predictor'}
  before, after = parameters(base), parameters(run)
  assert set(after) == {'vision', 'projector', 'llama', 'image_predictor', 'text_predictor'}
  for group in ('vision', 'projector'):
    assert largest_difference(before[group], after[group]) == 0
  for name, matrix in before['llama']['layers'].items():
    moved = largest_difference(matrix, after['llama']['layers'][name])
    assert (moved == 0) == name.endswith('norm'), name
  info = checkpoint.read_info(run / loop.CHECKPOINTS)
  assert info.lora == LORA and info.base == str(base / loop.CHECKPOINTS / '1')


def test_what_adapters_belong_to_is_checked(base, run, tmp_path):
  info, tokenizer = checkpoint.read_info(run / loop.CHECKPOINTS), checkpoint.read_tokenizer(run / loop.CHECKPOINTS)
  copy = tmp_path / 'copy'
  copy.mkdir()
  (copy / '4').symlink_to(run / loop.CHECKPOINTS / '4')
  checkpoint.write_info(copy, dataclasses.replace(info, base_sha256='0' * 64), tokenizer)
  with pytest.raises(CheckpointError, match='holds adapters of .*, but other weights are there now'):
    checkpoint.load_params(copy)
  checkpoint.write_info(copy, dataclasses.replace(info, base=str(tmp_path / 'gone')), tokenizer)
  with pytest.raises(CheckpointError, match='holds adapters of .*gone, which cannot be read: .*no checkpoint here'):
    checkpoint.load_params(copy)


@pytest.mark.slow
def test_a_lora_run_goes_on_where_it_was(base, run, tmp_path, monkeypatch):
  """Ended after step 2 of 4, then started again: what it saved, on the base that it belongs to."""
  real = loop.make_train_step

  def ending(*args):
    step_fn = real(*args)

    def step(state, frozen, batch):
      if int(state.step) == 2:
        raise KeyboardInterrupt
      return step_fn(state, frozen, batch)

    return step

  monkeypatch.setattr(loop, 'make_train_step', ending)
  with pytest.raises(KeyboardInterrupt):
    loop.train(lora_run(base), tmp_path)
  monkeypatch.setattr(loop, 'make_train_step', real)
  loop.train(lora_run(base), tmp_path)
  whole, parted = (checkpoint.load_adapted(workdir / loop.CHECKPOINTS) for workdir in (run, tmp_path))
  assert largest_difference(whole, parted) == 0


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(init_from=''), 'lora: adapters belong to trained weights; give their checkpoint with init_from'),
    (dict(frozen=('vision', 'llama')), "frozen: with lora the decoder's own weights are"),
  ],
)
def test_what_lora_cannot_do_is_refused(change, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(STEP, **(dict(lora=LORA, init_from='base') | change))
  with pytest.raises(ConfigError, match="lora.targets: 'head' is no matrix of a layer; expected some of q, k, v, o"):
    LoraConfig(targets=('q', 'head'))
