"""Checkpoints on disk.

    DIR/model.json            model, stage list and objective it was made for, conversation template, checksums
    DIR/tokenizer.model       and the other files of its tokenizer (`config.TOKENIZER_FILES`), if it has one
    DIR/assets/...            files of the PyTorch checkpoint it came from, for the way back
    DIR/500/params/...        Orbax, parameters in checkpoint form (decoder layers in one stack)
    DIR/500/optimizer/...     only in training
    DIR/500/integrity.json    size and SHA-256 of every file of the step, and its own checksum

Its path (DIR, or DIR/500 for one step) is all that is needed to load a checkpoint. Orbax writes a step under
a temporary name and renames it, so an interrupted save leaves no step behind. Orbax itself does not notice a
flipped bit, so what is loaded is first compared with the checksums.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from dynllava_jax import paths, remote
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
from dynllava_jax.files import write_atomically
from dynllava_jax.models.lora import ADAPTERS, abstract_adapters, merged
from dynllava_jax.models.params import abstract_params
from dynllava_jax.sharding import shardings, unboxed

FORMAT = 1
MODEL_FILE = 'model.json'
INTEGRITY_FILE = 'integrity.json'
ASSETS = 'assets'
STEP_NAME = re.compile('0|[1-9][0-9]*')


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be read or written; the message names the path and what to do."""


class DamagedError(CheckpointError):
  """A step whose files are not the ones it was sealed with."""


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


