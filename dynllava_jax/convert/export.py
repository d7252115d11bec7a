"""Checkpoint of this project -> a directory that PyTorch loads, tensor by tensor."""

import dataclasses
import functools
import json
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore as ts

from dynllava_jax import checkpoint
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.convert import export_configs
from dynllava_jax.convert.convert import DTYPES, with_progress
from dynllava_jax.convert.destination import TOWER_FOLDER, check_destination, new_directory
from dynllava_jax.convert.export_configs import Vocabulary
from dynllava_jax.convert.layouts import Layout, canonical, to_llava_hf
from dynllava_jax.convert.plan import Path, slots_by_key
from dynllava_jax.convert.readers import ConversionError, Tensor, directory_tensors
from dynllava_jax.convert.shards import ShardWriter, spec_bytes
from dynllava_jax.convert.source import TOWER, VOCAB_KEYS
from dynllava_jax.convert.writer import PARAMS

LAYOUTS = ('llava-hf', 'llava', 'dynamic-llava')
PREDICTORS = ('image_predictor', 'text_predictor')


@dataclasses.dataclass(frozen=True)
class Out:
  """One tensor of the export: its name there and the folder below the destination, and what gives its numbers."""

  folder: str
  key: str
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return spec_bytes((self.key, self.shape, self.dtype))


