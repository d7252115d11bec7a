"""Checkpoint of this project -> a directory that PyTorch loads, tensor by tensor."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from dynllava_jax import checkpoint
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import CLIP_TOKENIZER_FILES
from dynllava_jax.convert import brought, export_configs
from dynllava_jax.convert.convert import DTYPES, INT8, with_progress
from dynllava_jax.convert.destination import TOWER_FOLDER, check_destination, new_directory
from dynllava_jax.convert.export_adapter import MergingReader, adapter_files, adapter_plan, reader_of
from dynllava_jax.convert.export_configs import Vocabulary
from dynllava_jax.convert.layouts import CLIP_TEXT, Layout, canonical, to_llava_hf
from dynllava_jax.convert.moe_llava import from_llava
from dynllava_jax.convert.plan import slots_by_key
from dynllava_jax.convert.readers import ConversionError, Tensor, directory_tensors, file_tensors
from dynllava_jax.convert.shards import ShardWriter
from dynllava_jax.convert.source import TOWER, VOCAB_KEYS
from dynllava_jax.convert.step_reader import Out, StepReader

PEFT, MOE = 'peft', 'moe-llava'
PREDICTORS = ('image_predictor', 'text_predictor')


def export(
  src: pathlib.Path,
  dst: pathlib.Path,
  layout: str,
  *,
  vision: pathlib.Path | None = None,
  dtype: str = 'keep',
  overwrite: bool = False,
  readback: bool = True,
  drop_predictors: bool = False,
) -> list[Out]:
  """Writes a checkpoint as PyTorch code expects it.

  Args:
    src: checkpoint directory or step of ours; dst: directory to write.
    layout: 'llava-hf' for transformers, 'llava', 'dynamic-llava' or 'moe-llava' for the authors' code; adapters are merged. 'peft'
      for adapters as they are, and what was trained with them.
    vision: CLIP directory that the tower's never-run top is taken from, if the checkpoint does not hold it.
    dtype, overwrite, readback: as in `convert.convert`.
    drop_predictors: export the dense part of a Dynamic-LLaVA model.

  Raises:
    ConversionError: the layout cannot hold the model, or `dst` cannot be written.
    CheckpointError: `src` is missing or damaged.
  """
  dst = pathlib.Path(os.path.realpath(dst))
  check_destination(dst, overwrite, checkpoint.locate(src)[0], vision)
  if dtype == INT8:
    raise ConversionError('--dtype=int8: is for generation here; export as keep, float32 or bfloat16')
  info, assets = checkpoint.read_info(src), checkpoint.read_assets(src)
  if info.int8:
    raise ConversionError(f'{src}: its weights are rounded to int8, for generation here; export the checkpoint that it was made of')
  tokenizer = checkpoint.read_tokenizer(src) or {}
  info, reader = _exported_model(info, layout, drop_predictors), reader_of(src)
  base = export_configs.carried_config(info, layout, json.loads(assets.get('config.json', b'{}')))
  vocab = export_configs.vocabulary(info, base, tokenizer) if layout == 'llava-hf' else None
  plan = adapter_plan(info, reader, DTYPES[dtype]) if layout == PEFT else _plan(info, vocab, reader, DTYPES[dtype], vision)
  stored = next(str(o.dtype) for o in plan if o.folder == '')
  tower = base.get('mm_vision_tower', TOWER_FOLDER) if layout == PEFT else str(dst / TOWER_FOLDER)
  files = _files(info, base, vocab, stored, tower, tokenizer, assets)
  if layout == PEFT:
    files = {n: c for n, c in files.items() if '/' not in n} | adapter_files(info)
  with new_directory(dst, sum(o.nbytes for o in plan)) as partial:
    places = {(o.folder, o.file) for o in plan}
    writers = {
      at: ShardWriter(partial / at[0], [(o.key, o.shape, o.dtype) for o in plan if (o.folder, o.file) == at], name=at[1])
      for at in places
    }

    def write(out: Out) -> None:
      value, writer = np.ascontiguousarray(out.read().astype(out.dtype, copy=False)), writers[out.folder, out.file]
      writer.write(out.key, value)
      if readback and not writer.holds(out.key):
        raise ConversionError(f'{writer.files[out.key]}: {out.key} read back is not what was written; is the disk failing?')

    with_progress('exporting', write, plan, [o.nbytes for o in plan])
    for writer in writers.values():
      writer.finish()
      for file in set(writer.files.values()):
        file_tensors(file)  # the header can be read, and fits
    for name, content in files.items():
      checkpoint.write_atomically(partial / name, content)
  return plan


def _exported_model(info: CheckpointInfo, layout: str, drop_predictors: bool) -> CheckpointInfo:
  model = info.model
  if layout == 'dynamic-llava' and drop_predictors:
    raise ConversionError('--export=dynamic-llava: needs the predictors; leave out --drop_predictors, or export it as llava')
  if layout == 'dynamic-llava' and model.predictor is None:
    raise ConversionError(
      '--export=dynamic-llava: the model has no predictors; export it as llava, or convert with --add_predictors'
    )
  if (layout == MOE) != (model.llama.experts is not None):
    has = 'no experts' if layout == MOE else 'experts, which only moe-llava has a place for'
    raise ConversionError(f'--export={layout}: the model has {has}; choose another layout')
  if layout == PEFT:
    if drop_predictors:
      raise ConversionError('--export=peft: holds what was trained, predictors too; leave out --drop_predictors')
    return brought.exported(info, layout, drop=False, keeps=True)
  info = brought.exported(info, layout, drop_predictors, keeps=layout != 'llava-hf')
  model = info.model
  if layout != 'dynamic-llava' and model.predictor is not None:
    if not drop_predictors:
      raise ConversionError(
        f'--export={layout}: the model has predictors, which have no place in that layout; export it as dynamic-llava, or leave '
        'them behind with --drop_predictors'
      )
    info = dataclasses.replace(info, model=dataclasses.replace(model, predictor=None))
  if layout == 'llava-hf' and model.clip_text is not None:  # transformers' LLaVA has no place for it
    info = dataclasses.replace(info, model=dataclasses.replace(info.model, clip_text=None))
  if layout == 'llava-hf' and model.projector != 'mlp2x_gelu':
    raise ConversionError(f'--export=llava-hf: transformers has only the projector mlp2x_gelu, the model has {model.projector}')
  return info


def _plan(
  info: CheckpointInfo,
  vocab: Vocabulary | None,
  reader: StepReader | MergingReader,
  dtype: np.dtype | None,
  vision: pathlib.Path | None,
) -> list[Out]:
  """Every tensor of the export; `vocab` is that of llava-hf, None for the authors' layouts."""
  tail = _tail_tensors(info, vision)
  extra, experts = vocab.rows - vocab.own if vocab else 0, info.model.llama.experts is not None
  plan = []
  for key, (rule, index, leaf) in slots_by_key(dataclasses.replace(info, unused_vision_layers=True)).items():
    shape = rule.transform.torch_shape(leaf.slot_shape)
    if rule.path[0] in checkpoint.TAIL and not info.unused_vision_layers:
      tensor = tail[key]
      if tensor.shape != shape:
        raise ConversionError(f'{tensor.origin}: {tensor.key} has shape {tensor.shape}, the tower of the checkpoint {shape}')
      stored, read = tensor.dtype, tensor.load
    else:
      stored = np.dtype(reader.array(rule.path).dtype.numpy_dtype)
      read = lambda rule=rule, index=index: rule.transform.invert(reader.slot(rule.path, index))
    if extra and key in VOCAB_KEYS:
      shape, read = (shape[0] + extra, shape[1]), lambda read=read: _with_mean_rows(read(), extra)
    folder = TOWER_FOLDER if key.startswith((TOWER, *CLIP_TEXT)) and not vocab else ''
    plan.append(Out(folder, to_llava_hf(key) if vocab else from_llava(key) if experts else key, shape, dtype or stored, read))
  return plan


