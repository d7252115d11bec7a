"""Putting a PyTorch model together: from one directory, or from base, adapter, projector and tower."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np

from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import (
  CLIP_TOKENIZER_FILES,
  MODEL_FILES,
  TOKENIZER_FILES,
  ConfigError,
  ModelConfig,
  PredictorConfig,
  SparsityConfig,
  VisionConfig,
)
from dynllava_jax.convert.beside import check_tokenizer
from dynllava_jax.convert.configs import (
  LLAVA_TOWER,
  PUBLISHED_TOWERS,
  clip_text_config,
  dynamic_stages,
  model_info,
  select_layer,
  text_config,
  vision_config,
)
from dynllava_jax.convert.export_configs import PACKER, TOWER_TRAINED, UNPADDED, has_vocabulary
from dynllava_jax.convert.inputs import ConversionError, nested, read_json, read_small
from dynllava_jax.convert.layouts import CLIP_TEXT, Layout, detect
from dynllava_jax.convert.parts import NEW, PROJECTOR, PROJECTOR_FILE, Request, base_directory, named, on_base, projector_tensors
from dynllava_jax.convert.plan import check_sizes
from dynllava_jax.convert.readers import (
  WEIGHTS,
  Tensor,
  directory_tensors,
  has_weights,
)
from dynllava_jax.convert.tables import clip_text_rules, predictor_rules, projector_rules
from dynllava_jax.models.groups import init_groups
from dynllava_jax.models.params import init_projector

TOWER_CARRIED = ('config.json', 'preprocessor_config.json')
TOWER = 'vision_model.'
PREDICTORS = ('image_predictor', 'text_predictor')
EMBEDDING, HEAD = VOCAB_KEYS = ('model.embed_tokens.weight', 'lm_head.weight')


@dataclasses.dataclass(frozen=True)
class Source:
  """A model ready to be converted; nothing is loaded.

  Attributes:
    layout: what was found, for people.
    tensors: (the converter's name, tensor).
    tokenizer, assets: files that travel with the weights.
    notes: what was left out or made up, for people.
  """

  layout: str
  info: CheckpointInfo
  tensors: list[tuple[str, Tensor]]
  tokenizer: dict[str, bytes]
  assets: dict[str, bytes]
  notes: list[str]


def open_source(request: Request) -> Source:
  """Recognises `request.src` and collects everything that belongs to the model.

  Raises:
    ConversionError: what is missing, not understood or not supported.
  """
  layout, config = detect(request.src)
  kind = layout.value
  file = request.src / 'config.json'
  notes: list[str] = []
  if layout is Layout.CLIP:
    raise ConversionError(f'{request.src}: a CLIP tower alone; give it with --vision, and the language model with --src')
  partial = layout is Layout.LORA or (not has_weights(request.src) and (request.src / PROJECTOR_FILE).exists())
  if request.base and not partial:
    raise ConversionError(f'{request.src}: a whole model, which needs no --base; leave it out')
  if partial:
    found, layout, config, file = on_base(request, layout, config, notes)
    directories = [base_directory(request), request.src]
  else:
    found = named(layout, directory_tensors(request.src, notes), notes)
    directories = [request.src]
  if request.projector:
    found, config = _with_projector(request, found, config, notes)
  if layout is Layout.LLAMA and not (request.vision and request.projector):
    raise ConversionError(
      f'{request.src}: a text-only LLaMA, not a LLaVA (no projector, no vision tower). To start LLaVA training from it, '
      f'give --vision=CLIP_DIRECTORY and --projector={PROJECTOR_FILE} (or --projector={NEW} for a random one)'
    )
  inside = sum(k.startswith(TOWER) for k, _ in found)
  vision, tower_dir = _tower(request, file, layout, config, bool(inside))
  vision = select_layer(file, layout, config, vision)
  if inside and config.get(TOWER_TRAINED):
    notes.append(f'took the tower inside the checkpoint, which was trained with it ({TOWER_TRAINED})')
  elif tower_dir is not None:
    if inside:
      notes.append(f'passed over {inside} tensors of the tower inside the checkpoint; {tower_dir} was read instead')
    found = [(k, t) for k, t in found if not k.startswith(TOWER)] + named(Layout.CLIP, directory_tensors(tower_dir, notes), notes)
  info = model_info(file, layout, config, vision)
  info, found = _with_text_tower(info, tower_dir, found, notes)
  if UNPADDED in config:
    rows, own = text_config(file, layout, config)['vocab_size'], info.model.llama.vocab_size
    found = [(k, _first_rows(t, rows, own, file) if k in VOCAB_KEYS else t) for k, t in found]
    notes.append(f'left out the rows of the vocabulary from {own} on, which an export added')
  names = {k for k, _ in found}
  if info.model.llama.tie_embeddings:
    found = _without_tied_head(found, file, notes)
  elif HEAD not in names and EMBEDDING in names:
    raise ConversionError(
      f'{dict(found)[EMBEDDING].origin}: holds no {HEAD}, but {file} does not say that the head is the embedding; if it is, set '
      'tie_word_embeddings to true there'
    )
  if info.model.predictor is not None and info.model.predictor.instruct:
    notes.append('the instruction predictor drops prompt text, as the config says (option instruct of the dynamic stage)')
  if request.add_predictors or request.projector == NEW:
    check_sizes(info, found)
    _check_widths(info.model, found)
  if request.projector == NEW:
    params = init_projector(info.model, jax.random.key(request.seed))
    fresh = _fresh(params, projector_rules(info.model), _dtype(found), request.seed)
    found += fresh
    notes.append(f'added {len(fresh)} tensors of an untrained projector (seed {request.seed})')
  if request.add_predictors:
    info, fresh = _add_predictors(request, info, found)
    found += fresh
    notes.append(f'added {len(fresh)} tensors of untrained predictors (seed {request.seed})')
  tokenizer, whose, assets = _carried(directories, tower_dir, info.model.clip_text is not None)
  check_tokenizer(tokenizer, whose, file, text_config(file, layout, config)['vocab_size'])
  name = kind + (f', merged into {base_directory(request)}' if partial else '')
  return Source(name, info, found, tokenizer, assets, notes)


def _with_text_tower(
  info: CheckpointInfo, tower_dir: pathlib.Path | None, found: list[tuple[str, Tensor]], notes: list[str]
) -> tuple[CheckpointInfo, list[tuple[str, Tensor]]]:
  """Takes CLIP's text tower along if all of it is there; else leaves out what is there of it."""
  text = {k for k, _ in found if k.startswith(CLIP_TEXT)}
  if not text:
    return info, found
  file = tower_dir / 'config.json'
  config = read_json(file)
  if 'text_config' in config:
    tower = clip_text_config(file, config)
    if {key for rule in clip_text_rules(tower.num_layers) for key, _ in rule.keys(tower.num_layers)} <= text:
      notes.append(f"took CLIP's text tower along, {len(text)} tensors; only reducers that go by the question look at it")
      return dataclasses.replace(info, model=dataclasses.replace(info.model, clip_text=tower)), found
  notes.append(f"passed over {len(text)} tensors of CLIP's text tower, which is not whole")
  return info, [(k, t) for k, t in found if k not in text]


def _check_widths(model: ModelConfig, found: list[tuple[str, Tensor]]) -> None:
  """ConversionError if a config's widths are not those of the tensors, before anything of that size is made."""
  tensors = dict(found)
  for key, width in {'model.norm.weight': model.llama.hidden_size, f'{TOWER}pre_layrnorm.weight': model.vision.hidden_size}.items():
    if key in tensors and (tensor := tensors[key]).shape != (width,):
      raise ConversionError(f'{tensor.origin}: {tensor.key} has shape {tensor.shape}, the config asks for {(width,)}')


def _first_rows(tensor: Tensor, rows: int, count: int, file: pathlib.Path) -> Tensor:
  """The first `count` of a tensor's rows; ConversionError unless it has as many `rows` as the config says."""
  if tensor.shape[:1] != (rows,):
    raise ConversionError(f'{tensor.origin}: {tensor.key} has shape {tensor.shape}, but vocab_size in {file} is {rows}')
  return dataclasses.replace(tensor, shape=(count, *tensor.shape[1:]), read=lambda: tensor.load()[:count])


def _without_tied_head(found: list[tuple[str, Tensor]], file: pathlib.Path, notes: list[str]) -> list[tuple[str, Tensor]]:
  """Leaves out a head that is stored although it is tied to the embedding; ConversionError if the two differ."""
  tensors = dict(found)
  if HEAD in tensors and EMBEDDING not in tensors:  # transformers ties the two either way round
    notes.append(f'took {tensors[HEAD].key} as the embedding, to which it is tied')
    return [(EMBEDDING if k == HEAD else k, t) for k, t in found]
  if HEAD not in tensors:
    return found
  if not np.array_equal(tensors[HEAD].load(), tensors[EMBEDDING].load()):
    raise ConversionError(
      f'{tensors[HEAD].origin}: {tensors[HEAD].key} differs from the embedding, but {file} says that the two are one '
      '(tie_word_embeddings); if the head is its own, set that to false'
    )
  notes.append(f'passed over {tensors[HEAD].key}, which is tied to the embedding and equal to it')
  return [(k, t) for k, t in found if k != HEAD]


def _with_projector(
  request: Request, found: list[tuple[str, Tensor]], config: dict[str, Any], notes: list[str]
) -> tuple[list[tuple[str, Tensor]], dict[str, Any]]:
  """Puts in the projector of `--projector` in place of any that is there; a new one follows when its sizes are known."""
  rest = [(k, t) for k, t in found if not k.startswith(PROJECTOR)]
  if request.projector == NEW:
    kind = config.get('mm_projector_type', 'mlp2x_gelu')
    if request.vision is None:
      raise ConversionError(f'--projector={NEW} needs --vision, whose width it starts from')
    return rest, config | {'mm_projector_type': kind}
  path = pathlib.Path(request.projector)
  trained = projector_tensors(path)
  depth = sum(k.endswith('.weight') for k in trained)
  kind = 'linear' if f'{PROJECTOR}weight' in trained else f'mlp{depth}x_gelu'
  if f'{PROJECTOR}q_proj_1.weight' in trained:  # its scale is in no tensor
    kind, beside = 'tokenpacker', path.parent / 'config.json'
    told = read_json(beside) if beside.exists() else {}
    config = config | {key: told[key] for key in PACKER if key in told}
    if 'scale_factor' not in config:
      raise ConversionError(f'{path}: a TokenPacker, whose scale_factor neither {request.src}/config.json nor {beside} says')
  notes.append(f'took {len(trained)} tensors from {path}')
  return [*rest, *trained.items()], config | {'mm_projector_type': kind}


def _tower(
  request: Request, file: pathlib.Path, layout: Layout, config: dict[str, Any], inside: bool
) -> tuple[VisionConfig, pathlib.Path | None]:
  """(tower, its directory; None if the weights are only `inside` the checkpoint)."""
  if request.vision is not None:
    return _tower_config(request.vision), request.vision
  if layout is Layout.LLAVA_HF:  # transformers' LlavaConfig without a tower has ViT-L/14-336, an empty one CLIP's own default
    told = nested(file, config, 'vision_config') if config.get('vision_config') is not None else LLAVA_TOWER
    return vision_config(file, {'vision_config': told}), None
  named = config.get('mm_vision_tower') or config.get('vision_tower')
  if not named:
    raise ConversionError(f'{file}: names no vision tower (mm_vision_tower); give the CLIP directory with --vision')
  if not isinstance(named, str):
    raise ConversionError(f'{file}: mm_vision_tower is {named!r}, expected the name of a directory')
  for path in (request.src / 'clip', request.src / named, pathlib.Path(named)):  # first its own: an export may have been moved
    if (path / 'config.json').exists():
      if not inside and not has_weights(path):
        raise ConversionError(f'{path}: no weights found in this CLIP directory ({WEIGHTS[0]}); copy them there, or give --vision')
      return _tower_config(path), path if has_weights(path) else None
  if named in PUBLISHED_TOWERS and inside:
    return PUBLISHED_TOWERS[named], None
  raise ConversionError(
    f'{file}: the vision tower {named} is no CLIP directory here, neither below {request.src} nor below the current directory; '
    'fetch it and give its directory with --vision'
  )


def _tower_config(directory: pathlib.Path) -> VisionConfig:
  file = directory / 'config.json'
  if not file.exists():
    raise ConversionError(f'{directory}: no CLIP vision tower here (config.json is missing); give its directory with --vision')
  return vision_config(file, read_json(file))


def _dtype(found: list[tuple[str, Tensor]]) -> np.dtype:
  """The dtype of the decoder, which new weights take on."""
  return next((t.dtype for k, t in found if k == 'model.norm.weight'), np.dtype(np.float32))


def _add_predictors(request: Request, info: CheckpointInfo, found: list[tuple[str, Tensor]]):
  if info.model.predictor is not None:
    raise ConversionError(f'{request.src}: has predictors already; leave out --add_predictors')
  sparsity = SparsityConfig()
  model = dataclasses.replace(info.model, predictor=PredictorConfig())
  try:
    stages = dynamic_stages(model, 2, sparsity.image_keep_rate)
  except ConfigError as e:
    raise ConversionError(f'{request.src}: no predictors can be added: {e}') from None
  params = init_groups(model, PREDICTORS, jax.random.key(request.seed))
  fresh = _fresh(params, predictor_rules(), _dtype(found), request.seed)
  return dataclasses.replace(info, model=model, stages=stages, sparsity=sparsity), fresh


def _fresh(params: dict[str, Any], rules, dtype: np.dtype, seed: int) -> list[tuple[str, Tensor]]:
  """Random parameters as if they were tensors of a checkpoint."""
  fresh = []
  for rule in rules:
    leaf = params
    for name in rule.path:
      leaf = leaf[name]
    for key, index in rule.keys(len(leaf)):
      value = np.ascontiguousarray(rule.transform.invert(np.asarray(leaf[index])).astype(dtype))
      fresh.append((key, Tensor(key, value.shape, value.dtype, f'random (seed {seed})', lambda value=value: value)))
  return fresh


def _carried(
  directories: list[pathlib.Path], tower: pathlib.Path | None, with_text: bool
) -> tuple[dict[str, bytes], pathlib.Path, dict[str, bytes]]:
  """(the files of the last tokenizer, where they lie, other files to carry along); later directories win."""
  tokenizer, whose, assets = {}, directories[0], {}
  for directory in directories:
    assets |= _read_present(directory, MODEL_FILES)
    own = _read_present(directory, TOKENIZER_FILES)
    if has_vocabulary(own) or not tokenizer:  # not files of two tokenizers
      tokenizer, whose = own, directory
  if tower is not None:
    assets |= {f'vision/{n}': content for n, content in _read_present(tower, TOWER_CARRIED).items()}
    if with_text:  # and what questions are cut into words by
      assets |= {f'vision/{n}': content for n, content in _read_present(tower, CLIP_TOKENIZER_FILES).items()}
  return tokenizer, whose, assets


def _read_present(directory: pathlib.Path, names: tuple[str, ...]) -> dict[str, bytes]:
  there = [n for n in names if os.path.lexists(directory / n)]
  for name in there:
    if name in MODEL_FILES and name.endswith('.json'):
      read_json(directory / name)  # it is carried as it is, but not if it is damaged
  return {n: read_small(directory / n) for n in there}
