"""The offline search: targets read strictly, costs that agree with the compiler's bytes, choices that can be explained."""

import dataclasses
import json
import os
import pathlib

import pytest

from dynllava_jax import presets
from dynllava_jax.config import ConfigError, EvalConfig, from_config_dict
from dynllava_jax.controller import program
from dynllava_jax.controller.estimate import CACHED, Costs, Setting, Work
from dynllava_jax.controller.hardware import calibrated, of_name
from dynllava_jax.controller.quality import Quality, read_quality
from dynllava_jax.controller.rules import Rules
from dynllava_jax.controller.rungs import cut
from dynllava_jax.controller.search import missed, search, work_of
from dynllava_jax.controller.target import Target, read_target

MODEL = presets.DYNAMIC_LLAVA_7B
OWN = program.PUBLISHED
WORK = Work(64, 256)


def setting(image, text, batch=16, mode=CACHED):
  return Setting(image, text, batch, mode, cut(OWN, image, text, MODEL))


@pytest.fixture(scope='module')
def costs():
  return Costs(MODEL, of_name('v5p'), WORK, 2)


def test_targets_are_read_strictly():
  assert read_target('memory=16GiB,batch=64,context=4096') == Target(memory=2**34, batch=64, context=4096)
  wanted = Target(tokens_per_second=1000.0, quality=0.98, latency=0.25, flops=0.5, mode='uncached', device='v5e-8')
  assert read_target('tokens/s>=1000, quality>=98%,latency<=250ms,flops=50%,mode=uncached,device=v5e-8') == wanted
  for text, message in (
    ('memroy=1GiB', "'memroy=1GiB', expected KEY=VALUE with one of memory"),
    ('memory', 'expected KEY=VALUE'),
    ('memory=1TB', 'expected a number with KiB, MiB, GiB'),
    ('memory>=1GiB', 'write memory<=1GiB'),
    ('batch=1.5', 'expected a whole number'),
    ('batch=0', 'expected a positive number'),
    ('batch=1,batch=2', 'batch is there twice'),
    ('mode=fast', 'expected cached or uncached'),
  ):
    with pytest.raises(ConfigError, match=message):
      read_target(text)
  with pytest.raises(ConfigError, match='v5x, expected one of v4, v5e'):
    of_name('v5x')
  with pytest.raises(ConfigError, match='context=600 has no room for a question besides 576 image tokens'):
    work_of(Target(context=600, new=64), 576)


def test_memory_is_that_of_the_compiler(costs):
  """Weights and cache of 7B on a v5p, 16 requests: what the TPU compiler allots to decoding's arguments."""
  recorded = json.loads((program.BENCH / 'tpu_fit.json').read_text())
  for name, ratios in (('dense', (1.0, 1.0)), ('dynamic', (0.2, 0.5))):
    held = costs.weights + 16 * costs.kv_bytes(setting(*ratios).stages)
    # The tower is no argument of decoding, and the compiler rounds arrays up.
    assert held / 2**30 == pytest.approx(recorded[f'decode_7b_v5p_{name}']['arguments_gib'], rel=0.04)


def test_costs_go_the_right_way(costs):
  dense, sparse = costs.of(setting(1.0, 1.0)), costs.of(setting(0.2, 0.5))
  assert dense.flops == 1 > sparse.flops and sparse.memory < dense.memory and sparse.latency < dense.latency
  assert costs.of(setting(1.0, 1.0, mode='uncached')).latency > dense.latency
  eight = Costs(MODEL, of_name('v5p-8'), WORK, 2).of(setting(1.0, 1.0))
  assert eight.memory < dense.memory / 7 and eight.latency < dense.latency


def test_the_least_sparse_setting_that_reaches_the_target(costs):
  found = lambda **target: search(costs, OWN, Target(**target), Rules(), Quality())
  assert found(batch=16, memory=95 * 2**30).reaching[0].setting == setting(1.0, 1.0)
  tight = found(batch=64, memory=25 * 2**30)
  chosen = tight.reaching[0]
  assert chosen.scarcity > 0 and chosen.estimate.memory <= 25 * 2**30
  assert all(c.scarcity >= chosen.scarcity for c in tight.reaching)
  less = [c for c in tight.candidates if c.scarcity < chosen.scarcity]
  assert less and all(c.estimate.memory > 25 * 2**30 for c in less)
  free = found(memory=40 * 2**30)  # no batch asked for: the one of most tokens per second that dense has room for
  assert free.reaching[0].setting.image == 1 and free.reaching[0].setting.batch == 32


