"""Checkpoints on disk.

    DIR/model.json            model, stage list and objective it was made for, conversation template, checksums
    DIR/tokenizer.model       and the other files of its tokenizer (`config.TOKENIZER_FILES`), if it has one
    DIR/assets/...            files of the PyTorch checkpoint it came from, for the way back
    DIR/500/params/...        Orbax, parameters in checkpoint form (decoder layers in one stack)
    DIR/500/optimizer/...     only in training
    DIR/500/integrity.json    size, digest (XXH3) and a sampled digest of every file of the step, and its own checksum

Its path (DIR, or DIR/500 for one step) is all that is needed to load a checkpoint. Orbax writes a step under
a temporary name and renames it, so an interrupted save leaves no step behind. Orbax itself does not notice a
flipped bit, so steps are compared with their checksums: in samples when they are loaded, whole when a run goes on from one,
is exported or inspected.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from dynllava_jax import paths, remote
from dynllava_jax.arrangement import Arrangement, best, cut_stack, lay_apart, layer_names, stack_start
from dynllava_jax.config import (
  DENSE,
  TOKENIZER_FILES,
  ConfigError,
  LoraConfig,
  ModelConfig,
  Piece,
  SparsityConfig,
  Stage,
  from_config_dict,
  to_dict,
)
from dynllava_jax.config.groups import STORED_ALONG, layered
from dynllava_jax.files import read_regular, write_atomically
from dynllava_jax.models.lora import ADAPTERS, abstract_adapters, merged
from dynllava_jax.models.matrices import MATRICES, SCALES, abstract_scales, smaller
from dynllava_jax.models.params import abstract_params
from dynllava_jax.sealing import INTEGRITY_FILE, DamagedError, check_integrity, json_digest, sealed_files
from dynllava_jax.sealing import CheckpointError as CheckpointError
from dynllava_jax.sealing import seal as seal
from dynllava_jax.sharding import shardings, unboxed
from dynllava_jax.stored import Part, Step, as_tree, by_name

FORMAT = 1
MODEL_FILE = 'model.json'
ASSETS = 'assets'
TAIL = STORED_ALONG  # only some reducers look at them
STEP_NAME = re.compile('0|[1-9][0-9]*')


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
  """What a checkpoint says about itself; `conversation` and `image_aspect` are what it was trained with (see `DataConfig`)."""

  model: ModelConfig
  stages: tuple[Stage, ...] = DENSE
  reducer: Piece | None = None
  sparsity: SparsityConfig = SparsityConfig()
  conversation: str = 'vicuna_v1'
  image_aspect: str = 'pad'
  unused_vision_layers: bool = False  # the never-run top of the CLIP tower is stored too
  lora: LoraConfig | None = None  # only adapters and what was trained whole are stored; the rest is in `base`
  base: str = ''  # DIR/STEP
  base_sha256: str = ''  # see `weights_digest`
  int8: bool = False  # the decoder's matrices are int8, with a group of their `scales`: for generation alone


def write_info(
  directory: pathlib.Path,
  info: CheckpointInfo,
  tokenizer: Mapping[str, bytes] | None = None,
  assets: Mapping[str, bytes] | None = None,
) -> None:
  """Writes `model.json` and, if given, the files of the tokenizer and the assets (by their path below `assets/`)."""
  for name, content in _named_files(tokenizer, assets).items():
    write_atomically(directory / name, content)
  write_description(directory, describe(info, tokenizer, assets))


def describe(
  info: CheckpointInfo, tokenizer: Mapping[str, bytes] | None = None, assets: Mapping[str, bytes] | None = None
) -> dict[str, Any]:
  """What `model.json` says, without its own checksum."""
  files = {n: hashlib.sha256(c).hexdigest() for n, c in sorted(_named_files(tokenizer, assets).items())}
  return {'format': FORMAT} | to_dict(info) | {'files': files}


def write_description(directory: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes `model.json` alone."""
  write_atomically(directory / MODEL_FILE, json.dumps(content | {'sha256': json_digest(content)}, indent=1).encode())


def _named_files(tokenizer: Mapping[str, bytes] | None, assets: Mapping[str, bytes] | None) -> dict[str, bytes]:
  return {f'{ASSETS}/{name}': content for name, content in (assets or {}).items()} | dict(tokenizer or {})


