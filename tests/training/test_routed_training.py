"""Methods whose rows or layers see other lengths, in training: resumed they end at the same bits, on a mesh at the same loss."""

import dataclasses

import jax
import numpy as np
import pytest
from test_training import BASE, MODEL, largest_difference, parameters

from dynllava_jax import checkpoint, sharding
from dynllava_jax.config import MeshConfig, Piece, PyramidConfig, PyramidTraining, RoutersConfig, Stage
from dynllava_jax.training import loop
from dynllava_jax.training.metrics import read_metrics

LLAMA = dataclasses.replace(MODEL.llama, num_layers=4)
PYRAMID = PyramidConfig(layers=(1,), kernels=((1, 2),), router_id=276)
RUNS = {
  'pairs': (dict(routers=RoutersConfig(method='videollm_mod')), (Stage(layers=Piece('videollm_mod')),), 'routers'),
  'falling': (
    dict(routers=RoutersConfig(method='pmod', bias=True)),
    (Stage(), Stage(start=1, layers=Piece('pmod'))),
    'routers',
  ),
  'routes': (dict(dpn=PYRAMID), (Stage(), Stage(start=1, selector='dpn_routed', options={'ceil': True})), 'dpn'),
}


def settings(name, **changes):
  model, stages, _ = RUNS[name]
  model = dataclasses.replace(MODEL, llama=LLAMA, **model)
  return dataclasses.replace(BASE, model=model, stages=stages, steps=4, save_every=2, dpn=PyramidTraining(fewest=9), **changes)


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_resumed_and_on_a_mesh(name, tmp_path, monkeypatch):
  make_mesh = sharding.make_mesh
  one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ('data', 'fsdp', 'tensor'))
  monkeypatch.setattr(sharding, 'make_mesh', lambda cfg: one)
  loop.train(settings(name), tmp_path / 'whole')
  loop.train(settings(name), tmp_path / 'again')
  for step in checkpoint.all_steps(tmp_path / 'again' / loop.CHECKPOINTS)[1:]:
    checkpoint_dir = tmp_path / 'again' / loop.CHECKPOINTS / str(step)
    checkpoint_dir.rename(tmp_path / f'aside{step}')
  loop.train(settings(name), tmp_path / 'again')
  assert largest_difference(parameters(tmp_path / 'again'), parameters(tmp_path / 'whole')) == 0
  group = RUNS[name][2]
  first = checkpoint.load_params(tmp_path / 'whole' / loop.CHECKPOINTS / '2')
  assert largest_difference(parameters(tmp_path / 'whole')[group], first[group]) > 0
  monkeypatch.setattr(sharding, 'make_mesh', make_mesh)
  loop.train(settings(name, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), tmp_path / 'mesh')
  split, whole = ([line['loss'] for line in read_metrics(tmp_path / w)] for w in ('mesh', 'whole'))
  np.testing.assert_allclose(split, whole, rtol=1e-3)
