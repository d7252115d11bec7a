"""What a checkpoint is, told from names, shapes and configs; no tensor is loaded."""

import collections
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from dynllava_jax import checkpoint
from dynllava_jax.checkpoint import MODEL_FILE
from dynllava_jax.convert.inputs import nested
from dynllava_jax.convert.layouts import ADAPTER_CONFIG, Layout, canonical, detect
from dynllava_jax.convert.lora import ADAPTERS, TRAINED_WHOLE
from dynllava_jax.convert.readers import Tensor, directory_tensors, file_tensors, has_weights
from dynllava_jax.convert.source import PROJECTOR_FILE

PARTS = (
  ('vision_model.', 'vision tower'),
  ('model.mm_projector', 'projector'),
  ('model.image_score_predictor', 'image predictor'),
  ('model.output_text_score_predictor', 'text predictor'),
  ('model.instruct_score_predictor', 'instruction predictor'),
  ('model.layers', 'decoder layers'),
  ('model.embed_tokens', 'embedding'),
  ('lm_head', 'output head'),
  ('model.norm', 'final norm'),
)
SHOWN = (
  'model_type',
  'architectures',
  'hidden_size',
  'num_hidden_layers',
  'num_attention_heads',
  'num_key_value_heads',
  'vocab_size',
  'rope_scaling',
  'tie_word_embeddings',
  'mm_vision_tower',
  'mm_projector_type',
  'image_token_index',
  'sparse_config',
)


def describe(directory: pathlib.Path) -> str:
  """Layout, config, parameters per part and dtypes of a checkpoint, PyTorch or ours, as text.

  Raises:
    ConversionError, CheckpointError: it is not a checkpoint, or a damaged one.
  """
  directory = directory.absolute()
  if (directory / MODEL_FILE).exists() or (directory.name.isdigit() and (directory.parent / MODEL_FILE).exists()):
    return _ours(directory)
  described = any((directory / n).exists() for n in ('config.json', ADAPTER_CONFIG))
  if not described and (has_weights(directory) or (directory / PROJECTOR_FILE).exists()):
    layout, config, lines = Layout.LLAVA, {}, ['layout: unknown, config.json is missing']
  else:
    layout, config = detect(directory)
    lines = [f'layout: {layout.value}']
  groups = {'': config} | {f'{n}.': nested(directory / 'config.json', config, n) for n in ('text_config', 'vision_config')}
  for where, values in groups.items():
    lines += [f'{where}{k}: {json.dumps(values[k])}' for k in SHOWN if values.get(k) is not None]
  return '\n'.join(lines + _count((_part(layout, t.key), t.shape, t.dtype) for t in _tensors(directory)))


def _tensors(directory: pathlib.Path) -> list[Tensor]:
  if has_weights(directory):
    return directory_tensors(directory)
  names = (*ADAPTERS, *TRAINED_WHOLE) if (directory / ADAPTER_CONFIG).exists() else (PROJECTOR_FILE,)
  found = [t for n in names if (directory / n).exists() for t in file_tensors(directory / n)]
  return found or directory_tensors(directory)  # which says what is missing


def _part(layout: Layout, key: str) -> str:
  name = canonical(layout, key)
  if name is None:
    return 'passed over'
  if '.lora_' in name:
    return 'LoRA pairs'
  return next((part for start, part in PARTS if name.startswith(start)), 'unknown')


def _ours(directory: pathlib.Path) -> str:
  root, step = checkpoint.locate(directory)
  info = checkpoint.read_info(directory)
  stored = checkpoint.stored_params(directory)
  checkpoint.check_integrity(root / str(step))
  lines = [f'layout: dynllava_jax, step {step} of {", ".join(map(str, checkpoint.all_steps(root)))}; every file is intact']
  for name in ('vision', 'llama', 'predictor'):
    values: Any = getattr(info.model, name)
    if values is not None:
      lines.append(f'{name}: ' + ', '.join(f'{k}={v}' for k, v in dataclasses.asdict(values).items()))
  count, patches = info.model.num_image_tokens, info.model.vision.num_patches
  lines.append(f'projector: {info.model.projector}, {count} tokens of {patches} patches')
  lines += [f'reducer: {info.reducer.to_plain()}'] if info.reducer else []
  share = lambda s: f'image_tokens={s.image_tokens}' if s.image_tokens else f'image_keep_rate={s.image_keep_rate}'
  lines += [f'stage from layer {s.start}: {s.selector}, {share(s)}' for s in info.stages]
  return '\n'.join(lines + _count((k.split('/')[0], v.shape, v.dtype) for k, v in stored.items()))


def _count(tensors) -> list[str]:
  numbers: collections.Counter = collections.Counter()
  dtypes = collections.defaultdict(set)
  for part, shape, dtype in tensors:
    numbers[part] += int(np.prod(shape, dtype=np.int64))
    dtypes[part].add(str(np.dtype(dtype)))
  lines = [f'{part:<18} {n:>16,} parameters, {", ".join(sorted(dtypes[part]))}' for part, n in numbers.items()]
  return [*lines, f'{"total":<18} {sum(numbers.values()):>16,} parameters']