def locate(path: str | pathlib.Path) -> tuple[pathlib.Path, int]:
  """The checkpoint directory and step that `path` (DIR or DIR/STEP) means; the newest step of DIR.

  Raises:
    CheckpointError: there is no such checkpoint.
  """
  path = (_on_this_machine(path) if isinstance(path, str) else path).absolute()
  if path.name.isdigit() and (path.parent / MODEL_FILE).exists():
    if not path.is_dir():
      steps = ', '.join(map(str, all_steps(path.parent))) or 'none'
      raise CheckpointError(f'{path}: no such step; {path.parent} has {steps}')
    return path.parent, int(path.name)
  if not (path / MODEL_FILE).exists():
    raise CheckpointError(
      f'{path}: no checkpoint here ({MODEL_FILE} is missing); expected a directory written by '
      'train.py (WORKDIR/checkpoints) or convert_weights.py'
    )
  steps = all_steps(path)
  if not steps:
    raise CheckpointError(f'{path}: holds no finished step yet; train first, or convert again')
  return path, steps[-1]


@functools.cache  # one run reads one step, also when a newer one comes meanwhile
def _on_this_machine(text: str) -> pathlib.Path:
  """DIR or DIR/STEP; of an object store the copy of that step, or of the newest, with what belongs to all steps."""
  path = paths.given(text, 'checkpoint')
  if not paths.is_local(path) and path.name.isdigit() and (path.parent / MODEL_FILE).exists():
    step = int(path.name)
    return remote.fetched(path.parent, lambda names: remote.of_step(names, step)) / path.name
  return remote.fetched(path)


def all_steps(directory: pathlib.Path) -> list[int]:
  """Finished steps, ascending."""
  return sorted(int(p.name) for p in directory.iterdir() if STEP_NAME.fullmatch(p.name)) if directory.is_dir() else []


def read_info(path: str | pathlib.Path) -> CheckpointInfo:
  """Reads `model.json` of a checkpoint given as DIR or DIR/STEP.

  Raises:
    CheckpointError: no checkpoint there, or a description that is damaged or of another format.
  """
  directory = locate(path)[0]
  content = read_description(directory)
  del content['files'], content['format']
  try:
    return from_config_dict(CheckpointInfo, content, 'config')
  except ConfigError as e:
    raise CheckpointError(f'{directory / MODEL_FILE}: unreadable ({e}); write the checkpoint again') from e


def read_description(directory: pathlib.Path) -> dict[str, Any]:
  """The content of `model.json`, see `describe`; CheckpointError if it is missing, damaged or of another format."""
  file = directory / MODEL_FILE
  try:
    content = json.loads(read_regular(file))
    found = content['format']
    stated = content.pop('sha256', None)
  except (OSError, ValueError, RecursionError, KeyError, TypeError) as e:
    raise CheckpointError(f'{file}: unreadable ({e}); write the checkpoint again') from e
  if found != FORMAT:
    raise CheckpointError(f'{file}: checkpoint format {found}, this version reads {FORMAT}')
  if stated not in (None, json_digest(content)):
    raise CheckpointError(
      f'{file}: does not match its own checksum; it is damaged (copy or write it again) or was edited (then remove its "sha256")'
    )
  return {'files': {}} | content


def weights_digest(path: str | pathlib.Path) -> str:
  """One SHA-256 for all parameters of DIR or DIR/STEP, from its list of checksums."""
  directory, step = locate(path)
  files = sealed_files(directory / str(step) / INTEGRITY_FILE)
  return json_digest({name: about.digest for name, about in files.items() if name.split('/')[0] == 'params'})


def read_tokenizer(path: str | pathlib.Path) -> dict[str, bytes] | None:
  """The files of the tokenizer stored with a checkpoint, for `data.tokenizer.load_tokenizer`; None if it has none."""
  directory = locate(path)[0]
  listed = read_description(directory)['files']
  return {name: _read_file(directory, name) for name in TOKENIZER_FILES if name in listed or (directory / name).exists()} or None


def read_assets(path: str | pathlib.Path) -> dict[str, bytes]:
  """Files of the PyTorch checkpoint that this one came from, by their path below `assets/`."""
  directory = locate(path)[0]
  names = (n for n in read_description(directory)['files'] if n.startswith(f'{ASSETS}/'))
  return {n.removeprefix(f'{ASSETS}/'): _read_file(directory, n) for n in names}


def _read_file(directory: pathlib.Path, name: str) -> bytes:
  stated = read_description(directory)['files'].get(name)
  try:
    content = read_regular(directory / name)
  except OSError as e:
    raise CheckpointError(f'{directory / name}: cannot be read ({e.strerror})') from None
  if stated not in (None, hashlib.sha256(content).hexdigest()):
    raise CheckpointError(f'{directory / name}: damaged, its checksum is not the one in {MODEL_FILE}; copy it again')
  return content


