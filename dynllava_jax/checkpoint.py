"""Checkpoints on disk.

    DIR/model.json         model, stage list and objective it was made for, conversation template
    DIR/tokenizer.model    and the other files of its tokenizer (`config.TOKENIZER_FILES`), if it has one
    DIR/500/params/...     Orbax, parameters in checkpoint form (decoder layers in one stack)
    DIR/500/optimizer/...  only in training

Its path (DIR, or DIR/500 for one step) is all that is needed to load a checkpoint. Orbax writes a step under
a temporary name and renames it, so an interrupted save leaves no step behind.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from dynllava_jax.config import DENSE, TOKENIZER_FILES, ConfigError, ModelConfig, SparsityConfig, Stage, from_config_dict, to_dict
from dynllava_jax.files import write_atomically
from dynllava_jax.models.dynllava import abstract_params
from dynllava_jax.sharding import shardings, unboxed

FORMAT = 1
MODEL_FILE = 'model.json'


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be read or written; the message names the path and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
  """What a checkpoint says about itself."""

  model: ModelConfig
  stages: tuple[Stage, ...] = DENSE
  sparsity: SparsityConfig = SparsityConfig()
  conversation: str = 'vicuna_v1'
  unused_vision_layers: bool = False  # the never-run top of the CLIP tower is stored too


def write_info(directory: pathlib.Path, info: CheckpointInfo, tokenizer: Mapping[str, bytes] | None = None) -> None:
  """Writes `model.json` and, if given, the tokenizer's files."""
  for name, content in (tokenizer or {}).items():
    write_atomically(directory / name, content)
  text = json.dumps({'format': FORMAT} | to_dict(info), indent=1)
  write_atomically(directory / MODEL_FILE, text.encode())


def locate(path: str | pathlib.Path) -> tuple[pathlib.Path, int]:
  """The checkpoint directory and step that `path` (DIR or DIR/STEP) means; the newest step of DIR.

  Raises:
    CheckpointError: there is no such checkpoint.
  """
  path = pathlib.Path(path).absolute()
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


def all_steps(directory: pathlib.Path) -> list[int]:
  """Finished steps, ascending."""
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit()) if directory.is_dir() else []


def read_info(path: str | pathlib.Path) -> CheckpointInfo:
  """Reads `model.json` of a checkpoint given as DIR or DIR/STEP."""
  file = locate(path)[0] / MODEL_FILE
  try:
    content = json.loads(file.read_text())
    found = content.pop('format')
    if found != FORMAT:
      raise CheckpointError(f'{file}: checkpoint format {found}, this version reads {FORMAT}')
    return from_config_dict(CheckpointInfo, content, 'config')
  except (json.JSONDecodeError, KeyError, ConfigError) as e:
    raise CheckpointError(f'{file}: unreadable ({e}); write the checkpoint again') from e


def read_tokenizer(path: str | pathlib.Path) -> dict[str, bytes] | None:
  """The files of the tokenizer stored with a checkpoint, for `data.tokenizer.load_tokenizer`; None if it has none."""
  folder = locate(path)[0]
  return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()} or None


def load_params(path: str | pathlib.Path, mesh: Mesh | None = None) -> dict[str, Any]:
  """Parameters in checkpoint form, in the dtype they are stored in.

  Args:
    path: DIR or DIR/STEP.
    mesh: where to put them (see `sharding.shardings`); the first device if None.

  Raises:
    CheckpointError: missing, or its arrays are not those that its `model.json` describes.
  """
  directory, step = locate(path)
  info = read_info(path)
  boxed = abstract_params(info.model, with_tail=info.unused_vision_layers)
  place = shardings(boxed, mesh) if mesh else SingleDeviceSharding(jax.local_devices()[0])
  wanted = _by_path(unboxed(boxed))
  step_dir = directory / str(step)
  try:
    stored = _by_path(ocp.checkpointables_metadata(step_dir).metadata['params'])
  except (OSError, KeyError, ValueError) as e:
    raise CheckpointError(f'{step_dir}: not a readable checkpoint step ({e})') from e
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


def save_params(directory: pathlib.Path, step: int, params: dict[str, Any]) -> None:
  """Writes one step that holds parameters only (checkpoint form, jax arrays)."""
  ocp.save_checkpointables(directory / str(step), {'params': params})


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _by_path(tree: Any) -> dict[str, Any]:
  return {_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}