def test_what_would_do_where_nothing_does(costs):
  target = Target(batch=256, memory=20 * 2**30)
  found = search(costs, OWN, target, Rules(), Quality())
  assert not found.reaching
  (line,) = missed(found, target)
  assert line.startswith('memory<=20.00GiB: within the other limits the best is') and 'image 5%, text 25%, batch 256' in line
  assert program.others(costs, OWN, target, Rules(), Quality())[0].startswith('batch=64 would do')
  asked = Target(batch=1, quality=0.99, flops=0.5)
  lines = missed(search(costs, OWN, asked, Rules(), Quality()), asked)
  assert lines[1].startswith('quality: not measured of any sparse setting') and 'flops=1 would do' in lines[0]


def test_quality_is_what_was_measured(tmp_path, costs):
  stage = lambda image, text: (
    [dict(start=0, selector='all', image_keep_rate=1.0, text_keep_budget=1.0, image_tokens=0)]
    + ([dict(start=2, selector='dynamic', image_keep_rate=image, text_keep_budget=text, image_tokens=0)] if image < 1 else [])
  )
  runs = {'dense': (1.0, 1.0, 80.0), 'a': (0.4, 0.5, 79.2), 'b': (0.2, 0.5, 76.0)}
  result = dict(
    benchmark='pope', reference='dense', questions=9, runs={n: dict(score=s) for n, (*_, s) in runs.items()},
    stages={n: stage(i, t) for n, (i, t, _) in runs.items()}, reducer=dict.fromkeys(runs),
  )  # fmt: skip
  (tmp_path / 'results.json').write_text(json.dumps(result))
  quality = read_quality(tmp_path / 'results.json', 'dynamic')
  assert [quality.of(*at) for at in ((1.0, 1.0), (0.4, 0.5), (0.6, 0.75), (0.3, 0.5), (0.1, 0.5))] == [1.0, 0.99, 0.99, 0.95, None]
  chosen = search(costs, OWN, Target(batch=64, quality=0.98, memory=30 * 2**30), Rules(), quality).reaching[0]
  assert chosen.quality >= 0.98 and chosen.setting.image >= 0.4
  (tmp_path / 'results.json').write_text('{}')
  with pytest.raises(ConfigError, match='not what eval.py writes'):
    read_quality(tmp_path / 'results.json', 'dynamic')


def test_calibration_by_a_benchmark(tmp_path):
  row = lambda part, seconds: dict(part=part, seconds=[0, seconds, 0], least_seconds=2.0)
  bench = dict(machine=dict(device='TPU v5e', limits={}), rows=[row('decode', 3.0), row('decode', 5.0), row('prefill', 2.5)])
  (tmp_path / 'bench.json').write_text(json.dumps(bench))
  place = calibrated(of_name('v5e'), tmp_path / 'bench.json')
  assert place.factors == dict(prefill=1.25, decode=2.0, uncached=1.0) and 'measured on TPU v5e' in place.source
  with pytest.raises(ConfigError, match='measured on TPU v5e, and the target is v5p'):
    calibrated(of_name('v5p'), tmp_path / 'bench.json')


OTHERS = ('', 'text', '[]', '[' * 10**5, '{"rows": 3, "runs": 3}', '{"runs": {"a": []}, "stages": {"a": [3]}, "reference": "a"}')
ROWS = ([{'part': 'decode', 'seconds': []}], [{'part': 'decode', 'seconds': [0, -1.0], 'least_seconds': 2.0}], 3)


def test_files_of_another_kind_are_named(tmp_path):
  odd = tmp_path / 'odd.json'
  benches = (json.dumps({'machine': {'device': device, 'limits': {}}, 'rows': rows}) for rows in ROWS for device in ('TPU v5e', 3))
  for content in (*OTHERS, *benches):
    odd.write_text(content)
    for read in (lambda: calibrated(of_name('v5e'), odd), lambda: read_quality(odd, 'dynamic')):
      with pytest.raises(ConfigError, match='odd.json: not what .* give'):
        read()
  odd.unlink()
  os.mkfifo(odd)
  for read in (lambda: calibrated(of_name('v5e'), odd), lambda: read_quality(odd, 'dynamic')):
    with pytest.raises(ConfigError, match='odd.json: not what'):
      read()


def test_the_program_writes_a_config_that_eval_takes(tmp_path):
  said: list[str] = []
  target = read_target('device=v5e-8,memory=16GiB,batch=64,context=4096')
  asked = program.Asked(None, '7b', target, Rules(), None, 0, None, 'pope', tmp_path)
  with pytest.raises(ConfigError, match='--benchmark: .popes. is unknown; expected one of'):
    program.run(dataclasses.replace(asked, benchmark='popes'), said.append)
  assert program.run(asked, said.append)
  assert any(line.startswith('\nChosen: image') for line in said) and (tmp_path / 'front.png').stat().st_size > 10_000
  scope: dict = {}
  exec(pathlib.Path(tmp_path / 'choice.py').read_text(), scope)
  cfg = from_config_dict(EvalConfig, scope['get_config']())
  assert cfg.reference == 'dense' and cfg.runs['chosen'].stages[1].selector == 'dynamic'
