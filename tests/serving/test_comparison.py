"""The benchmark: what it counts agrees with what is allocated, and it says where nothing can be gained."""

import dataclasses

import pytest

from dynllava_jax import costs, presets
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import DENSE, BenchConfig, ConfigError, EvalRun, Stage
from dynllava_jax.serving import comparison, timing

HALF = (Stage(), Stage(start=1, selector='uniform', image_keep_rate=0.5))
CFG = BenchConfig(
  model=presets.TINY, runs={'dense': EvalRun(stages=DENSE), 'half': EvalRun(stages=HALF)}, rows=(2,), text=16, new=4,
  uncached_new=0, repeats=2, dtype='float32',
)  # fmt: skip


@pytest.mark.slow
def test_what_is_measured(tmp_path):
  told = []
  result = comparison.measure(CFG, told.append, lambda result: None)
  rows = {(r['run'], r['part']): r for r in result['rows']}
  assert told[0] == 'weights and cache: each layer apart; attention of the vision tower: xla' and told[1:] == ['batch of 2: timed']
  assert {part for _, part in rows} == {'prefill', 'decode', 'end to end', 'engine'}
  for name, run in CFG.runs.items():
    allocated = sum(costs.cache_bytes(CFG.model, run.stages, CFG.text, CacheSpec(max_new_tokens=CFG.new), 4))
    assert rows[name, 'decode']['kv_bytes'] == 2 * allocated
    assert rows[name, 'prefill']['memory_bytes'] > rows[name, 'prefill']['parameter_bytes']
    assert rows[name, 'decode']['ratio'][0] > 0 and rows[name, 'decode']['tokens_per_second'] > 0
  assert rows['half', 'prefill']['ideal_ratio'] > 1 == rows['dense', 'prefill']['ideal_ratio']
  text = comparison.as_markdown(CFG, result)
  assert text.count('| 2 | half |') == 4 and '## engine' in text
  comparison.picture(CFG, result, tmp_path / 'bench.png')
  assert (tmp_path / 'bench.png').stat().st_size > 5000


def test_says_where_nothing_can_be_gained():
  row = dict(run='half', part='decode', rows=1, ideal_ratio=1.02, weights_share=0.97)
  words = 'half, decode, batch of 1: no gain is possible here, at most 1.02 times; weights are 97 % of what a step reads.'
  assert comparison.no_gain(CFG, row) == words
  assert comparison.no_gain(CFG, row | dict(ideal_ratio=1.5)) == comparison.no_gain(CFG, row | dict(run='dense')) == ''


def test_the_least_time_is_that_of_arithmetic_or_memory():
  limit = timing.Limits(flops=1e12, bandwidth=1e9, source='')
  assert limit.seconds(2e12, 1e9) == 2 and limit.seconds(1e12, 3e9) == 3


@pytest.mark.parametrize(
  'change', [dict(rows=()), dict(rows=(0,)), dict(new=1), dict(repeats=0), dict(dtype='int8'), dict(runs={})]
)
def test_settings_that_cannot_be(change):
  with pytest.raises(ConfigError):
    dataclasses.replace(CFG, **change)