def json_digest(content: dict[str, Any]) -> str:
  """SHA-256 of plain values, whatever their order."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
    content = json.loads(file.read_text())
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
  files = _sealed_files(directory / str(step) / INTEGRITY_FILE)
  return json_digest({name: digest for name, (_, digest) in files.items() if name.split('/')[0] == 'params'})


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
    content = (directory / name).read_bytes()
  except OSError as e:
    raise CheckpointError(f'{directory / name}: cannot be read ({e.strerror})') from None
  if stated not in (None, hashlib.sha256(content).hexdigest()):
    raise CheckpointError(f'{directory / name}: damaged, its checksum is not the one in {MODEL_FILE}; copy it again')
  return content


def seal(step_dir: pathlib.Path, known: dict[str, str] | None = None) -> None:
  """Writes `integrity.json` of a step whose arrays are all on disk.

  Args:
    step_dir: DIR/STEP, or its temporary directory.
    known: SHA-256 of files (paths below `step_dir`) that need not be read for it.
  """
  known = known or {}
  files = [p for part in step_dir.iterdir() if part.is_dir() for p in sorted(part.rglob('*')) if p.is_file()]
  names = [p.relative_to(step_dir).as_posix() for p in files]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    digests = pool.map(lambda n: known.get(n) or file_sha256(step_dir / n), names)
    table = {n: {'size': p.stat().st_size, 'sha256': d} for n, p, d in zip(names, files, digests)}
  content = {'files': table}
  write_atomically(step_dir / INTEGRITY_FILE, json.dumps(content | {'sha256': json_digest(content)}, indent=0).encode())


def file_sha256(path: pathlib.Path) -> str:
  """Hex digest of a file's content."""
  with path.open('rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def check_integrity(step_dir: pathlib.Path, part: str | None = None, *, contents: bool = True) -> None:
  """Compares the files of a step with its checksums.

  With several processes each checks its share.

  Args:
    step_dir: DIR/STEP.
    part: folder below it, 'params' or 'optimizer'; all if None.
    contents: read the files; otherwise only their sizes are compared.

  Raises:
    CheckpointError: names every file that is missing, truncated, changed or not listed.
  """
  file = step_dir / INTEGRITY_FILE
  stated = {n: v for n, v in _sealed_files(file).items() if part in (None, n.split('/')[0])}
  if not stated:
    raise DamagedError(f'{file}: damaged, it lists no file of {part or "the step"}; copy the checkpoint again')
  parts = [step_dir / part] if part else [p for p in step_dir.iterdir() if p.is_dir()]
  present = {p.relative_to(step_dir).as_posix() for folder in parts for p in folder.rglob('*') if p.is_file()}
  strange = sorted(present - stated.keys())

  def problem(item) -> str | None:
    name, (size, digest) = item
    path = step_dir / name
    if not path.exists():
      return f'{path}: missing'
    if path.stat().st_size != size:
      return f'{path}: {path.stat().st_size} bytes, expected {size}'
    return f'{path}: damaged, its checksum is not the one it was written with' if contents and file_sha256(path) != digest else None

  share = sorted(stated.items())[jax.process_index() :: jax.process_count()]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    problems = [p for p in pool.map(problem, share) if p]
  problems += [f'{step_dir / n}: not listed in {INTEGRITY_FILE}' for n in strange]
  if jax.process_count() > 1 and multihost_utils.process_allgather(np.asarray(len(problems))).any() and not problems:
    problems = ['a file that another host has checked']  # all must come to the same end
  if problems:
    raise DamagedError(f'{step_dir}: damaged; copy or write it again:\n  ' + '\n  '.join(problems))


def _sealed_files(file: pathlib.Path) -> dict[str, tuple[int, str]]:
  """(size, SHA-256) of every file that an `integrity.json` lists."""
  try:
    content = json.loads(file.read_text())
    stated = content.pop('sha256', None)
    files = {n: (v['size'], v['sha256']) for n, v in content['files'].items()}
  except FileNotFoundError:
    raise DamagedError(f'{file}: missing, the step is damaged or incomplete; copy or write it again') from None
  except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
    raise DamagedError(f'{file}: damaged ({e}); copy the checkpoint again') from e
  if stated not in (None, json_digest(content)):
    raise DamagedError(f'{file}: damaged, it does not match its own checksum; copy the checkpoint again')
  return files


def stored_params(path: str | pathlib.Path) -> dict[str, Any]:
  """Shape and dtype of every stored parameter of DIR or DIR/STEP by its name (`llama/layers/q`); nothing is loaded."""
  directory, step = locate(path)
  step_dir = directory / str(step)
  try:
    return _by_path(ocp.checkpointables_metadata(step_dir).metadata['params'])
  except (OSError, KeyError, ValueError) as e:
    raise CheckpointError(f'{step_dir}: not a readable checkpoint step ({e})') from e


def load_params(path: str | pathlib.Path, mesh: Mesh | None = None, *, checked: bool = False) -> dict[str, Any]:
  """Parameters in checkpoint form, in the dtype they are stored in; adapters are merged into the base that they belong to.

  Args:
    path: DIR or DIR/STEP.
    mesh: where to put them (see `sharding.shardings`); the first device if None.
    checked: `check_integrity` has just read the step.

  Raises:
    CheckpointError: missing, damaged, or its arrays are not those that its `model.json` describes.
  """
  info = read_info(path)
  if info.lora is None:
    return _load(path, abstract_params(info.model, with_tail=info.unused_vision_layers), mesh, checked)
  params = load_base(path, mesh) | load_adapted(path, mesh, checked=checked)
  adapters = params.pop(ADAPTERS)
  return params | {'llama': merged(params['llama'], adapters, info.lora.scale)}


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


def load_adapted(path: str | pathlib.Path, mesh: Mesh | None = None, *, checked: bool = False) -> dict[str, Any]:
  """What a checkpoint with adapters stores itself, in checkpoint form: `adapters` and the groups that were trained whole."""
  info = read_info(path)
  boxed = abstract_params(info.model) | {ADAPTERS: abstract_adapters(info.model.llama, info.lora)}
  own = {name.split('/')[0] for name in stored_params(path)}
  return _load(path, {name: group for name, group in boxed.items() if name in own | {ADAPTERS}}, mesh, checked)


def _load(path: str | pathlib.Path, boxed: dict[str, Any], mesh: Mesh | None, checked: bool) -> dict[str, Any]:
  """The parameters whose shapes and axis names are `boxed`, and no others."""
  directory, step = locate(path)
  place = shardings(boxed, mesh) if mesh else SingleDeviceSharding(jax.local_devices()[0])
  wanted = _by_path(unboxed(boxed))
  step_dir = directory / str(step)
  if not checked:
    check_integrity(step_dir, 'params')
  stored = stored_params(path)
  differences = [f'- {k}: missing' for k in wanted.keys() - stored.keys()]
  differences += [f'+ {k}: not part of the model' for k in stored.keys() - wanted.keys()]
  differences += [
    f'! {k}: stored {tuple(stored[k].shape)}, expected {wanted[k].shape}'
    for k in wanted.keys() & stored.keys()
    if tuple(stored[k].shape) != wanted[k].shape
  ]
  if differences:
    raise CheckpointError(f'{step_dir}: its arrays do not match {directory / MODEL_FILE}:\n  ' + '\n  '.join(sorted(differences)))
  places = place if mesh else jax.tree.map(lambda _: place, unboxed(boxed))
  target = jax.tree_util.tree_map_with_path(
    lambda p, leaf, where: jax.ShapeDtypeStruct(leaf.shape, stored[_name(p)].dtype, sharding=where), unboxed(boxed), places
  )
  return ocp.load_checkpointables(step_dir, {'params': target})['params']


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _by_path(tree: Any) -> dict[str, Any]:
  return {_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}
