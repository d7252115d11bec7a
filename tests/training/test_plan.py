"""What is said of a run before it is started: bytes by arithmetic, settings that fit, what a compiled module says of itself."""

import dataclasses
import importlib.util
import json
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from dynllava_jax import presets, sharding
from dynllava_jax.config import (
  ConfigError,
  DataConfig,
  LoraConfig,
  MeshConfig,
  OptimizerConfig,
  Stage,
  TrainConfig,
  from_config_dict,
)
from dynllava_jax.models.params import abstract_params, count_parameters
from dynllava_jax.training import ahead, fitting, footprint, hlo, machines, plan

DYNAMIC = (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.2))
RUN = TrainConfig(
  model=presets.DYNAMIC_LLAVA_7B,
  stages=DYNAMIC,
  data=DataConfig(text_length=1472),
  mesh=MeshConfig(data=1, fsdp=-1),
  frozen=('vision', 'projector'),
  batch_size=64,
  dtype='bfloat16',
  remat='block',
)
ONE = {'data': 1, 'fsdp': 1, 'tensor': 1}
MODULE = """
%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[4,16]{1,0} all-gather(%x), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %f = f32[8]{0} fusion(%y), kind=kLoop, calls=%all-reduce-scatter.3, backend_config={"estimated_cycles":"100"}
  %w = f32[8]{0} fusion(%y), kind=kLoop, calls=%async_collective_fusion.1
}
%async_collective_fusion.1 (input: bf16[1,16]) -> f32[8] {
  %h = bf16[4,16]{1,0} all-gather(%input), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}
%condition (arg: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(30)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
%all-reduce-scatter.3 (input: f32[64]) -> f32[8] {
  %sum = f32[64]{0} all-reduce(%input), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %r = f32[10]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add, backend_config={"estimated_cycles":"500"}
  %p = (f32[6]{0}, f32[6]{0}, u32[]) collective-permute-start(%q), source_target_pairs={{0,1}}
}
"""


def changed(**fields):
  return dataclasses.replace(RUN, **fields)


def test_a_module_tells_its_time_and_what_its_devices_send():
  module = hlo.Module(MODULE)
  assert module.seconds(1e3) == (500 + 30 * 100) / 1e3
  found = {c.kind: (c.count, c.sent) for c in module.collectives()}
  assert found['all-gather'] == (30, 30 * 128 * 3 / 4)
  assert found['reduce-scatter'] == (30, 30 * 256 * 7 / 8)  # named so: a sum of which each device keeps a part
  assert found['all-reduce'] == (1, 40 * 2 * 3 / 4) and found['collective-permute'] == (1, 24)
  with pytest.raises(ValueError, match='no instruction'):
    hlo.Module('ENTRY %main (p: f32[8]) -> f32[8] {\n}\n').seconds(1.0)


@pytest.mark.parametrize(
  'text, message',
  [
    ('v5e', 'is no machine'),
    ('v5e:', 'is no machine'),
    ('v5e:16', 'expected the topology'),
    ('h100:2x4', 'expected a number'),
    ('cpu:0', 'expected 1 to'),
    ('cpu:99999', 'expected 1 to'),
    ('cpu:٣', 'is no machine'),
    ('v5e:16x16;rm', 'is no machine'),
  ],
)
def test_machines_that_are_none(text, message):
  with pytest.raises(ConfigError, match=message):
    machines.read(text, '--machine')


def test_machines(monkeypatch):
  assert machines.read('v5p:4x4x4', '').devices == 64 and machines.read('v5p:4x4x4', '').is_tpu
  monkeypatch.delenv(machines.GPU_SHARE, raising=False)
  assert machines.read('h100:8', '').chip.memory == 60e9  # jax takes three quarters
  monkeypatch.setenv(machines.GPU_SHARE, '0.9')
  assert machines.read('h100:8', '').chip.memory == pytest.approx(72e9)
  assert not machines.read('cpu:8', '').is_tpu


def test_what_is_stored_is_exact():
  one = footprint.of_run(RUN, ONE)
  params = abstract_params(RUN.model)
  frozen = sum(count_parameters(params[g]) for g in RUN.frozen)
  trained = count_parameters(params) - frozen
  assert one.parameters == 4 * trained + 2 * frozen and one.gradients == 4 * trained
  assert one.optimizer == pytest.approx(8 * trained, rel=1e-6)
  split = footprint.of_run(RUN, {'data': 1, 'fsdp': 16, 'tensor': 4})
  assert split.optimizer == pytest.approx(one.optimizer / 64, rel=0.02)  # norms and biases are whole everywhere
  half = footprint.of_run(changed(optimizer=OptimizerConfig(moment_dtype='bfloat16'), param_dtype='bfloat16'), ONE)
  assert half.optimizer == pytest.approx(one.optimizer / 2, rel=1e-6) and half.gradients == one.gradients / 2


def test_what_each_setting_saves():
  sizes = {'data': 1, 'fsdp': 8, 'tensor': 1}
  reckon = lambda **fields: footprint.of_run(changed(**fields), sizes)
  whole, parted = reckon(), reckon(accumulate=4)
  assert parted.activations == whole.activations / 4 and parted.temporaries < whole.temporaries
  assert parted.gradients == 2 * whole.gradients  # and the sums of the parts
  assert whole.activations < reckon(remat='dots').activations < reckon(remat='none').activations
  lora = reckon(lora=LoraConfig(), init_from='base')
  assert lora.optimizer < whole.optimizer / 3 and lora.parameters < whole.parameters / 1.2
  assert reckon(lora=LoraConfig(base='int8'), init_from='base').parameters < lora.parameters / 1.4


