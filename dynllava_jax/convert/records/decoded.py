"""What was decoded in a record: groups of arrays, each of one prompt run in one way, with the base and prompt of each."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from dynllava_jax import methods
from dynllava_jax.config import IMAGE_ID
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import given, token_ids
from dynllava_jax.convert.records.bases import PIXELS, Base, Record, picture
from dynllava_jax.convert.records.described import GROUP, NAME, TEXT, WHOLE
from dynllava_jax.models.dynllava import DynLlava

PROJECTED = 'vision/projected'
GRADIENTS = 'grad'  # BASE/CONFIG/grad/PARAMETER of a training step
MANY = 2**31
OF_BASES = {'b1': 0, 'b1s': 1}  # prompts of a base's own case, and their images


@dataclasses.dataclass(frozen=True)
class Asked:
  """One prompt: token ids int[L], in which -200 stands for the image, and the image's tokens float[P, D], None without image.

  `group` is `Reduced.group` of this row.
  """

  ids: np.ndarray
  image: np.ndarray | None
  group: np.ndarray | None = None

  @property
  def text_tokens(self) -> int:
    return int((self.ids != IMAGE_ID).sum())


@dataclasses.dataclass(frozen=True)
class Group:
  """The arrays of one prompt run in one way, `BASE/CONFIG/PROMPT/NAME` in the record; `at` is the part before NAME."""

  base: str
  config: str
  prompt: str

  @property
  def at(self) -> str:
    return '/'.join(part for part in (self.base, self.config, self.prompt) if part) + '/'

  @property
  def setting(self) -> str:
    """The key of `configs` in `meta.json`."""
    return f'{self.base}/{self.config}'.strip('/')


def decoded_groups(record: Record, needed: bool = True) -> dict[tuple[str, str], list[Group]]:
  """The groups of a record that hold decoded tokens, by base and config, in its order; ConversionError if it has none but is to."""
  found: dict[tuple[str, str], list[Group]] = {}
  for base, config, prompt in decoded(record):
    found.setdefault((base, config), []).append(Group(base, config, prompt))
  if not found and needed:
    raise ConversionError(
      f'{record.at}: no group BASE/CONFIG/PROMPT/tokens, BASE one of base_models of meta.json; expected a record of {record.method}'
    )
  return found


def decoded(record: Record) -> list[tuple[str, str, str]]:
  """Base ('' if it is not named) and the two names of every group `BASE/ONE/OTHER/` that holds what was decoded.

  Raises:
    ConversionError: a group of other arrays lacks its tokens or their logits.
  """
  names = record.setting('base_models', kind=GROUP, default={})
  found = {}
  for key in record.case:
    base = next((name for name in names if key.startswith(f'{name}/')), '')
    parts = key.removeprefix(base).strip('/').split('/')
    if names and not base and len(parts) > 3:
      raise ConversionError(f'{record.at}: array {key!r} belongs to none of base_models of {record.described}: {", ".join(names)}')
    if len(parts) == 3 and parts[1] != GRADIENTS:
      found[base, parts[0], parts[1]] = key.rpartition('/')[0]
  for at in found.values():
    steps = record.steps(f'{at}/tokens')
    record.given(f'{at}/logits', (steps, None))
  return [*found]


def base_of(record: Record, name: str) -> Base:
  """The base model that the record calls `name`."""
  if not name and 'base_model' not in record.meta:
    raise ConversionError(f'{record.described}: base_models has no base of the recorded groups, and there is no base_model')
  return record.base(record.setting(*(('base_models', name) if name else ('base_model',)), kind=NAME))


def with_bases(record: Record, configs: Iterable[list[Group]], only: Sequence[str]) -> Iterator[tuple[Base, list[Group]]]:
  """The groups of each config with their base, which is loaded once; `only` some configs, `BASE/CONFIG`, all if empty."""
  bases: dict[str, Base] = {}
  for groups in configs:
    name = groups[0].base
    if not only or groups[0].setting in only:
      bases[name] = bases.get(name) or base_of(record, name)
      yield bases[name], groups


def asked(record: Record, base: Base, group: Group) -> Asked:
  """The prompt of a group: token ids of its own, or of the base's case under its name, and the image that `meta.json` gives to it.

  Raises:
    ConversionError: an array that is needed is not there.
  """
  vocab, places = base.info.model.llama.vocab_size, (group.at, f'{group.base}/{group.prompt}/', f'{group.prompt}/')
  own = next((at for at in places if f'{at}input_ids' in record.case), None)
  if own is None and f'{group.prompt}/input_ids' not in base.case:
    raise ConversionError(f'{record.at}: prompt {group.prompt} has no input_ids, neither here nor in the case of its base')
  at, case = (record.at, record.case) if own else (base.at, base.case)
  ids = token_ids(at, case, f'{own or group.prompt + "/"}input_ids', vocab)
  if not (ids == IMAGE_ID).any():
    return Asked(ids, None)
  return Asked(ids, image_tokens(record, base, group, own or group.at))


def image_tokens(record: Record, base: Base, group: Group, own: str) -> np.ndarray:
  """The image tokens float[P, D] of a prompt whose arrays are below `own`: recorded with its base, or made of recorded pixels.

  Raises:
    ConversionError: there is neither.
  """
  number, model = image_of(record, own, group), base.info.model
  if f'{own}{PIXELS}' not in record.case and number < len(base.case.get(PROJECTED, np.zeros(0)).reshape(-1)):
    shape = (None, methods.num_image_tokens(model), model.llama.hidden_size)
    projected = given(base.at, base.case, PROJECTED, shape)
    if number < len(projected):
      return projected[number]
  places = (
    (record.at, record.case, f'{own}{PIXELS}', 0),
    (record.at, record.case, PIXELS, number),
    (base.at, base.case, PIXELS, number),
  )
  for at, case, name, which in places:
    if name in case:
      pixels = jnp.asarray(picture(at, case, name, which, model.vision.image_size)[None])
      params = {name: base.params[name] for name in ('vision', 'projector')}
      return np.asarray(DynLlava(model).apply({'params': params}, pixels, method='encode_images')[0])
  raise ConversionError(
    f'{record.at}: prompt {group.prompt} needs image {number}: neither vision/projected in the case of its base nor '
    'pixel_values, there or here, has it'
  )


def image_of(record: Record, own: str, group: Group) -> int:
  """Which image a prompt has: its array below `own` or its entry of `margins` says so, else the sentence about the prompts."""
  if f'{own}image_index' in record.case:
    return record.number(f'{own}image_index', 0, MANY)
  if isinstance(record.setting('margins', kind=GROUP, default={}).get(group.at), dict):
    number = record.setting('margins', group.at, 'image', kind=WHOLE, default=None)
    if number is not None:
      return number
  arrays = record.setting('arrays', kind=GROUP, default={})
  described = record.setting('input', kind=TEXT, default='')
  described = described or next((text for name, text in arrays.items() if name.endswith('input_ids')), '')
  return image_number(str(described), group.prompt)


def image_number(described: str, prompt: str) -> int:
  """Which image a prompt has: 'image 0 -> b1, 1 -> b1s', 'b1 -> 0' or 'p0 and p2 use image 0, p1 image 1' says so; else the number
  that its name ends with, else 0."""
  for first, second in re.findall(r'(\w+) -> (\w+)', described):
    if first == prompt and second.isdigit():
      return int(second)
    if second == prompt and first.isdigit():
      return int(first)
  named = re.search(rf'\b{re.escape(prompt)}((?:\s|,|and|use|uses|\b[a-z]+\d+\b)*)\bimage (\d+)', described)
  if named:
    return int(named[2])
  if prompt in OF_BASES:
    return OF_BASES[prompt]
  number = re.search(r'(\d+)$', prompt)
  return int(number[1]) if number and not re.fullmatch(r'b\d+', prompt) else 0
