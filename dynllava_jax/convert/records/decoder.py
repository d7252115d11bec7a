"""A decoder that a record brings in its `weights.npz`: parameters of arrays by the converter's names."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import ModelConfig
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.tables import llava_rules
from dynllava_jax.models.params import abstract_params
from dynllava_jax.sharding import unboxed


def params_of(record: Record, model: ModelConfig, groups: tuple[str, ...], weights: dict[str, np.ndarray]) -> dict[str, Any]:
  """Some groups of parameters in checkpoint form; ConversionError if a tensor is missing, left over or of another shape.

  Args:
    record, model: what is recomputed.
    groups: of its parameters, all that `weights` hold, arrays by the converter's names.
  """
  shapes, params, filled = unboxed(abstract_params(model)), {}, set()
  for rule in (rule for rule in llava_rules(model) if rule.path[0] in groups):
    leaf = shapes
    for step in rule.path:
      leaf = leaf[step]
    value = np.zeros(leaf.shape, np.float32)
    for key, index in rule.keys(leaf.shape[0]):
      wanted = rule.transform.torch_shape(leaf.shape[rule.slot_axes :])
      if key not in weights or weights[key].shape != wanted:
        held = weights[key].shape if key in weights else 'missing'
        raise ConversionError(f'{record.folder}/weights.npz: {key} is {held}, expected shape {wanted}')
      value[index] = rule.transform.apply(weights[key], leaf.shape[rule.slot_axes :])
      filled.add(key)
    group = params
    for step in rule.path[:-1]:
      group = group.setdefault(step, {})
    group[rule.path[-1]] = jnp.asarray(value)
  if strange := weights.keys() - filled:
    raise ConversionError(f'{record.folder}/weights.npz: {min(strange)} is no tensor of this model')
  return params