@pytest.mark.parametrize(
  'cfg, devices, memory',
  [
    (RUN, 256, 15.75),  # more devices than rows
    (changed(batch_size=256, remat='none'), 64, 15.75),
    (changed(accumulate=2), 32, 31.24),
    (changed(mesh=MeshConfig(data=2, fsdp=-1, slices=2)), 64, 15.75),
    (changed(lora=LoraConfig(), init_from='base'), 8, 15.75),
  ],
)
def test_what_is_suggested_fits_and_is_the_same_update(cfg, devices, memory):
  found = fitting.search(cfg, devices, memory * machines.GIB)
  assert found.footprint.total <= fitting.MARGIN * memory * machines.GIB
  sizes = sharding.mesh_sizes(found.cfg.mesh, devices)
  assert footprint.of_run(found.cfg, sizes) == found.footprint and sizes['data'] % cfg.mesh.slices == 0
  assert found.cfg.batch_size % (sizes['data'] * sizes['fsdp'] * found.cfg.accumulate) == 0
  same = dict(mesh=cfg.mesh, accumulate=cfg.accumulate, remat=cfg.remat)
  assert dataclasses.replace(found.cfg, **same) == cfg
  flags = dict(f.removeprefix('--config.').split('=') for f in found.overrides(cfg))
  mesh = {k.removeprefix('mesh.'): int(v) for k, v in flags.items() if k.startswith('mesh.')}
  assert sharding.mesh_sizes(dataclasses.replace(cfg.mesh, **mesh), devices) == sizes
  assert int(flags.get('accumulate', cfg.accumulate)) == found.cfg.accumulate and flags.get('remat', cfg.remat) == found.cfg.remat


def test_a_plan_says_what_a_run_takes(capsys):
  plan.plan(changed(mesh=MeshConfig(data=4, fsdp=-1)), machines.read('v5p:4x4x4', ''))
  shown = capsys.readouterr().out
  assert 'data 4 x fsdp 16 x tensor 1' in shown and '131,072 tokens' in shown and 'images/s' in shown and 'of 95.00' in shown
  for kind in ('parameters', 'gradients', 'optimizer', 'activations', 'temporaries', 'together', 'a checkpoint', 'days'):
    assert kind in shown


@pytest.mark.parametrize(
  'cfg, machine, message',
  [
    (RUN, 'v5e:16x16', r'does not divide.* fits: .*--config.mesh.tensor=4'),
    (changed(batch_size=256, mesh=MeshConfig(data=64, fsdp=1)), 'v5e:8x8', r'are more than the 15.75 of v5e:8x8; with .* fits: '),
    (RUN, 'v5e:2x2', r'no mesh, accumulate and remat fit here, but on 16 such devices they do'),
    (changed(mesh=MeshConfig(data=3, fsdp=1)), 'v5e:2x2', 'config.mesh'),
    (RUN, 'tpu7x:2x2', 'is not known here; --compile_for=tpu7x:2x2'),
  ],
)
def test_a_plan_that_does_not_fit_is_refused(cfg, machine, message, capsys):
  with pytest.raises(ConfigError, match=message):
    plan.plan(cfg, machines.read(machine, '--machine'))


def test_gpus_cannot_be_compiled_for():
  with pytest.raises(ConfigError, match='GPUs are compiled for where they are'):
    ahead.devices(machines.read('h100:8', ''))


def test_slices_are_what_data_goes_over():
  with pytest.raises(ConfigError, match='expected a multiple of slices, 3'):
    sharding.mesh_sizes(MeshConfig(data=4, slices=3), 4)
  with pytest.raises(ConfigError, match='not how these devices are joined'):
    sharding.make_mesh(MeshConfig(data=8, slices=2))  # one process on one machine


RECORDED = {
  name: row for name, row in json.loads((ROOT / 'benchmarks/results/scale.json').read_text()).items() if 'gib_per_device' in row
}


@pytest.mark.parametrize('name', RECORDED)
def test_the_plan_is_within_a_tenth_of_what_the_compiler_said(name):
  row = RECORDED[name]
  spec = importlib.util.spec_from_file_location('llava_config', ROOT / 'configs' / 'llava.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  options = dict(w.removeprefix('--').split('=', 1) for w in shlex.split(row['command']) if w.startswith('--'))
  config = module.get_config(options['config'].rpartition(':')[2])
  for key, value in options.items():
    if key.startswith('config.'):
      *groups, last = key.split('.')[1:]
      place = config
      for group in groups:
        place = place[group]
      place[last] = value if isinstance(place[last], str) else eval(value)
  cfg = from_config_dict(TrainConfig, config)
  machine = machines.read(options['compile_for'], '')
  reckoned = footprint.of_run(cfg, sharding.mesh_sizes(cfg.mesh, machine.devices * cfg.mesh.slices))
  assert reckoned.total / machines.GIB == pytest.approx(row['gib_per_device'], rel=0.1)


@pytest.mark.slow
def test_a_tiny_step_compiles_for_tpus(tmp_path):
  """The compiler of a TPU slice, on this machine; all that `--compile_for` prints is there."""
  pytest.importorskip('libtpu')
  overrides = ('init_from=', 'dtype=bfloat16', 'batch_size=8', 'mesh.fsdp=2', 'mesh.tensor=2')
  flags = [f'--config.{o}' for o in overrides]
  command = [sys.executable, 'train.py', '--config=configs/digits.py:dynamic', *flags, '--compile_for=v5e:2x2']
  shown = subprocess.run(command, cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''}, capture_output=True, text=True)
  assert shown.returncode == 0, shown.stderr
  title = 'v5e:2x2, 4 devices: mesh data 1 x fsdp 2 x tensor 2'
  for text in (title, 'memory per device (compiler)', 'all-gather', 'MFU', 'ms at best'):
    assert text in shown.stdout
