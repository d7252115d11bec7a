"""What is stored in bfloat16 still moves, optimisers keep what they should, layers compute again what they did not keep."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynllava_jax import presets, sharding
from dynllava_jax.config import ConfigError, MeshConfig, OptimizerConfig, TrainConfig
from dynllava_jax.models.llama import Llama
from dynllava_jax.training.precision import round_at_random, store
from dynllava_jax.training.step import decays, make_optimizer, state_shardings

CFG = presets.TINY


def test_rounding_at_random_is_right_on_average_and_leaves_exact_numbers():
  x = jnp.full(200_000, 1 + 2**-9)  # bfloat16 has 1 and 1 + 2^-7: a quarter of the way
  rounded = round_at_random(jax.random.key(0), x)
  assert set(np.unique(rounded.astype(jnp.float32))) == {1.0, 1 + 2**-7}
  assert float((rounded > 1).mean()) == pytest.approx(0.25, abs=0.005)
  exact = jnp.array([0.0, -1.5, jnp.inf, -jnp.inf, jnp.nan])
  np.testing.assert_array_equal(round_at_random(jax.random.key(1), exact).astype(jnp.float32), exact)


@pytest.mark.parametrize('name', ['adamw', 'adafactor'])
def test_moments_in_bfloat16_follow_those_in_float32(name):
  """With b2 = 0.999 the second moment moves by less than bfloat16 resolves: rounded to the nearest it would stand still."""
  gradient = {'llama': {'q': jnp.linspace(0.5, 1.5, 40_000).reshape(200, 200)}}
  params = jax.tree.map(jnp.zeros_like, gradient)
  moved = {}
  for dtype in ('float32', 'bfloat16'):
    optimizer = make_optimizer(OptimizerConfig(name=name, learning_rate=1.0, clip_norm=1e9, moment_dtype=dtype), 400)

    @jax.jit
    def step(state, optimizer=optimizer):
      return optimizer.update(gradient, state, params)

    state = optimizer.init(params)
    for _ in range(200):
      updates, state = step(state)
    stored = {str(x.dtype) for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert stored == {dtype}
    moved[dtype] = updates['llama']['q']
  error = (moved['bfloat16'] / moved['float32'] - 1).astype(jnp.float32)
  assert abs(float(error.mean())) < 0.01 and float(jnp.abs(error).mean()) < 0.05


def test_adafactor_keeps_rows_and_columns():
  cfg = TrainConfig(model=CFG, optimizer=OptimizerConfig(name='adafactor'), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
  params = {'llama': {'mlp': jax.ShapeDtypeStruct((3, 256, 512), jnp.float32)}}
  state = jax.eval_shape(make_optimizer(cfg.optimizer, 10).init, params)
  assert sum(x.size for x in jax.tree.leaves(state)) < 3 * (256 + 512) + 20
  mesh = sharding.make_mesh(cfg.mesh)
  places = state_shardings(cfg, make_optimizer(cfg.optimizer, 10), mesh)  # sums of rows do not lie like their parameter
  assert jax.tree.structure(places.params)


def test_norms_biases_and_if_asked_embeddings_do_not_decay():
  tree = {'llama': {'embedding': 0, 'q': 0, 'norm': {'scale': 0}}, 'vision': {'qkv_bias': 0, 'fc1': {'bias': 0, 'kernel': 0}}}
  expected = {'llama': {'embedding': True, 'q': True, 'norm': {'scale': False}}}
  expected['vision'] = {'qkv_bias': False, 'fc1': {'bias': False, 'kernel': True}}
  assert decays(tree, embeddings=True) == expected
  expected['llama']['embedding'] = False
  assert decays(tree, embeddings=False) == expected
  params = {'llama': {'q': jnp.ones(3), 'norm': {'scale': jnp.ones(3)}}}
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_share=0.0, weight_decay=0.1), 10)
  state = optimizer.init(params)
  for _ in range(2):  # the first step of a schedule is at 0
    updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
  np.testing.assert_allclose(updates['llama']['q'], -0.1, rtol=1e-6)
  np.testing.assert_array_equal(updates['llama']['norm']['scale'], 0)


@pytest.fixture(scope='module')
def stack(tiny_params):
  """(remat -> gradient of a stage's weights, arguments)."""
  llama = tiny_params['llama'] | {'stage_0': tiny_params['llama']['layers']}
  x = jax.random.normal(jax.random.key(0), (2, 40, CFG.llama.hidden_size))

  def gradient(remat):
    model = Llama(CFG.llama, TrainConfig(model=CFG).stages, jnp.float32, remat)

    def loss(params, x):
      run = lambda module: module.run_stage(0, x, jnp.broadcast_to(jnp.arange(40), (2, 40)))[0]
      return jnp.square(nn.apply(run, model)({'params': params})).sum()

    return jax.jit(jax.grad(loss)).trace(llama, x)

  return gradient, (llama, x)


def test_what_layers_do_not_keep_they_compute_again(stack):
  gradient, args = stack
  traced = {remat: gradient(remat) for remat in ('none', 'block', 'dots', 'offload')}
  programs = {remat: program.lower().compile() for remat, program in traced.items()}
  results = {remat: program(*args) for remat, program in programs.items()}
  for remat, result in results.items():
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(results['none'])):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()), err_msg=remat)
  held = {remat: program.memory_analysis().temp_size_in_bytes for remat, program in programs.items()}
  assert held['block'] < held['dots'] < held['none'], held
  assert [remat for remat, program in traced.items() if 'Host' in str(program.jaxpr)] == ['offload']  # CPUs have one memory


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(remat='layers'), "remat 'layers': expected one of none, block, dots, offload"),
    (dict(param_dtype='float16'), "param_dtype 'float16': expected float32 or bfloat16"),
    (dict(accumulate=0), 'accumulate is 0, expected a positive number'),
  ],
)
def test_unknown_settings_are_named(change, message):
  with pytest.raises(ConfigError, match=message):
    TrainConfig(model=CFG, **change)
  with pytest.raises(ConfigError, match="optimizer.name is 'sgd', expected one of adamw, adafactor"):
    OptimizerConfig(name='sgd')


def test_steps_too_small_for_bfloat16_still_move_it():
  p = jnp.ones(100_000, jnp.bfloat16)
  step = jax.jit(lambda i, p: store(jax.random.key(i), p.astype(jnp.float32) + 1e-4, p))
  for i in range(100):
    p = step(i, p)
  assert float(p.astype(jnp.float32).mean()) == pytest.approx(1.01, abs=1e-3)
  assert optax.apply_updates(jnp.ones(1, jnp.bfloat16), jnp.full(1, 1e-4))[0] == 1, 'as it is without'