def stored_params(path: str | pathlib.Path) -> dict[str, Any]:
  """Shape and dtype of every stored parameter of DIR or DIR/STEP by its name (`llama/layers/q`); nothing is loaded."""
  directory, step = locate(path)
  step_dir = directory / str(step)
  try:
    return by_name(ocp.checkpointables_metadata(step_dir).metadata['params'])
  except (OSError, KeyError, ValueError) as e:
    raise CheckpointError(f'{step_dir}: not a readable checkpoint step ({e})') from e


def load_params(
  path: str | pathlib.Path,
  mesh: Mesh | None = None,
  *,
  stages: tuple[Stage, ...] | None = None,
  tail: bool = False,
  checked: bool = False,
  int8: bool = False,
) -> dict[str, Any]:
  """Parameters in the dtype they are stored in, in checkpoint form, or cut while they are read for the stages of a run.

  Adapters are merged into the base that they belong to. Of every file the size is compared and, unless it is small, only some
  places of its content; `check_integrity` reads all.

  Args:
    path: DIR or DIR/STEP.
    mesh: where to put them (see `sharding.shardings`); the first device if None.
    stages: what `Generator` will run: the form that `models.params.cut_params` makes, arranged as is `arrangement.best` where
      they are put, without ever holding a layer twice, and without the top of the vision tower and CLIP's text tower.
    tail: with these all the same, for a reducer that looks at them (`methods.needs_tail`).
    checked: `check_integrity` has just read the step.
    int8: the decoder's matrices as int8 with their scales, one after the other, so that no more than one is there in full. What is
      stored so comes so.

  Raises:
    CheckpointError: missing, damaged, its arrays are not those that its `model.json` describes, int8 in checkpoint form,
      or to be int8 with layers of experts.
  """
  if stages is None and read_info(path).int8:
    raise CheckpointError(f'{path}: its weights are rounded to int8, for generation alone; take the checkpoint that it was made of')
  if int8 and read_info(path).model.llama.experts:
    raise CheckpointError(f'{path}: has layers of experts, which are not rounded to int8; load it without int8')
  params = _load_merged(path, mesh, stages, checked, int8)
  if stages is not None and tail:
    params |= _load_tail(path, mesh)
  if stages is not None and best(_devices(mesh)).apart:
    params |= {name: lay_apart(params[name]) for name in ('llama', SCALES) if name in params}
  return params


def _load_tail(path: str | pathlib.Path, mesh: Mesh | None) -> dict[str, Any]:
  info = read_info(path)
  while info.lora is not None:
    path = info.base
    info = read_info(path)
  boxed = abstract_params(info.model, with_tail=info.unused_vision_layers)
  return _read(path, {name: boxed[name] for name in TAIL if name in boxed}, mesh, None)


def _devices(mesh: Mesh | None) -> list[jax.Device]:
  return list(mesh.devices.flat) if mesh else jax.local_devices()[:1]


def _load_merged(
  path: str | pathlib.Path, mesh: Mesh | None, stages: tuple[Stage, ...] | None, checked: bool, int8: bool
) -> dict[str, Any]:
  """As `load_params`; layers that lie apart are stacks of one layer each."""
  info = read_info(path)
  if info.lora is None:
    boxed = abstract_params(info.model, with_tail=info.unused_vision_layers)
    boxed |= {SCALES: abstract_scales(info.model.llama)} if info.int8 else {}
    return _load(path, boxed, mesh, stages, checked, int8 and not info.int8)
  check_base(info, path)
  params = _load_merged(info.base, mesh, stages, False, False) | load_adapted(path, mesh, stages=stages, checked=checked)
  adapters = params.pop(ADAPTERS)
  params |= {'llama': merged(params['llama'], adapters, info.lora.scale)}
  return params | dict(zip(('llama', SCALES), smaller(params['llama']))) if int8 else params


def load_base(path: str | pathlib.Path, mesh: Mesh | None = None) -> dict[str, Any]:
  """The parameters that the adapters in a checkpoint belong to; CheckpointError if they are not there, or are others."""
  info = read_info(path)
  check_base(info, path)
  return load_params(info.base, mesh)


def check_base(info: CheckpointInfo, path: str | pathlib.Path) -> None:
  """Raises CheckpointError unless the weights that the adapters in `path` belong to are where they were."""
  try:
    found = weights_digest(info.base)
  except CheckpointError as e:
    raise CheckpointError(f'{path}: holds adapters of {info.base}, which cannot be read: {e}') from None
  if found != info.base_sha256:
    raise CheckpointError(
      f'{path}: holds adapters of {info.base}, but other weights are there now (checksum {found[:12]}, expected '
      f'{info.base_sha256[:12]}); put back those it was trained on'
    )


