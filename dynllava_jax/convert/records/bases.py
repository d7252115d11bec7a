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
from dynllava_jax.config import IMAGE_ID
from dynllava_jax.convert.plan import assign
from dynllava_jax.convert.readers import ConversionError, Tensor, read_json
from dynllava_jax.convert.records.base import given, in_range, load_case, token_ids
from dynllava_jax.convert.records.described import ANY, GROUP, NAME, TEXT, WHOLES, Kind, check_entries, entries, read
from dynllava_jax.convert.source import Request, open_source

PIXELS, IDS, QUESTION = 'pixel_values', 'input_ids', 'text_ids'
# 's0: pixel_values[0] and b1/input_ids, t: b2/input_ids of ../case.npz', the way records name prompts of their base's case.
PROMPT = re.compile(r'(\w+)\s*:\s*(?:pixel_values\[(\d+)\]\s+and\s+)?([\w./-]*input_ids)')
MISSING = dataclasses.MISSING  # for no default
CASE = re.compile(r'\S+\.npz')


@dataclasses.dataclass(frozen=True)
class Base:
  """A model that a method was recorded with: description, parameters in checkpoint form (float32), its own case if it has one."""

  info: CheckpointInfo
  params: dict[str, Any]
  case: dict[str, np.ndarray]
  folder: pathlib.Path = pathlib.Path()

  @property
  def at(self) -> pathlib.Path:
    """The file of its case."""
    return self.folder / 'case.npz'


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
    return self.setting('method', kind=NAME)

  @property
  def at(self) -> pathlib.Path:
    """The file of its arrays, and `described` the one that describes them."""
    return self.folder / 'case.npz'

  @property
  def described(self) -> pathlib.Path:
    return self.folder / 'meta.json'

  def setting(self, *keys: str, kind: Kind = ANY, default: Any = MISSING) -> Any:
    """The entry of `meta.json` below these keys, a list as a tuple.

    Args:
      keys: from the outermost on.
      kind: what it is to be.
      default: what stands for an entry that is not there.

    Raises:
      ConversionError: there is none and no default, or it is of another kind.
    """
    value = self.meta
    for i, key in enumerate(keys):
      read(self.described, '/'.join(keys[:i]), value, GROUP)
      if key not in value:
        if default is not MISSING:
          return default
        raise ConversionError(f'{self.described}: {"/".join(keys[: i + 1])} is missing; expected a record of a method')
      value = value[key]
    return read(self.described, '/'.join(keys), value, kind)

  def pairs(self, keys: tuple[str, ...], *lists: tuple[str, Kind]) -> list[tuple]:
    """The entries of two lists of `meta.json` below `keys`, side by side; ConversionError unless both are equally long."""
    (one, first), (other, second) = ((name, self.setting(*keys, name, kind=kind)) for name, kind in lists)
    if len(first) != len(second):
      at = '/'.join(keys)
      raise ConversionError(f'{self.described}: {at}: {one} has {len(first)} entries and {other} {len(second)}, expected as many')
    return list(zip(first, second))

  def array(self, name: str) -> np.ndarray:
    """An array of `case.npz` that something is compared with; ConversionError if there is none."""
    if name not in self.case:
      raise ConversionError(f'{self.at}: array {name!r} is missing; expected a record of {self.method}')
    return self.case[name]

  def given(self, name: str, shape: tuple[int | None, ...], whole: bool = False) -> np.ndarray:
    """An array of `case.npz` that something is computed from, see `base.given`."""
    return given(self.at, self.case, name, shape, whole)

  def number(self, name: str, low: int, high: int, default: int = 0) -> int:
    """The whole number from `low` to below `high` that an array of one entry holds; `default` if there is no such array."""
    if name not in self.case:
      return default
    shape = () if self.case[name].ndim == 0 else (1,) * self.case[name].ndim
    return int(in_range(self.at, name, self.given(name, shape, whole=True), low, high).reshape(()))

  def steps(self, name: str, *shape: int) -> int:
    """How many generated tokens were recorded as `name`, int[*shape, T]."""
    return self.given(name, (*shape, None), whole=True).shape[-1]

  def find(self, named: str) -> pathlib.Path:
    """The existing file or folder that `named` means, from the record's folder, below `bases` or beside the record.

    `named` may go on after the path with a remark. Leading parts, of the place where it was recorded, need not be there.
    """
    for path in dict.fromkeys((named, named.split(' ')[0])):
      try:
        found = self._existing(path)
      except (OSError, ValueError) as e:  # no file can have such a name
        raise ConversionError(f'{self.described}: names {named[:80]!r}: {getattr(e, "strerror", e)}') from None
      if found is not None:
        return found
    hint = f'looked below {self.bases} too' if self.bases else 'give the folder of the base models with --bases'
    where = next(('/'.join(keys) + ' ' for keys, value in entries(self.meta) if value == named), '')
    raise ConversionError(f'{self.described}: {where}names {named!r}, and there is no such folder beside the record; {hint}')

  def _existing(self, path: str) -> pathlib.Path | None:
    if path and (found := self.folder / path).exists():
      return found
    parts = [p for p in pathlib.PurePosixPath(path).parts if p not in ('..', '/')]
    shortest = 2 if parts[-1:] == ['checkpoint'] else 1  # every base has one
    places = [*([self.bases, self.bases / 'methods'] if self.bases else []), self.folder.parent, self.folder.parent.parent]
    tried = (place.joinpath(*parts[i:]) for i in range(max(len(parts) - shortest, 0) + 1) for place in places if parts)
    return next((found for found in tried if found.exists()), None)

  def base(self, named: str, vision: str | None = None) -> Base:
    """The model called so, a checkpoint folder or one with `checkpoint/` and `case.npz`; `vision` is another tower's folder."""
    folder = self.find(named)
    if (folder / 'checkpoint').is_dir():
      folder = folder / 'checkpoint'
    info, params = load_model(folder, self.find(vision) if vision else None)
    beside = folder.parent / 'case.npz'
    return Base(info, params, load_case(beside) if beside.exists() else {}, folder.parent)

  def base_case(self) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """The case that `base_model` names, by its folder or that of its checkpoint: the file and its arrays."""
    folder = self.find(self.setting('base_model', kind=NAME))
    at = (folder.parent if folder.name == 'checkpoint' else folder) / 'case.npz'
    return at, load_case(at)

  def described_base(self) -> tuple[Base, str]:
    """The model that `base_model` describes, a name or a group with tower and prompts, and its sentence about the prompts."""
    if isinstance(self.meta.get('base_model'), str):
      return self.base(self.setting('base_model', kind=NAME)), ''
    told = lambda name, **kind: self.setting('base_model', name, **kind)
    tower = told('vision_tower', kind=NAME, default=None)
    return self.base(told('language_model_and_projector', kind=NAME), tower), told('inputs', kind=TEXT, default='')


