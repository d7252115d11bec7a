"""A recorded method: its arrays, what its description says, and the models it was recorded with, found and loaded.

A record is a folder with `case.npz` (arrays), `meta.json` (settings) and, if the method has parameters of its own,
`weights.npz`. Its base models lie elsewhere: `meta.json` names them by a path from the record or by a name.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.convert.plan import assign
from dynllava_jax.convert.readers import ConversionError, Tensor, read_json
from dynllava_jax.convert.records.base import load_case
from dynllava_jax.convert.source import Request, open_source

PIXELS, IDS, QUESTION = 'pixel_values', 'input_ids', 'text_ids'
# 's0: pixel_values[0] and b1/input_ids, t: b2/input_ids of ../case.npz', the way records name prompts of their base's case.
PROMPT = re.compile(r'(\w+)\s*:\s*(?:pixel_values\[(\d+)\]\s+and\s+)?([\w./-]*input_ids)')
CASE = re.compile(r'\S+\.npz')


@dataclasses.dataclass(frozen=True)
class Base:
  """A model that a method was recorded with: description, parameters in checkpoint form (float32), its own case if it has one."""

  info: CheckpointInfo
  params: dict[str, Any]
  case: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Record:
  """One folder; `bases` is the folder below which base models are looked for if they are not where the record says."""

  folder: pathlib.Path
  bases: pathlib.Path | None
  meta: dict[str, Any]
  case: dict[str, np.ndarray]

  @property
  def method(self) -> str:
    """Name of the method that was recorded."""
    name = self.meta.get('method')
    if not isinstance(name, str):
      raise ConversionError(f'{self.folder}/meta.json: "method" is {name!r}, expected the name of a method')
    return name

  def missing(self, name: str) -> ConversionError:
    """What to raise where `meta.json` lacks a setting."""
    return ConversionError(f'{self.folder}/meta.json: {name} is missing; expected a record of a method')

  def setting(self, *keys: str) -> Any:
    """The entry of `meta.json` below these keys; ConversionError if there is none."""
    value = self.meta
    for i, key in enumerate(keys):
      if not isinstance(value, dict) or key not in value:
        raise self.missing('/'.join(keys[: i + 1]))
      value = value[key]
    return value

  def array(self, name: str) -> np.ndarray:
    """An array of `case.npz`; ConversionError if there is none."""
    if name not in self.case:
      raise ConversionError(f'{self.folder}/case.npz: array {name!r} is missing; expected a record of {self.method}')
    return self.case[name]

  def find(self, named: str) -> pathlib.Path:
    """The existing file or folder that `named` means, from the record's folder, below `bases` or beside the record.

    `named` may go on after the path with a remark. Leading parts, of the place where it was recorded, need not be there.
    """
    path = named.split(' ')[0]
    if path and (found := self.folder / path).exists():
      return found
    parts = [p for p in pathlib.PurePosixPath(path).parts if p not in ('..', '/')]
    shortest = 2 if parts[-1:] == ['checkpoint'] else 1  # every base has one
    places = [*([self.bases, self.bases / 'methods'] if self.bases else []), self.folder.parent, self.folder.parent.parent]
    for first in range(max(len(parts) - shortest, 0) + 1):
      for place in places if parts else ():
        if (found := place.joinpath(*parts[first:])).exists():
          return found
    hint = f'looked below {self.bases} too' if self.bases else 'give the folder of the base models with --bases'
    raise ConversionError(f'{self.folder}/meta.json: names {named!r}, and there is no such folder beside the record; {hint}')

  def base(self, named: str, vision: str | None = None) -> Base:
    """The model called so, a checkpoint folder or one with `checkpoint/` and `case.npz`; `vision` is another tower's folder."""
    folder = self.find(named)
    if (folder / 'checkpoint').is_dir():
      folder = folder / 'checkpoint'
    info, params = load_model(folder, self.find(vision) if vision else None)
    beside = folder.parent / 'case.npz'
    return Base(info, params, load_case(beside) if beside.exists() else {})

  def base_case(self) -> dict[str, np.ndarray]:
    """The arrays of the case that `base_model` names, by its folder or that of its checkpoint."""
    folder = self.find(self.setting('base_model'))
    return load_case((folder.parent if folder.name == 'checkpoint' else folder) / 'case.npz')

  def described_base(self) -> tuple[Base, str]:
    """The model that `base_model` describes, a name or a group with tower and prompts, and its sentence about the prompts."""
    described = self.setting('base_model')
    if not isinstance(described, dict):
      return self.base(str(described)), ''
    named = self.setting('base_model', 'language_model_and_projector')
    return self.base(named, described.get('vision_tower')), described.get('inputs', '')


