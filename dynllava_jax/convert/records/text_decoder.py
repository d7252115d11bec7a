"""A decoder without tower that a record brings with it, for methods that were recorded on text alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import LlamaConfig, ModelConfig, VisionConfig
from dynllava_jax.config.groups import groups_of
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import given, load_case
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.described import NUMBER, WHOLE
from dynllava_jax.convert.tables import llava_rules
from dynllava_jax.models.params import abstract_params
from dynllava_jax.sharding import unboxed

NAMES = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'hidden_size',
  'mlp_dim': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'rms_norm_eps': 'rms_norm_eps',
  'rope_theta': 'rope_theta',
}
MOST = 2**16  # numbers along an axis
NO_TOWER = VisionConfig(image_size=14, patch_size=14, hidden_size=4, mlp_dim=4, num_layers=1, num_heads=1, select_layer=-1)


def model_of(record: Record, **groups: Any) -> ModelConfig:
  """The decoder that `config` of `meta.json` describes, below a tower of one patch that is never run; `groups` of `ModelConfig`."""
  fields = {}
  for ours, theirs in NAMES.items():
    kind = NUMBER if ours in ('rms_norm_eps', 'rope_theta') else WHOLE
    default = {'default': fields['num_heads']} if ours == 'num_kv_heads' else {}
    fields[ours] = record.setting('config', theirs, kind=kind, **default)
  for name in ('rms_norm_eps', 'rope_theta'):
    fields[name] = float(fields[name])
  if max(fields['vocab_size'], fields['hidden_size'], fields['mlp_dim'], fields['num_layers']) > MOST:
    raise ConversionError(f'{record.described}: config is of a model far larger than a record holds, {fields}')
  return ModelConfig(vision=NO_TOWER, projector='linear', llama=LlamaConfig(**fields), **groups)


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
