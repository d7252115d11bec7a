"""Reading PyTorch checkpoints: `config.json`, and tensors one at a time from `.bin` or safetensors shards."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import (
  CLIP_MEAN,
  CLIP_STD,
  DENSE,
  LlamaConfig,
  ModelConfig,
  PredictorConfig,
  SparsityConfig,
  Stage,
  VisionConfig,
  check_stages,
)


class ConversionError(RuntimeError):
  """A checkpoint that cannot be converted; the message names file and key."""


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON file; ConversionError if it is missing or broken."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise ConversionError(f'{path}: missing') from None
  except json.JSONDecodeError as e:
    raise ConversionError(f'{path}: not valid JSON ({e})') from None


def shards(directory: pathlib.Path) -> list[pathlib.Path]:
  """The weight files of a checkpoint directory, safetensors before `.bin`.

  Raises:
    ConversionError: no weights, or an index names a file that is not there.
  """
  for pattern in ('model.safetensors', 'pytorch_model.bin'):
    index = directory / f'{pattern}.index.json'
    if index.exists():
      content = read_json(index)
      if 'weight_map' not in content:
        raise ConversionError(f'{index}: has no weight_map')
      files = [directory / name for name in sorted(set(content['weight_map'].values()))]
      absent = [f.name for f in files if not f.exists()]
      if absent:
        raise ConversionError(f'{index}: names {", ".join(absent)}, which is not in {directory}')
      return files
    if (directory / pattern).exists():
      return [directory / pattern]
  raise ConversionError(
    f'{directory}: no weights found; expected model.safetensors or pytorch_model.bin, whole or sharded with an index'
  )


def tensors(path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
  """(key, array) of one weight file; bfloat16 stays bfloat16. Only `.bin` needs torch.

  Raises:
    ConversionError: truncated or unreadable file, or a pickle that holds anything but tensors.
  """
  if path.suffix == '.safetensors':
    try:
      with safe_open(path, 'numpy') as f:
        for key in f.keys():
          yield key, f.get_tensor(key)
    except (SafetensorError, OSError) as e:
      raise ConversionError(f'{path}: unreadable, truncated or not safetensors ({e})') from None
    return
  try:
    import torch  # the one place that needs it
  except ImportError:
    raise ConversionError(
      f'{path}: reading .bin files needs torch (pip install torch), or save the checkpoint as safetensors'
    ) from None
  try:
    content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
  except Exception as e:  # torch raises many types for damaged or hostile files
    raise ConversionError(
      f'{path}: unreadable, truncated or not a plain tensor file ({type(e).__name__}: {str(e).splitlines()[0]})'
    ) from None
  for key, tensor in content.items():
    if not isinstance(tensor, torch.Tensor):
      raise ConversionError(f'{path}: {key} is a {type(tensor).__name__}, expected a tensor')
    if tensor.dtype == torch.bfloat16:
      yield key, tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    else:
      yield key, tensor.numpy()


def vision_directory(src: pathlib.Path, config: dict[str, Any], vision: str | None) -> pathlib.Path:
  """Where the CLIP tower lies: `--vision`, or the config's `mm_vision_tower` (relative to the checkpoint)."""
  named = vision or config.get('mm_vision_tower') or config.get('vision_tower')
  if not named:
    raise ConversionError(
      f'{src / "config.json"}: names no vision tower (mm_vision_tower); is this a text-only model? '
      'Give the CLIP directory with --vision'
    )
  path = pathlib.Path(named) if vision else (src / named)
  if not (path / 'config.json').exists():
    raise ConversionError(f'{path}: no CLIP vision tower here (config.json is missing); give its directory with --vision')
  return path


