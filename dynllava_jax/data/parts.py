"""A preparation that several machines share: which pieces of the work are this one's."""

import dataclasses
import re

from dynllava_jax.config import ConfigError

MOST = 4096


@dataclasses.dataclass(frozen=True)
class Part:
  """Part `number` (from 1 on) of `count`: of what is numbered, every `count`-th."""

  number: int = 1
  count: int = 1

  def __str__(self) -> str:
    return f'{self.number}/{self.count}'

  def has(self, index: int) -> bool:
    """Whether piece `index` (from 0 on) is this part's."""
    return index % self.count == self.number - 1


WHOLE = Part()


def read(text: str) -> Part:
  """What `--part` gives; ConfigError unless it is written like 3/16."""
  found = re.fullmatch(r'([0-9]{1,4})/([0-9]{1,4})', text)
  if not found or not 1 <= int(found[1]) <= int(found[2]) <= MOST:
    raise ConfigError(f'--part: {text!r}, expected a number and how many parts there are, such as 3/16, at most {MOST}')
  return Part(int(found[1]), int(found[2]))
