"""A decoder that a record describes, and its parameters from `weights.npz`, arrays by the converter's names."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import ConfigError, LlamaConfig, ModelConfig
from dynllava_jax.convert.readers import ConversionError
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


def llama_of(record: Record, entry: str) -> LlamaConfig:
  """The decoder that an entry of `meta.json` describes as transformers does; ConversionError if it describes none."""
  fields = {}
  for ours, theirs in NAMES.items():
    kind = NUMBER if ours in ('rms_norm_eps', 'rope_theta') else WHOLE
    default = {'default': fields['num_heads']} if ours == 'num_kv_heads' else {}
    fields[ours] = record.setting(entry, theirs, kind=kind, **default)
  for name in ('rms_norm_eps', 'rope_theta'):
    fields[name] = float(fields[name])
  if max(fields['vocab_size'], fields['hidden_size'], fields['mlp_dim'], fields['num_layers']) > MOST:
    raise ConversionError(f'{record.described}: {entry} is of a model far larger than a record holds, {fields}')
  try:
    return LlamaConfig(**fields)
  except (ConfigError, TypeError, ValueError) as e:
    raise ConversionError(f'{record.described}: {entry}: {e}') from None


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