def open_record(folder: pathlib.Path, bases: pathlib.Path | None) -> Record:
  """Reads a record's description and arrays; ConversionError if it is none."""
  for path in (folder, bases):
    if path is not None and not path.is_dir():
      raise ConversionError(f'{path}: no folder there')
  record = Record(folder, bases, read_json(folder / 'meta.json'), load_case(folder / 'case.npz'))
  check_entries(record.described, record.meta)
  for name in record.setting('shapes', kind=GROUP, default={}):
    shape = record.setting('shapes', name, kind=WHOLES)
    if (found := record.array(name).shape) != shape:
      raise ConversionError(f'{record.at}: array {name!r} has shape {found}, and {record.described} says {shape}')
  return record


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
  vocab, size = base.info.model.llama.vocab_size, base.info.model.vision.image_size
  at, case = base.at, base.case
  if named := CASE.search(described):
    at = record.find(named[0])
    case = load_case(at)
  found = {}
  for name, image, ids in PROMPT.findall(described):
    pixels = picture(at, case, PIXELS, int(image), size) if image else None
    found[name] = Sample(token_ids(at, case, ids, vocab), pixels)
  for name in (k.rpartition('/')[0] for k in record.case if k.rpartition('/')[2] == IDS):
    own = f'{name}/{PIXELS}'
    pixels = picture(record.at, record.case, own, 0, size) if own in record.case else None
    found[name] = Sample(token_ids(record.at, record.case, f'{name}/{IDS}', vocab), pixels)
  for name, sample in found.items():
    if (sample.pixels is None) != (IMAGE_ID not in sample.ids):
      raise ConversionError(f'{record.described}: prompt {name} has {IMAGE_ID} for an image and no pixels, or the other way round')
  if not found:
    raise ConversionError(
      f'{record.described}: base_model/inputs names no prompt ({described!r}), and case.npz has no arrays NAME/{IDS}'
    )
  return found


def picture(at: pathlib.Path, case: Mapping[str, np.ndarray], name: str, number: int, size: int) -> np.ndarray:
  """Image `number` of pixels [N, 3, R, R], or the only one of [3, R, R]: float32[R, R, 3]; ConversionError if not there."""
  more = (None,) * (case[name].ndim == 4) if name in case else ()
  images = given(at, case, name, (*more, 3, size, size)).reshape(-1, 3, size, size)
  if number >= len(images):
    raise ConversionError(f'{at}: array {name!r} has {len(images)} images, and number {number} is asked for')
  return images[number].transpose(1, 2, 0)


def groups(record: Record, prompts: Mapping[str, Sample]) -> dict[str, str]:
  """The groups of arrays that belong to a prompt, 'VARIANT/PROMPT' or 'PROMPT', each with the name of its prompt."""
  names = dict.fromkeys(key.rpartition('/')[0] for key in record.case)
  return {group: prompt for group in names if (prompt := group.rpartition('/')[2]) in prompts}
