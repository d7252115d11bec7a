"""Which settings reach a target: all combinations of image keep rate, text budget, batch and mode, each costed by `estimate`.

Of those that reach it the one is chosen that drops least: the one whose shares the rules would give at the least scarcity, so that
image and text are weighed as the rules weigh them for this work; among equals, the most tokens per second.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from dynllava_jax import methods
from dynllava_jax.config import ConfigError
from dynllava_jax.controller.estimate import CACHED, Costs, Estimate, Setting, Work
from dynllava_jax.controller.quality import Quality
from dynllava_jax.controller.rules import Rules, phase_of
from dynllava_jax.controller.rungs import Stages, cut
from dynllava_jax.controller.target import KEYS, Target

IMAGE = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05)
TEXT = (1.0, 0.75, 0.5, 0.4, 0.25)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RUNNERS_UP = 4
SIGN = {key.field: -1 if key.compare == '>=' else 1 for key in KEYS.values()}  # -1: more is better


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A setting, what it costs, how scarce resources would have to be for the rules to give it, and its quality, if that is known."""

  setting: Setting
  estimate: Estimate
  scarcity: float
  quality: float | None

  def value(self, field: str) -> float | None:
    """What a limit of a target is compared with."""
    return self.quality if field == 'quality' else getattr(self.estimate, field)

  def reaches(self, field: str, limit: float) -> bool:
    """Whether it is within a limit; what is not known is not."""
    value = self.value(field)
    return value is not None and SIGN[field] * value <= SIGN[field] * limit


@dataclasses.dataclass(frozen=True)
class Found:
  """All candidates, those that reach the target from best to worst, and the Pareto front of memory, throughput and scarcity."""

  candidates: Sequence[Candidate]
  reaching: Sequence[Candidate]
  front: Sequence[Candidate]
  phase: str


def work_of(target: Target, num_image: int) -> Work:
  """Text and answer of a request; ConfigError if its context has no room for them."""
  context = target.context or num_image + 64 + target.new
  text = context - num_image - target.new
  if text < 1:
    raise ConfigError(
      f'--target: context={context} has no room for a question besides {num_image} image tokens and an answer of {target.new}; '
      'raise context, or lower new'
    )
  return Work(text, target.new)


def search(costs: Costs, own: Stages, target: Target, rules: Rules, quality: Quality) -> Found:
  """Costs all settings. `own`: the checkpoint's stage list, which says where and by what is cut."""
  batches = (target.batch,) if target.batch else BATCHES
  cached = target.mode == CACHED
  dense = Setting(1.0, 1.0, batches[0], target.mode, cut(own, 1.0, 1.0, costs.model))
  before = costs.of(dense)
  phase = phase_of(before.prefill, before.latency - before.prefill, rules)
  text_shares = TEXT if any(s.selector == 'dynamic' for s in own) else (1.0,)
  candidates = []
  for image, text in itertools.product(IMAGE, text_shares):
    stages = cut(own, image, text, costs.model)
    if min(s.kept_image_tokens(methods.num_image_tokens(costs.model, costs.reducer)) for s in stages) < 1:
      continue
    scarcity = scarcity_of(image, text, rules, phase, cached)
    for batch in batches:
      setting = Setting(image, text, batch, target.mode, stages)
      candidates.append(Candidate(setting, costs.of(setting), scarcity, quality.of(image, text)))
  reaching = [c for c in candidates if all(c.reaches(field, limit) for field, limit in target.limits.items())]
  reaching.sort(key=lambda c: (c.scarcity, -c.estimate.tokens_per_second))
  return Found(candidates, reaching, pareto(candidates), phase)


def scarcity_of(image: float, text: float, rules: Rules, phase: str, cached: bool) -> float:
  """The least scarcity at which the rules drop as much of both; above 1 for more than they ever drop."""
  most_image, most_text = rules.kept(phase, cached, 1.0)
  share = lambda dropped, most: dropped / most if most else float('inf') if dropped else 0.0
  return max(share(1 - image, 1 - most_image), share(1 - text, 1 - most_text))


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
  """Those that no other beats or equals in memory, tokens per second and scarcity."""
  point = lambda c: (c.estimate.memory, -c.estimate.tokens_per_second, c.scarcity)
  points = {c: point(c) for c in candidates}
  beaten = lambda a: any(b != a and all(x <= y for x, y in zip(b, a)) for b in points.values())
  return sorted((c for c in candidates if not beaten(points[c])), key=lambda c: points[c])


def missed(found: Found, target: Target) -> list[str]:
  """Why nothing reaches the target, and what would: for each limit, the best that is possible within the others."""
  lines, limits = [], target.limits
  for field, limit in limits.items():
    others: Callable[[Candidate], bool] = lambda c, f=field: all(c.reaches(k, v) for k, v in limits.items() if k != f)
    within = [c for c in found.candidates if others(c) and c.value(field) is not None]
    name = next(k for k, key in KEYS.items() if key.field == field)
    if field == 'quality' and all(c.quality is None for c in found.candidates if c.scarcity):
      lines.append('quality: not measured of any sparse setting; give the results.json of an evaluation, or measure it here')
      continue
    if not within:
      lines.append(f'{name}: no setting is within all the other limits')
      continue
    best = min(within, key=lambda c: SIGN[field] * c.value(field))
    if not best.reaches(field, limit):
      value, sign = shown(field, best.value(field)), '<=' if SIGN[field] > 0 else '>='
      asked = f'{name}{sign}{shown(field, limit)}'
      lines.append(f'{asked}: within the other limits the best is {value}, of {described(best)}; {name}={value} would do')
  return lines


def described(candidate: Candidate) -> str:
  """A setting in words."""
  s = candidate.setting
  return f'image {s.image:.0%}, text {s.text:.0%}, batch {s.batch}, {s.mode}'


def shown(field: str, value: float | None) -> str:
  """A value with its unit, as a target would write it."""
  if value is None:
    return '-'
  if field == 'memory':
    return f'{value / 2**30:.2f}GiB' if value >= 2**30 else f'{value / 2**20:.1f}MiB'
  units = {'latency': 's', 'energy': 'J'}
  return f'{value:.3g}{units.get(field, "")}' if value < 1000 else f'{value:.0f}{units.get(field, "")}'