class StepReader:
  """Parameters of one step, slot by slot. What Orbax stored in one piece is read in one piece, one parameter at a time."""

  def __init__(self, step_dir: pathlib.Path):
    self.folder = step_dir / PARAMS
    self.metadata = json.loads((self.folder / '_METADATA').read_text())
    self.lock = threading.Lock()
    self.held: tuple[Path, np.ndarray] | None = None

  @functools.cache  # noqa: B019 a reader lives as long as an export
  def array(self, path: Path) -> ts.TensorStore:
    """The stored parameter."""
    name = '.'.join(path)
    if self.metadata['use_ocdbt']:
      store = {'driver': 'ocdbt', 'base': {'driver': 'file', 'path': f'{self.folder}/'}, 'path': name}
    else:
      store = {'driver': 'file', 'path': str(self.folder / name)}
    return ts.open({'driver': 'zarr3' if self.metadata['use_zarr3'] else 'zarr', 'kvstore': store}, open=True, read=True).result()

  def slot(self, path: Path, index: tuple[int, ...]) -> np.ndarray:
    """One slot, or the whole parameter if it has no slots."""
    array = self.array(path)
    if not index or array.chunk_layout.read_chunk.shape[0] == 1:
      return np.asarray(array[index].read().result())
    with self.lock:
      if self.held is None or self.held[0] != path:
        self.held = None  # the old one goes before the new one comes
        self.held = path, np.asarray(array.read().result())
      return self.held[1][index].copy()  # a view would hold all of it


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
    layout: 'llava-hf' for transformers, 'llava' or 'dynamic-llava' for the authors' code.
    vision: CLIP directory that the tower's never-run top is taken from, if the checkpoint does not hold it.
    dtype, overwrite, readback: as in `convert.convert`.
    drop_predictors: export the dense part of a Dynamic-LLaVA model.

  Raises:
    ConversionError: the layout cannot hold the model, or `dst` cannot be written.
    CheckpointError: `src` is missing or damaged.
  """
  dst = dst.resolve()
  check_destination(dst, overwrite, checkpoint.locate(src)[0], vision)
  info, assets = checkpoint.read_info(src), checkpoint.read_assets(src)
  tokenizer = checkpoint.read_tokenizer(src) or {}
  directory, step = checkpoint.locate(src)
  info = _exported_model(info, layout, drop_predictors)
  checkpoint.check_integrity(directory / str(step), 'params')
  base = export_configs.carried_config(info, layout, json.loads(assets.get('config.json', b'{}')))
  vocab = export_configs.vocabulary(info, base, tokenizer) if layout == 'llava-hf' else None
  plan = _plan(info, vocab, StepReader(directory / str(step)), DTYPES[dtype], vision)
  stored = next(str(o.dtype) for o in plan if o.folder == '')
  files = _files(info, base, vocab, stored, dst, tokenizer, assets)
  with new_directory(dst, sum(o.nbytes for o in plan)) as partial:
    writers = {
      f: ShardWriter(partial / f, [(o.key, o.shape, o.dtype) for o in plan if o.folder == f]) for f in {o.folder for o in plan}
    }

    def write(out: Out) -> None:
      value, writer = np.ascontiguousarray(out.read().astype(out.dtype, copy=False)), writers[out.folder]
      writer.write(out.key, value)
      if readback and not writer.holds(out.key):
        raise ConversionError(f'{writer.files[out.key]}: {out.key} read back is not what was written; is the disk failing?')

    with_progress('exporting', write, plan, [o.nbytes for o in plan])
    for folder, writer in writers.items():
      writer.finish()
      directory_tensors(partial / folder)  # the headers can be read, and fit
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
  if layout != 'dynamic-llava' and model.predictor is not None:
    if not drop_predictors:
      raise ConversionError(
        f'--export={layout}: the model has predictors, which have no place in that layout; export it as dynamic-llava, or leave '
        'them behind with --drop_predictors'
      )
    info = dataclasses.replace(info, model=dataclasses.replace(model, predictor=None))
  if layout == 'llava-hf' and model.projector_depth != 2:
    raise ConversionError(f'--export=llava-hf: transformers has only the projector mlp2x_gelu, the model has {model.projector}')
  return info


def _plan(
  info: CheckpointInfo, vocab: Vocabulary | None, reader: StepReader, dtype: np.dtype | None, vision: pathlib.Path | None
) -> list[Out]:
  """Every tensor of the export; `vocab` is that of llava-hf, None for the authors' layouts."""
  tail = _tail_tensors(info, vision)
  extra = vocab.rows - vocab.own if vocab else 0
  plan = []
  for key, (rule, index, leaf) in slots_by_key(dataclasses.replace(info, unused_vision_layers=True)).items():
    shape = rule.transform.torch_shape(leaf.slot_shape)
    if rule.path[0] == 'vision_tail' and not info.unused_vision_layers:
      tensor = tail[key]
      if tensor.shape != shape:
        raise ConversionError(f'{tensor.origin}: {tensor.key} has shape {tensor.shape}, the tower of the checkpoint {shape}')
      stored, read = tensor.dtype, tensor.load
    else:
      stored = np.dtype(reader.array(rule.path).dtype.numpy_dtype)
      read = lambda rule=rule, index=index: rule.transform.invert(reader.slot(rule.path, index))
    if extra and key in VOCAB_KEYS:
      shape, read = (shape[0] + extra, shape[1]), lambda read=read: _with_mean_rows(read(), extra)
    folder = TOWER_FOLDER if key.startswith(TOWER) and not vocab else ''
    plan.append(Out(folder, to_llava_hf(key) if vocab else key, shape, dtype or stored, read))
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
  wanted = [k for k, (rule, *_) in whole.items() if rule.path[0] == 'vision_tail']
  absent = [k for k in wanted if k not in named]
  if absent:
    raise ConversionError(f'{vision}: has no {absent[0]}; is it the CLIP directory the checkpoint came from?')
  return {k: named[k] for k in wanted}


def _files(
  info: CheckpointInfo,
  base: dict[str, Any],
  vocab: Vocabulary | None,
  dtype: str,
  dst: pathlib.Path,
  tokenizer: dict[str, bytes],
  assets: dict[str, bytes],
) -> dict[str, bytes]:
  """What lies beside the weights, by path below `dst`; `base` and `vocab` as in `export_configs`."""
  own = tokenizer | {n: c for n, c in assets.items() if '/' not in n and n != 'config.json'}
  generic = {
    'config.json': export_configs.clip_config(info.model.vision, dtype),
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
    config = export_configs.llava_config(info, base, dtype, str(dst / TOWER_FOLDER))
    images = own.pop('preprocessor_config.json', tower['preprocessor_config.json'])
    own |= {f'{TOWER_FOLDER}/preprocessor_config.json': images, f'{TOWER_FOLDER}/config.json': tower['config.json']}
  return own | {'config.json': (json.dumps(config, indent=1) + '\n').encode()}