def read_config(src: pathlib.Path, vision_dir: pathlib.Path) -> CheckpointInfo:
  """Model, stage list and objective from the authors' `config.json` and CLIP's.

  Raises:
    ConversionError: a missing key, or something this model does not have.
  """
  file = src / 'config.json'
  config = read_json(file)
  try:
    _refuse(file, config)
    vision = _vision_config(vision_dir, config)
    llama = LlamaConfig(
      vocab_size=config['vocab_size'],
      hidden_size=config['hidden_size'],
      mlp_dim=config['intermediate_size'],
      num_layers=config['num_hidden_layers'],
      num_heads=config['num_attention_heads'],
      num_kv_heads=config.get('num_key_value_heads') or config['num_attention_heads'],
      rms_norm_eps=config['rms_norm_eps'],
      rope_theta=float(config.get('rope_theta') or 10000.0),
    )
    projector = config.get('mm_projector_type', 'linear')
    sparse = config.get('sparse_config')
    if not sparse:
      return CheckpointInfo(model=ModelConfig(vision=vision, projector=projector, llama=llama), unused_vision_layers=True)
    predictor = PredictorConfig(
      d_model=sparse['d_model'],
      num_heads=sparse['nhead'],
      num_layers=sparse['num_layers'],
      mlp_dim=int(sparse['d_model'] * (sparse['dim_feedforward'] / sparse['d_model'])),
    )
    start = sparse['sparse_layer']
    dynamic = Stage(start=start, selector='dynamic', image_keep_rate=sparse['vision_keep_rate'])
    model = ModelConfig(vision=vision, projector=projector, llama=llama, predictor=predictor)
    stages = (*(DENSE if start else ()), dynamic)
    check_stages(stages, model)
    return CheckpointInfo(
      model=model,
      stages=stages,
      sparsity=SparsityConfig(
        image_keep_rate=sparse['vision_keep_rate'],
        text_keep_rate=sparse['output_text_keep_rate'],
        mask_loss_weight=sparse['mask_loss_weight'],
        min_answer_len=sparse['output_text_len_for_training'],
      ),
      unused_vision_layers=True,
    )
  except KeyError as e:
    raise ConversionError(f'{file}: key {e} is missing') from None
  except (TypeError, ValueError, ZeroDivisionError) as e:  # ConfigError is a ValueError
    raise ConversionError(f'{file}: {e}') from None


def _refuse(file: pathlib.Path, config: dict[str, Any]) -> None:
  """ConversionError for what would silently be computed wrong."""
  sparse = config.get('sparse_config') or {}
  problems = {
    f'hidden_act {config.get("hidden_act")!r} (only silu)': config.get('hidden_act', 'silu') != 'silu',
    'rope_scaling': bool(config.get('rope_scaling')),
    'attention_bias': bool(config.get('attention_bias')),
    'tied embeddings': bool(config.get('tie_word_embeddings')),
    'any-resolution images': str(config.get('image_aspect_ratio')).startswith('anyres'),
    "feature select 'cls_patch'": config.get('mm_vision_select_feature', 'patch') != 'patch',
    'the instruction predictor': bool(sparse.get('use_instruct_predictor')),
    'a sparse config without vision predictor': bool(sparse) and not sparse.get('use_vision_predictor', True),
    'a sparse config without output text predictor': bool(sparse) and not sparse.get('use_output_text_predictor', True),
  }
  found = [name for name, present in problems.items() if present]
  if found:
    raise ConversionError(f'{file}: not supported: {", ".join(found)}')


def _vision_config(directory: pathlib.Path, llava: dict[str, Any]) -> VisionConfig:
  file = directory / 'config.json'
  config = read_json(file)
  config = config.get('vision_config', config)
  if config.get('hidden_act', 'quick_gelu') != 'quick_gelu':
    raise ConversionError(f'{file}: hidden_act {config["hidden_act"]!r} is not supported, only quick_gelu')
  preprocessor = directory / 'preprocessor_config.json'
  images = read_json(preprocessor) if preprocessor.exists() else {}
  try:
    return VisionConfig(
      image_size=config['image_size'],
      patch_size=config['patch_size'],
      hidden_size=config['hidden_size'],
      mlp_dim=config['intermediate_size'],
      num_layers=config['num_hidden_layers'],
      num_heads=config['num_attention_heads'],
      layer_norm_eps=config.get('layer_norm_eps', 1e-5),
      select_layer=llava.get('mm_vision_select_layer', -2),
      image_mean=tuple(images.get('image_mean', CLIP_MEAN)),
      image_std=tuple(images.get('image_std', CLIP_STD)),
    )
  except KeyError as e:
    raise ConversionError(f'{file}: key {e} is missing') from None
