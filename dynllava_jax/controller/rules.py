"""The rules by which sparsity is set, with all their numbers: the one place to read them, and to change them.

They are those of the description that this project implements; it gives directions and no numbers, so the numbers are ours:
* prefill favours image tokens, decoding favours text: work that is mostly prefill drops more of the image and less of the text;
* with a KV cache text is dropped more, as each kept token is read again at every step; without one less;
* scarce memory or processor raises the shares that are dropped, plenty lowers them, down to none.
"""

import dataclasses
from typing import Any

from dynllava_jax.config import from_config_dict
from dynllava_jax.config.parsing import require

PREFILL, DECODE = 'prefill', 'decode'  # what most of the work is
OVERRIDE = 'expected NAME=NUMBER, such as decode_image=0.8'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """All numbers of the controller.

  Attributes:
    prefill_image, decode_image: share of the image tokens that is dropped when resources are as scarce as can be, by what most of
      the work is.
    prefill_text, decode_text: share of the generated text that the cache has no room for, likewise.
    prefill_text_uncached, decode_text_uncached: the same without a KV cache.
    decode_share: work is mostly decoding if so large a part of its time is.
    levels: scarcity of the ladder's rungs, from plenty (0) to as scarce as can be (1).
    queue_high, queue_full: so many waiting requests want at least the second rung, the last one.
    memory_high, memory_full: so full a memory wants at least the second rung, the last one.
    step_seconds: a measured decoding step above it wants the next rung; 0 does not look at it.
    margin: a less sparse rung must hold so many times what is there before the ladder goes back to it, and
      memory_margin: so much below its marks memory must be.
    calm_seconds: for so long.
  """

  prefill_image: float = 0.9
  decode_image: float = 0.8
  prefill_text: float = 0.25
  decode_text: float = 0.5
  prefill_text_uncached: float = 0.0
  decode_text_uncached: float = 0.25
  decode_share: float = 0.5
  levels: tuple[float, ...] = (0.0, 0.5, 1.0)
  queue_high: int = 8
  queue_full: int = 32
  memory_high: float = 0.85
  memory_full: float = 0.95
  step_seconds: float = 0.0
  margin: float = 1.5
  memory_margin: float = 0.05
  calm_seconds: float = 5.0

  def __post_init__(self):
    for name in ('prefill_image', 'decode_image', 'prefill_text', 'decode_text', 'prefill_text_uncached', 'decode_text_uncached'):
      require(
        0 <= getattr(self, name) < 1, f'rules.{name} is {getattr(self, name)}, expected a share that is dropped, from 0 to below 1'
      )
    levels = self.levels
    require(
      levels and levels[0] == 0 and list(levels) == sorted(set(levels)) and levels[-1] <= 1,
      f'rules.levels are {levels}, expected increasing numbers from 0 to at most 1',
    )
    require(0 < self.queue_high <= self.queue_full, 'rules.queue_full: expected at least queue_high, and both above 0')
    require(0 < self.memory_high <= self.memory_full, 'rules.memory_full: expected at least memory_high, and both above 0')
    require(self.margin >= 1, f'rules.margin is {self.margin}, expected at least 1')
    for name in ('calm_seconds', 'memory_margin', 'step_seconds', 'decode_share'):
      require(getattr(self, name) >= 0, f'rules.{name} is {getattr(self, name)}, expected 0 or more')

  def kept(self, phase: str, cached: bool, scarcity: float) -> tuple[float, float]:
    """Shares of the image tokens and of the generated text that are kept.

    Args:
      phase: `PREFILL` or `DECODE`, what most of the work is.
      cached: whether there is a KV cache.
      scarcity: of memory or processor, from 0 to 1.
    """
    image, text = getattr(self, f'{phase}_image'), getattr(self, f'{phase}_text{"" if cached else "_uncached"}')
    return round(1 - scarcity * image, 4), round(1 - scarcity * text, 4)


def phase_of(prefill_seconds: float, decode_seconds: float, rules: Rules) -> str:
  """What most of the work is."""
  return DECODE if decode_seconds >= rules.decode_share * (prefill_seconds + decode_seconds) else PREFILL


def read_rules(text: str) -> Rules:
  """The defaults with what `NAME=NUMBER,NAME=NUMBER` changes, levels as `0:0.5:1`; ConfigError for what is no such change."""
  values: dict[str, Any] = {}
  for part in filter(None, text.split(',')):
    name, _, value = (p.strip() for p in part.partition('='))
    try:
      numbers = [float(v) for v in value.split(':')]
    except ValueError:
      require(False, f'--rules: {part!r}, {OVERRIDE}')
    values[name] = numbers if name == 'levels' else int(numbers[0]) if name.startswith('queue') else numbers[0]
  return from_config_dict(Rules, values, '--rules')
