"""Merging a LoRA adapter (arXiv 2106.09685) as LLaVA's training saves it: PEFT's files and `non_lora_trainables.bin`."""

import math
import pathlib
import re

import numpy as np

from dynllava_jax.convert.layouts import ADAPTER_CONFIG, Layout, canonical
from dynllava_jax.convert.readers import ConversionError, Tensor, by_name, file_tensors, read_json

ADAPTERS = ('adapter_model.safetensors', 'adapter_model.bin')
TRAINED_WHOLE = 'non_lora_trainables.bin'
NOT_PLAIN = (
  'use_dora',
  'fan_in_fan_out',
  'rank_pattern',
  'alpha_pattern',
  'modules_to_save',
  'layer_replication',
  'alora_invocation_tokens',
)
# The others (PiSSA, OLoRA, CorDA ...) change the base before they train, and their pairs belong to the changed one.
BASE_UNTOUCHED = (True, False, None, 'gaussian', 'orthogonal', 'eva')


def merge(directory: pathlib.Path, base: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
  """Base tensors by name, with `scale * B A` added where the adapter has a pair; the sum is taken in float32.

  Tensors of `non_lora_trainables.bin` (projector, predictors) take the place of the base's.

  Raises:
    ConversionError: missing file, half a pair, a pair for a weight that the base does not have, or a kind of adapter
      other than plain LoRA.
  """
  scale = _scale(directory / ADAPTER_CONFIG)
  file = next((directory / n for n in ADAPTERS if (directory / n).exists()), None)
  if file is None:
    raise ConversionError(f'{directory}: has {ADAPTER_CONFIG} but none of {", ".join(ADAPTERS)}')
  pairs: dict[str, dict[str, Tensor]] = {}
  for tensor in file_tensors(file):
    key = canonical(Layout.LORA, tensor.key)
    found = re.fullmatch(r'(.*)\.lora_([AB])(?:\.default)?\.weight', key)
    if not found:
      raise ConversionError(f'{file}: {tensor.key} is no LoRA matrix; only plain LoRA adapters can be merged')
    pair = pairs.setdefault(f'{found.group(1)}.weight', {})
    if found.group(2) in pair:
      raise ConversionError(f'{file}: {tensor.key} is there a second time (after {pair[found.group(2)].key})')
    pair[found.group(2)] = tensor
  merged = dict(base)
  for key, pair in pairs.items():
    if key not in base:
      raise ConversionError(f'{file}: adapts {key}, which the base does not have; is --base the model it was trained on?')
    if len(pair) != 2:
      raise ConversionError(f'{file}: {key} has lora_{min(pair)} but not its other half')
    merged[key] = _merged(base[key], pair['A'], pair['B'], scale, file)
  notes.append(f'merged {len(pairs)} LoRA pairs (scale {scale:g}) from {file}')
  whole = directory / TRAINED_WHOLE
  if whole.exists():
    replaced = by_name((k, t) for t in file_tensors(whole) if (k := canonical(Layout.LORA, t.key)) is not None)
    merged |= replaced
    notes.append(f'took {len(replaced)} tensors from {whole}')
  return merged


def _scale(file: pathlib.Path) -> float:
  config = read_json(file)
  strange = [n for n in NOT_PLAIN if config.get(n)]
  start = config.get('init_lora_weights', True)
  if start not in BASE_UNTOUCHED:
    raise ConversionError(
      f'{file}: init_lora_weights is {start!r}, so the adapter belongs to a base that its training changed first; save it with '
      'PEFT as plain LoRA of the original base (path_initial_model_for_weight_conversion)'
    )
  if config.get('peft_type', 'LORA') != 'LORA' or config.get('bias', 'none') != 'none' or strange:
    raise ConversionError(
      f'{file}: only plain LoRA adapters can be merged, this one sets {", ".join(strange) or "peft_type or bias"}'
    )
  try:
    rank, alpha = config['r'], config['lora_alpha']
  except KeyError as e:
    raise ConversionError(f'{file}: key {e} is missing') from None
  if not (type(rank) is int and rank > 0 and type(alpha) in (int, float)):
    raise ConversionError(f'{file}: r is {rank!r} and lora_alpha {alpha!r}, expected a positive whole number and a number')
  return alpha / (math.sqrt(rank) if config.get('use_rslora') else rank)


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, file: pathlib.Path) -> Tensor:
  if weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
    raise ConversionError(f'{file}: {b.key} {b.shape} times {a.key} {a.shape} does not fit {weight.key} {weight.shape}')

  def read() -> np.ndarray:
    merged = b.load().astype(np.float32) @ a.load().astype(np.float32)
    merged *= np.float32(scale)
    merged += weight.load()  # in place: several large ones are on their way at a time
    return merged.astype(weight.dtype, copy=False)

  return Tensor(weight.key, weight.shape, weight.dtype, f'{weight.origin} + {file}', read)