def groups(path: str | pathlib.Path) -> set[str]:
  """Names of the parameter groups of DIR or DIR/STEP, those of its base included."""
  info = read_info(path)
  return {name.split('/')[0] for name in stored_params(path)} - {ADAPTERS} | (groups(info.base) if info.lora else set())


def load_adapted(
  path: str | pathlib.Path, mesh: Mesh | None = None, *, stages: tuple[Stage, ...] | None = None, checked: bool = False
) -> dict[str, Any]:
  """What a checkpoint with adapters stores itself, as `load_params` gives it: `adapters` and the groups that were trained whole."""
  info = read_info(path)
  boxed = abstract_params(info.model) | {ADAPTERS: abstract_adapters(info.model.llama, info.lora)}
  own = {name.split('/')[0] for name in stored_params(path)}
  return _load(path, {name: group for name, group in boxed.items() if name in own | {ADAPTERS}}, mesh, stages, checked)


def _load(
  path: str | pathlib.Path,
  boxed: dict[str, Any],
  mesh: Mesh | None,
  stages: tuple[Stage, ...] | None,
  checked: bool,
  int8: bool = False,
) -> dict[str, Any]:
  """The parameters whose shapes and axis names are `boxed`, and no others."""
  directory, step = locate(path)
  wanted = by_name(unboxed(boxed))
  step_dir = directory / str(step)
  if not checked:
    check_integrity(step_dir, 'params', sampled=True)
  stored = stored_params(path)
  differences = [f'- {k}: missing' for k in wanted.keys() - stored.keys()]
  differences += [f'+ {k}: not part of the model' for k in stored.keys() - wanted.keys()]
  differences += [
    f'! {k}: stored {tuple(stored[k].shape)}, expected {wanted[k].shape}'
    for k in wanted.keys() & stored.keys()
    if tuple(stored[k].shape) != wanted[k].shape
  ]
  for k in wanted.keys() & stored.keys():
    whole = SCALES in boxed and k.startswith('llama/layers/') and k.split('/')[-1] in MATRICES
    if stored[k].dtype != 'int8' if whole else not jnp.issubdtype(stored[k].dtype, jnp.floating):
      differences.append(f'! {k}: stored as {stored[k].dtype}, expected {"int8" if whole else "floating-point numbers"}')
  if differences:
    raise CheckpointError(f'{step_dir}: its arrays do not match {directory / MODEL_FILE}:\n  ' + '\n  '.join(sorted(differences)))
  return _read(path, boxed, mesh, stages, int8)


def _read(
  path: str | pathlib.Path, boxed: dict[str, Any], mesh: Mesh | None, stages: tuple[Stage, ...] | None, int8: bool = False
) -> dict[str, Any]:
  """Parameters that are known to be stored, cut for `stages`."""
  directory, step = locate(path)
  step_dir, wanted = directory / str(step), by_name(unboxed(boxed))
  place = SingleDeviceSharding(jax.local_devices()[0])
  places = by_name(shardings(boxed, mesh)) if mesh else dict.fromkeys(wanted, place)
  found: dict[str, Any] = {}
  try:
    step = Step(step_dir)
    for names in [[name] for name in wanted] if int8 else [list(wanted)]:
      parts = {
        target: Part(name.replace('/', '.'), start, stop, places[name])
        for name in names
        for target, start, stop in _cut(name, wanted[name].shape, stages, best(_devices(mesh)))
      }
      read = as_tree(dict(zip(parts, step.read(list(parts.values())))))
      if int8 and 'llama' in read:
        read = dict(zip(('llama', SCALES), smaller(read['llama'])))
      found |= by_name(read)
  except (OSError, ValueError) as e:
    raise DamagedError(f'{step_dir}: cannot be read ({" ".join(str(e).split())}); copy or write it again') from e
  return as_tree(found)


def _cut(
  name: str, shape: tuple[int, ...], stages: tuple[Stage, ...] | None, arrangement: Arrangement
) -> list[tuple[str, int, int | None]]:
  """Which parameters of a run are made of a stored one: (name, first row, row after the last) of each."""
  group, _, rest = name.partition('/')
  if stages is None:
    return [(name, 0, None)]
  if group in TAIL:
    return []  # never run
  stack, _, leaf = rest.partition('/')
  first = stack_start(stack)
  if group not in ('llama', ADAPTERS, SCALES, *layered()) or first is None:
    return [(name, 0, None)]
  starts = [s.start for s in stages]
  if arrangement.apart and group not in layered():
    names = layer_names(starts, first + shape[0])[first:]
    return [(f'{group}/{layer}/{leaf}', n, n + 1) for n, layer in zip(range(shape[0]), names)]
  return [(f'{group}/{part}/{leaf}', a, b) for part, a, b in cut_stack(first, shape[0], starts)]