def _with_mean_rows(x: np.ndarray, count: int) -> np.ndarray:
  """Rows for new tokens: the mean of the others, which no prompt embeds and no arg-max picks."""
  mean = x.astype(np.float32).mean(0, keepdims=True).astype(x.dtype)
  return np.concatenate([x, np.repeat(mean, count, 0)])


def _tail_tensors(info: CheckpointInfo, vision: pathlib.Path | None) -> dict[str, Tensor]:
  if info.unused_vision_layers:
    if vision is not None:
      raise ConversionError(
        f'--vision={vision}: the checkpoint holds its whole tower, nothing would be taken from there; leave it out'
      )
    return {}
  if vision is None:
    raise ConversionError(
      f'the checkpoint does not hold the CLIP layers above {info.model.vision.layers_run}: LLaVA never runs them, but '
      'PyTorch loads them; give the CLIP directory it came from with --vision'
    )
  named = {canonical(Layout.CLIP, t.key): t for t in directory_tensors(vision)}
  whole = slots_by_key(dataclasses.replace(info, unused_vision_layers=True))
  wanted = [k for k, (rule, *_) in whole.items() if rule.path[0] in checkpoint.TAIL]
  absent = [k for k in wanted if k not in named]
  if absent:
    raise ConversionError(f'{vision}: has no {absent[0]}; is it the CLIP directory the checkpoint came from?')
  return {k: named[k] for k in wanted}


def _files(
  info: CheckpointInfo,
  base: dict[str, Any],
  vocab: Vocabulary | None,
  dtype: str,
  tower_name: str,
  tokenizer: dict[str, bytes],
  assets: dict[str, bytes],
) -> dict[str, bytes]:
  """What lies beside the weights, by path below the destination; `base` and `vocab` as in `export_configs`."""
  own = tokenizer | {n: c for n, c in assets.items() if '/' not in n and n != 'config.json'}
  generic = {
    'config.json': export_configs.clip_config(info.model.vision, dtype, info.model.clip_text),
    'preprocessor_config.json': export_configs.preprocessor_config(info.model.vision),
  }
  tower = {n: assets.get(f'vision/{n}') or json.dumps(c, indent=1).encode() for n, c in generic.items()}
  if vocab:
    config = export_configs.llava_hf_config(info, base, dtype, vocab)
    if vocab.added and export_configs.has_vocabulary(tokenizer):
      own |= export_configs.tokenizer_files(vocab, own)
    own.setdefault('preprocessor_config.json', tower['preprocessor_config.json'])
    own.setdefault('processor_config.json', json.dumps(export_configs.processor_config(info.model.vision), indent=1).encode())
  else:
    config = export_configs.llava_config(info, base, dtype, tower_name)
    images = own.pop('preprocessor_config.json', tower['preprocessor_config.json'])
    own |= {f'{TOWER_FOLDER}/preprocessor_config.json': images, f'{TOWER_FOLDER}/config.json': tower['config.json']}
    words = {n: assets.get(f'vision/{n}') for n in CLIP_TOKENIZER_FILES}
    own |= {f'{TOWER_FOLDER}/{n}': content for n, content in words.items() if content is not None}
  return own | {'config.json': (json.dumps(config, indent=1) + '\n').encode()}
