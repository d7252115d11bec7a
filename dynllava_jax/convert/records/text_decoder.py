"""A decoder without tower that a record brings with it, for methods that were recorded on text alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import ModelConfig, VisionConfig
from dynllava_jax.config.groups import groups_of
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import given, load_case
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.decoder import llama_of
from dynllava_jax.convert.tables import llava_rules
from dynllava_jax.models.params import abstract_params
from dynllava_jax.sharding import unboxed

NO_TOWER = VisionConfig(image_size=14, patch_size=14, hidden_size=4, mlp_dim=4, num_layers=1, num_heads=1, select_layer=-1)


def model_of(record: Record, **groups: Any) -> ModelConfig:
  """The decoder that `config` of `meta.json` describes, below a tower of one patch that is never run; `groups` of `ModelConfig`."""
  llama = llama_of(record, 'config')
  return ModelConfig(vision=NO_TOWER, projector='linear', llama=llama, **groups)


def params_of(record: Record, model: ModelConfig) -> dict[str, Any]:
  """`weights.npz` by the converter's names as parameters in checkpoint form, float32: decoder and what methods bring.

  Raises:
    ConversionError: a tensor is unknown, missing, or does not fit the model.
  """
  at, groups = record.folder / 'weights.npz', ('llama', *groups_of(model))
  shapes = {tuple(k.key for k in p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(unboxed(abstract_params(model)))}
  expected = {
    key: (rule, index) for rule in llava_rules(model) if rule.path[0] in groups for key, index in rule.keys(shapes[rule.path][0])
  }
  weights, leaves = load_case(at), {}
  if unknown := sorted(weights.keys() - expected.keys()):
    raise ConversionError(f'{at}: {unknown[0]} is unknown, nothing in the model takes it')
  for key, (rule, index) in expected.items():
    shape = shapes[rule.path]
    slot = shape[rule.slot_axes :]
    array = given(at, weights, key, rule.transform.torch_shape(slot)).astype(np.float32)
    leaves.setdefault(rule.path, np.zeros(shape, np.float32))[index] = rule.transform.apply(array, slot)
  params: dict[str, Any] = {}
  for path, leaf in leaves.items():
    group = params
    for step in path[:-1]:
      group = group.setdefault(step, {})
    group[path[-1]] = jnp.asarray(leaf)
  return params
