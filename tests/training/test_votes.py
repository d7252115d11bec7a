"""Layers that learn to vote: sharded as on one device, from a checkpoint without the weights, resumed bit for bit."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_step
from test_training import BASE, MODEL, largest_difference, one_device, parameters  # noqa: F401

from dynllava_jax.config import Objective, Piece, PruningConfig, PruningTraining, Stage
from dynllava_jax.methods.training import Shape
from dynllava_jax.models import trained_votes
from dynllava_jax.training import loop
from dynllava_jax.training.metrics import read_metrics

VOTING = (Stage(layers=Piece('dynamic_context_pruning')),)


def test_alpha_rises_along_half_a_cosine():
  objective = Objective(pruning=PruningTraining(alpha_start=1.0, alpha_end=8.0))
  alpha = lambda done: float(
    trained_votes.draw(jax.random.key(0), Shape(2, 3, 4, None), jnp.float32(done), objective).told['alpha']
  )
  np.testing.assert_allclose([alpha(x) for x in (0.0, 0.5, 1.0)], [1.0, 4.5, 8.0], rtol=1e-6)
  assert alpha(0.1) - 1 < 0.25


@pytest.mark.slow
def test_parts_on_a_mesh_give_the_update_of_one_device(tiny_params):
  """Some rows run dense; the gradient of every weight, and what is logged."""
  model = dataclasses.replace(test_step.CFG.model, predictor=None, pruning=PruningConfig(dim=8, bias=1.0))
  cfg = dataclasses.replace(
    test_step.CFG, model=model, stages=VOTING, pruning=PruningTraining(gamma=3.0, alpha_end=2.0, dense_share=0.3)
  )
  llama, rng = model.llama, np.random.default_rng(2)
  maps = {n: jnp.asarray(rng.normal(0, 0.1, (llama.num_layers, llama.hidden_size, 8)), jnp.float32) for n in 'qk'}
  params = {name: tiny_params[name] for name in ('vision', 'projector', 'llama')}
  params |= {'pruning': {'layers': maps | {'bias': jnp.ones((llama.num_layers, 1))}}}
  whole, told = test_step.one_step(cfg, params, optax.sgd(1.0))
  split = dataclasses.replace(cfg, mesh=test_step.SPLIT, accumulate=2)
  parted, told_split = test_step.one_step(split, params, optax.sgd(1.0))
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(parted)):
    np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))
  assert told.keys() == told_split.keys() >= {'sparsity', 'alpha', 'held/0', 'held/3'}
  for name, value in told.items():
    np.testing.assert_allclose(told_split[name], value, rtol=1e-5, err_msg=name)
  assert told['grad_norm/pruning'] > 0


@pytest.mark.slow
def test_begun_from_a_dense_checkpoint_and_resumed_bit_for_bit(one_device, tmp_path, monkeypatch):  # noqa: F811
  dense = dataclasses.replace(BASE, steps=2)
  loop.train(dense, tmp_path / 'dense')
  cfg = dataclasses.replace(
    BASE,
    model=dataclasses.replace(MODEL, pruning=PruningConfig(dim=8)),
    stages=VOTING,
    init_from=str(tmp_path / 'dense' / loop.CHECKPOINTS),
    frozen=('vision', 'projector'),
    steps=4,
  )
  loop.train(cfg, tmp_path / 'whole')
  real = loop.make_train_step

  def interrupting(*args):
    step_fn = real(*args)

    def step(state, frozen, batch):
      if int(state.step) == 1:
        signal.raise_signal(signal.SIGTERM)
      return step_fn(state, frozen, batch)

    return step

  monkeypatch.setattr(loop, 'make_train_step', interrupting)
  with pytest.raises(loop.Interrupted, match='stopped after step 2 of 4'):
    loop.train(cfg, tmp_path / 'again')
  monkeypatch.setattr(loop, 'make_train_step', real)
  loop.train(cfg, tmp_path / 'again')
  again, whole = parameters(tmp_path / 'again'), parameters(tmp_path / 'whole')
  assert largest_difference(again, whole) == 0
  assert np.abs(np.asarray(whole['pruning']['layers']['bias']) - 2.0).max() > 0
  assert {'sparsity', 'alpha', 'held/0', 'predictor_learning_rate'} <= read_metrics(tmp_path / 'again')[-1].keys()
