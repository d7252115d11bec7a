"""What a run trains: groups, single parameters by path, and nothing that is not there."""

import dataclasses

import numpy as np
import pytest

from dynllava_jax import presets
from dynllava_jax.config import ConfigError, TrainConfig
from dynllava_jax.training.freezing import check_paths, joined, matches, split_frozen

PARAMS = {
  'vision': {'layers': {'q': 1}, 'norm': {'scale': 2}},
  'llama': {'embedding': 3, 'stage_0': {'q': 4, 'router': 5}, 'stage_1_at_3': {'experts': {'up': 6, 'down': 7}, 'router': 8}},
  'vision_tail': {'norm': 9},
}


def leaves(tree):
  return sorted(x for value in tree.values() for x in (leaves(value) if isinstance(value, dict) else [value]))


@pytest.mark.parametrize(
  'held, only, trained',
  [
    ((), (), [1, 2, 3, 4, 5, 6, 7, 8]),
    (('vision',), (), [3, 4, 5, 6, 7, 8]),
    (('vision', 'llama/layers/q'), (), [3, 5, 6, 7, 8]),
    (('llama/*/router', 'vision/norm'), (), [1, 3, 4, 6, 7]),
    ((), ('llama/*/experts', 'llama/*/router'), [5, 6, 7, 8]),
    (('llama/*/experts/up',), ('llama/*/experts',), [7]),
    ((), ('vision',), [1, 2]),
  ],
)
def test_what_is_trained(held, only, trained):
  parts = split_frozen(PARAMS, held, only)
  assert leaves(parts[0]) == trained
  assert leaves(parts[1]) == sorted(set(range(1, 10)) - set(trained))
  assert joined(*parts) == PARAMS


def test_a_pattern_names_whole_parts():
  assert matches('llama/*/q', ('llama', 'stage_0', 'q')) and matches('llama/layers', ('llama', 'stage_2_at_7', 'q'))
  assert not matches('llama/q', ('llama', 'stage_0', 'q')) and not matches('llama/layers/q/a', ('llama', 'layers', 'q'))


def test_paths_that_name_nothing_are_refused():
  cfg = TrainConfig(model=presets.TINY)
  there = {'llama': {'norm': {'scale': np.ones(1)}, 'stage_0': {'q': np.ones(1)}}}
  check_paths(dataclasses.replace(cfg, frozen=('llama/norm',)), there)
  for fields, words in (
    (
      dict(frozen=('llama/nrom',)),
      "frozen: 'llama/nrom' names no parameter of this model; there are llama/layers, llama/norm",
    ),
    (dict(only=('llama/*/experts',)), "only: 'llama/\\*/experts' names no parameter"),
    (dict(frozen=('llama/*',)), 'leaves nothing to train'),
  ):
    with pytest.raises(ConfigError, match=words):
      check_paths(dataclasses.replace(cfg, **fields), there)
  with pytest.raises(ConfigError, match="only: 'lama' is no parameter group"):
    TrainConfig(model=presets.TINY, only=('lama/q',))
