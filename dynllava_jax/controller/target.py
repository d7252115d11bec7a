"""What a setting has to reach, from words: `memory=16GiB,batch=64,context=4096` to numbers."""

import dataclasses
import re

from dynllava_jax.config import ConfigError
from dynllava_jax.config.parsing import require

UNITS = {
  'memory': {'': 1, 'KiB': 2**10, 'MiB': 2**20, 'GiB': 2**30, 'kB': 1e3, 'MB': 1e6, 'GB': 1e9},
  'latency': {'': 1, 's': 1, 'ms': 1e-3, 'min': 60},
  'energy': {'': 1, 'J': 1, 'kJ': 1e3, 'Wh': 3600},
  'share': {'': 1, '%': 0.01},
}
PART = re.compile(r'\s*([a-z/]+)\s*(<=|>=|=)\s*([^,]+?)\s*')
NUMBER = re.compile(r'([0-9.]+(?:e[+-]?\d+)?)\s*([A-Za-z%]*)')


@dataclasses.dataclass(frozen=True)
class Key:
  """A word of a target. `unit`: of `UNITS`; `compare`: what its number is, at most, at least or given; `says`: for people."""

  field: str
  unit: str
  compare: str
  says: str


KEYS = {
  'memory': Key('memory', 'memory', '<=', 'bytes of a device, weights included'),
  'latency': Key('latency', 'latency', '<=', 'seconds from a prompt to the end of its answer'),
  'tokens/s': Key('tokens_per_second', '', '>=', 'generated tokens of all requests'),
  'energy': Key('energy', 'energy', '<=', 'joules per answer'),
  'flops': Key('flops', 'share', '<=', "share of dense's FLOPs"),
  'quality': Key('quality', 'share', '>=', 'share of tokens that agree with dense, or of its score'),
  'batch': Key('batch', '', '=', 'requests that are answered at once'),
  'context': Key('context', '', '=', 'positions of a request: text, image and answer'),
  'new': Key('new', '', '=', 'tokens of an answer'),
  'mode': Key('mode', '', '=', 'cached or uncached'),
  'device': Key('device', '', '=', 'such as v5e, or v5e-8 for eight of them'),
}
LIMITS = ('memory', 'latency', 'tokens_per_second', 'energy', 'flops', 'quality')
WHOLE = ('batch', 'context', 'new')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """Limits are None where nothing is asked; `batch` 0 is for the search to choose. Fields as in `KEYS`."""

  memory: float | None = None
  latency: float | None = None
  tokens_per_second: float | None = None
  energy: float | None = None
  flops: float | None = None
  quality: float | None = None
  batch: int = 0
  context: int = 0
  new: int = 256
  mode: str = 'cached'
  device: str = ''

  def __post_init__(self):
    require(self.mode in ('cached', 'uncached'), f'--target: mode is {self.mode!r}, expected cached or uncached')
    require(self.new > 1, f'--target: new is {self.new}, expected 2 tokens or more')

  @property
  def limits(self) -> dict[str, float]:
    """What is asked, by field."""
    return {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}


def read_target(text: str) -> Target:
  """`KEY=VALUE,KEY=VALUE`, with units where a key has them, `>=` and `<=` as they are meant; ConfigError, one line, else."""
  values: dict[str, float | int | str] = {}
  for part in text.split(','):
    match = PART.fullmatch(part)
    if not match or match[1] not in KEYS:
      raise ConfigError(f'--target: {part.strip()!r}, expected KEY=VALUE with one of {", ".join(KEYS)}')
    name, sign, value = match.groups()
    key = KEYS[name]
    require(sign in ('=', key.compare), f'--target: {part.strip()!r}, write {name}{key.compare}{value}')
    require(key.field not in values, f'--target: {name} is there twice')
    values[key.field] = value if name in ('mode', 'device') else _number(name, key, value)
  return Target(**values)


def _number(name: str, key: Key, value: str) -> float | int:
  match = NUMBER.fullmatch(value)
  units = UNITS.get(key.unit, {'': 1})
  try:
    number = float(match[1]) * units[match[2]]
  except (TypeError, ValueError, KeyError):
    known = ', '.join(u for u in units if u)
    raise ConfigError(f'--target: {name}={value}, expected a number{f" with {known}" if known else ""}') from None
  require(number > 0, f'--target: {name}={value}, expected a positive number')
  require(key.field not in WHOLE or number == int(number), f'--target: {name}={value}, expected a whole number')
  return int(number) if key.field in WHOLE else number