def open_record(folder: pathlib.Path, bases: pathlib.Path | None) -> Record:
  """Reads a record's description and arrays; ConversionError if it is none."""
  for path in (folder, bases):
    if path is not None and not path.is_dir():
      raise ConversionError(f'{path}: no folder there')
  return Record(folder, bases, read_json(folder / 'meta.json'), load_case(folder / 'case.npz'))


def load_model(src: pathlib.Path, vision: pathlib.Path | None) -> tuple[CheckpointInfo, dict[str, Any]]:
  """A PyTorch checkpoint as parameters in checkpoint form, float32, without writing anything; for the small models of records.

  Raises:
    ConversionError: what the converter would say.
  """
  source = open_source(Request(src=src, vision=vision))
  return source.info, as_params(source.info, source.tensors)


def with_weights(
  record: Record, named: str, own: dict[str, np.ndarray], describe: Callable[[CheckpointInfo], CheckpointInfo]
) -> tuple[CheckpointInfo, dict[str, Any]]:
  """The model called `named` with a record's own weights in the place of its, or beside them.

  Args:
    record, named: as in `Record.base`.
    own: arrays by the converter's names; of the groups `model.x.` and `vision_model.` that are among them nothing else stays.
    describe: the base's description -> that of the model made so.
  """
  folder = record.find(named)
  source = open_source(Request(src=folder / 'checkpoint' if (folder / 'checkpoint').is_dir() else folder))
  group = lambda key: key.split('.')[: 1 if key.startswith('vision_model.') else 2]
  replaced = [group(key) for key in own]
  tensors = [(key, tensor) for key, tensor in source.tensors if group(key) not in replaced]
  at = str(record.folder / 'weights.npz')
  tensors += [(key, Tensor(key, x.shape, x.dtype, at, lambda x=x: x)) for key, x in own.items()]
  info = describe(source.info)
  return info, as_params(info, tensors)


def as_params(info: CheckpointInfo, tensors: list[tuple[str, Tensor]]) -> dict[str, Any]:
  """Tensors by the converter's names as parameters in checkpoint form, float32; ConversionError if they are not the model's."""
  leaves: dict[tuple[str, ...], np.ndarray] = {}
  for part in assign(info, tensors, np.dtype(np.float32)):
    leaves.setdefault(part.path, np.zeros(part.leaf.shape, np.float32))[part.index] = part.load()
  params: dict[str, Any] = {}
  for path, leaf in leaves.items():
    group = params
    for step in path[:-1]:
      group = group.setdefault(step, {})
    group[path[-1]] = jnp.asarray(leaf)
  return params


@dataclasses.dataclass(frozen=True)
class Sample:
  """A recorded prompt: `ids` int[L], -200 for the image, and its `pixels` float32[R, R, 3], None without image.

  `question`: int[Q], what is asked in CLIP's tokens, None where nothing goes by it.
  """

  ids: np.ndarray
  pixels: np.ndarray | None
  question: np.ndarray | None = None


def samples(record: Record, base: Base, described: str) -> dict[str, Sample]:
  """The prompts of a record by name: those in its own arrays, `NAME/input_ids` and `NAME/pixel_values`, and those `described`.

  Args:
    record, base: where the arrays are.
    described: the sentence of `meta.json` that says which arrays of the base's case a prompt is made of.

  Raises:
    ConversionError: an array that is named is not there.
  """
  own = {k.rpartition('/')[0]: v for k, v in record.case.items() if k.rpartition('/')[2] == IDS}
  found = {}
  case = load_case(record.find(named[0])) if (named := CASE.search(described)) else base.case
  for name, image, ids in PROMPT.findall(described):
    for key in (PIXELS, ids) if image else (ids,):
      if key not in case:
        raise ConversionError(f'{record.folder}/meta.json: prompt {name} needs array {key!r}, which the case of the base has not')
    pixels = np.asarray(case[PIXELS][int(image)]).transpose(1, 2, 0) if image else None
    found[name] = Sample(case[ids].reshape(-1), pixels)
  for name, ids in own.items():
    pixels = record.case.get(f'{name}/{PIXELS}')
    found[name] = Sample(ids.reshape(-1), None if pixels is None else pixels.reshape(pixels.shape[-3:]).transpose(1, 2, 0))
  if not found:
    raise ConversionError(f'{record.folder}/meta.json: no prompt found in {described!r}, nor arrays NAME/{IDS} in case.npz')
  return found


def groups(record: Record, prompts: Mapping[str, Sample]) -> dict[str, str]:
  """The groups of arrays that belong to a prompt, 'VARIANT/PROMPT' or 'PROMPT', each with the name of its prompt."""
  names = dict.fromkeys(key.rpartition('/')[0] for key in record.case)
  return {group: prompt for group in names if (prompt := group.rpartition('/')[2]) in prompts}
