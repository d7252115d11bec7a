"""What methods bring beside a LLaVA, on its way in and out: entries of `config.json` of our own, as no published layout has them.

Their tensors have the names of the authors' classes where there are any (`tables`), and lie among the others.
"""

import dataclasses
from typing import Any

from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import ModelConfig, to_dict
from dynllava_jax.config.groups import groups_of
from dynllava_jax.convert.inputs import ConversionError

KEYS = {'exit_head': 'dynllava_exit_head', 'memory': 'dynllava_memory', 'pruning': 'dynllava_pruning'}  # by field of `ModelConfig`
ELSEWHERE = ('predictor',)  # fields that a layout of its own has


def described(config: dict[str, Any]) -> dict[str, Any]:
  """Fields of `ModelConfig` that a `config.json` describes."""
  return {field: config[key] for field, key in KEYS.items() if key in config}


def written(model: ModelConfig) -> dict[str, Any]:
  """The entries of `config.json` that describe them."""
  return {key: to_dict(getattr(model, field)) for field, key in KEYS.items() if getattr(model, field) is not None}


def exported(info: CheckpointInfo, layout: str, drop: bool, keeps: bool) -> CheckpointInfo:
  """The model without what has no place in a layout.

  Args:
    info, layout: what is exported.
    drop: whether it may be left behind, and then all of it is.
    keeps: whether the layout takes what has a name in PyTorch.

  Raises:
    ConversionError: there is something, and it may not.
  """
  there = {group.field: group.what for group in groups_of(info.model).values() if group.field not in ELSEWHERE}
  homeless = {field: what for field, what in there.items() if drop or not keeps or field not in KEYS}
  if homeless and not drop:
    raise ConversionError(
      f'--export={layout}: the model has {", ".join(homeless.values())}, which have no place in that layout; leave them behind '
      'with --drop_predictors'
    )
  return dataclasses.replace(info, model=dataclasses.replace(info.model, **dict.fromkeys(homeless)))
