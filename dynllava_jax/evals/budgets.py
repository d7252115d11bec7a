"""Every training-free method at a common budget of image tokens: which settings give it so many, as runs of an evaluation.

A budget is a number of image tokens, the mean over the decoder's layers as tables of such methods count it. What is published
for a budget is used where it is known; other models get the same shares. `costs.py` counts what a run really has.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from dynllava_jax import methods
from dynllava_jax.config import ConfigError, ModelConfig
from dynllava_jax.config.parsing import require

Run = dict[str, Any]  # as in a config's `runs`

PUBLISHED_PATCHES, PUBLISHED_LAYERS = 576, 32  # of LLaVA-1.5-7B, for which the settings below are published
SPARSEVLM_LAYERS = (3, 7, 16)  # in front of these; the code cuts behind 2, 6 and 15
SPARSEVLM_TOKENS = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}  # their real means are 206, 145 and 82


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What budgets are budgets of.

  Attributes:
    model: what is run.
    cut: the layer in front of which methods inside the decoder cut for the first time.
    average: whether a budget counts the layers before `cut` too. A shallow decoder may spend all of it there.
  """

  model: ModelConfig
  cut: int = 2
  average: bool = True

  @property
  def patches(self) -> int:
    return self.model.vision.num_patches

  @property
  def side(self) -> int:
    return self.model.vision.image_size // self.model.vision.patch_size

  @property
  def layers(self) -> int:
    return self.model.llama.num_layers

  def share(self, published: float, of: int = PUBLISHED_PATCHES) -> int:
    """As large a part of this model's patches as `published` is of LLaVA-1.5's, at least 1."""
    return max(1, round(published * self.patches / of))

  def left(self, budget: int) -> float:
    """Image tokens that the layers from `cut` on have on average; ConfigError if those before leave none."""
    left = (self.layers * budget - self.cut * self.patches) / (self.layers - self.cut) if self.average else float(budget)
    if left < 1:
      raise ConfigError(f'{budget} image tokens on average over {self.layers} layers: the first {self.cut} take more than that')
    return left


def reduced(name: str, **options) -> Run:
  """A dense decoder on the image tokens that a reducer makes."""
  return dict(stages=[dict(start=0)], reducer=dict(name=name, **options))


def compressed(name: str, starts: Iterable[int] = (0,), **options) -> Run:
  """A dense prefill, of which a compressor leaves less in the cache; each of the stages at `starts` has slots of its own number."""
  return dict(stages=[dict(start=start, compressor=dict(name=name, **options)) for start in starts])


def one_cut(selector: str) -> Callable[[Setting, int], Run]:
  """All tokens up to the cut, then one number of them."""
  return lambda s, budget: cuts(selector, [s.cut], [round(s.left(budget))])


def cuts(selector: str, layers: Iterable[int], tokens: Iterable[int]) -> Run:
  """All tokens, then in front of each of the layers fewer."""
  return dict(stages=[dict(start=0), *(dict(start=i, selector=selector, image_tokens=n) for i, n in zip(layers, tokens))])


def pyramid(s: Setting, budget: int) -> Run:
  """Halved twice after the first cut, at equal distances: the lists behind the published figures were not published.

  The authors' own, (8, 16, 24) with (1/2, 1/4, 1/8), has 270 of 576 tokens, and 144 before it cuts at all.
  """
  require(s.layers - s.cut >= 3, f'pyramiddrop: {s.layers - s.cut} layers behind the first cut, and it cuts in front of three')
  third = (s.layers - s.cut) / 3
  starts = [s.cut, s.cut + int(third), s.cut + int(2 * third)]
  lengths = [b - a for a, b in zip(starts, [*starts[1:], s.layers])]
  first = s.left(budget) * (s.layers - s.cut) / sum(n * 0.5**i for i, n in enumerate(lengths))
  return cuts('pyramiddrop', starts, [max(1, min(s.patches, round(first * 0.5**i))) for i in range(3)])


def sparsevlm(s: Setting, budget: int) -> Run:
  """The published list of the nearest budget, scaled; what is recycled comes on top."""
  wanted = budget / s.patches * PUBLISHED_PATCHES
  nearest = min(SPARSEVLM_TOKENS, key=lambda known: abs(known - wanted))
  starts: list[int] = []
  for layer in SPARSEVLM_LAYERS:
    starts.append(max(layer * s.layers // PUBLISHED_LAYERS, starts[-1] + 1 if starts else 1))  # rounded up, 13B's 64 would be 86
  return cuts('sparsevlm', starts, [min(s.patches, s.share(n * wanted / nearest)) for n in SPARSEVLM_TOKENS[nearest]])


def visionzip(s: Setting, budget: int) -> Run:
  """54 and 10 of 64, as published, 108 and 20, 162 and 30."""
  contextual = round(budget * 10 / 64)
  return reduced('visionzip', dominant=budget - contextual, contextual=contextual)


def vscan(s: Setting, budget: int) -> Run:
  """96 tokens, and 32 from the middle of the decoder on, for 64: published so; the same proportions for other budgets."""
  window = max((w for w in range(2, 7) if s.side % w == 0), default=s.side)  # 6 of 24
  first = round(budget * 3 / 2)
  run = cuts('pyramiddrop', [s.layers // 2], [max(1, 2 * budget - first)])
  shallow = round(5 * s.model.vision.layers_run / 23)
  return run | dict(reducer=dict(name='vscan', tokens=first, window=window, shallow=shallow))


def prumerge_plus(s: Setting, budget: int) -> Run:
  """Half of the tokens in equal steps over the picture, as in the authors' branch of fixed ratio."""
  strided = budget // 2
  stride = s.patches // strided
  numbers = dict(centres=budget - strided - 1, strided=strided, stride=stride, first=stride // 2)
  return reduced('prumerge_plus', neighbours=s.share(32), **numbers)


def dymu(s: Setting, budget: int) -> Run:
  """Evenly many merges in all blocks; where later blocks have too few tokens for that, as many as the first ones can take."""
  blocks, wanted = s.model.vision.layers_run, s.patches - budget
  for even in (True, False):
    tokens, merges = s.patches + 1, []
    for i in range(blocks):
      fair = -(-(wanted - sum(merges)) // (blocks - i)) if even else wanted - sum(merges)
      merges.append(min(fair, (tokens - 1) // 2))
      tokens -= merges[-1]
    if sum(merges) == wanted:
      break
  return reduced('dymu', merges=tuple(merges))


def pool(s: Setting, budget: int) -> Run:
  """The window whose number of squares is nearest to the budget."""
  return reduced('pool', window=min(range(1, s.side + 1), key=lambda w: abs((-(-s.side // w)) ** 2 - budget)))


def kept_keys(name: str, options: Callable[[Setting], dict] = lambda s: {}) -> Callable[[Setting, int], Run]:
  """`budget` of the image's keys in each head's cache. Half a token more, so that no rounding of the share takes one away."""
  return lambda s, budget: compressed(name, ratio=round(1 - (budget + 0.5) / s.patches, 6), **options(s))


def look_m(s: Setting, budget: int) -> Run:
  """The budget's share of the prompt, half of it by score and half recent; text stays even if that is more."""
  half = round(budget / s.patches / 2, 6)
  return compressed('look_m', hh_ratio=half, recent_ratio=half)


RECIPES: dict[str, Callable[[Setting, int], Run]] = {
  'random': one_cut('random'),
  'uniform': one_cut('uniform'),
  'pool': pool,
  'fastervlm': lambda s, budget: reduced('fastervlm', tokens=budget),
  'visionzip': visionzip,
  'vispruner': lambda s, budget: reduced('vispruner', tokens=budget),
  'divprune': lambda s, budget: reduced('divprune', tokens=budget),
  'cdpruner': lambda s, budget: reduced('cdpruner', tokens=budget),
  'dpp': lambda s, budget: reduced('dpp', tokens=budget),
  'prumerge': lambda s, budget: reduced('prumerge', centres=budget - 1, neighbours=s.share(32)),
  'prumerge_plus': prumerge_plus,
  'dymu': dymu,
  'vscan': vscan,
  'fastv': one_cut('fastv'),
  'sparsevlm': sparsevlm,
  'pyramiddrop': pyramid,
  'look_m': look_m,
  'snapkv': kept_keys('snapkv', lambda s: dict(window=16)),  # the default of 64 is longer than most questions
  'pyramidkv': kept_keys('pyramidkv', lambda s: dict(window=16, starts=[s.layers * i // 4 for i in range(4)])),
  'tova': kept_keys('tova'),
  'observed_attention': kept_keys('observed_attention'),
  'expected_attention': kept_keys('expected_attention'),
  'knorm': kept_keys('knorm'),
  'keydiff': kept_keys('keydiff'),
  'lagkv': kept_keys('lagkv', lambda s: dict(lag=max(2, s.patches * 128 // PUBLISHED_PATCHES))),
  'streaming_llm': kept_keys('streaming_llm'),
}
BY_QUESTION = ('cdpruner',)  # need CLIP's text tower
NO_BUDGET = {
  'all': 'keeps every token',
  'dpn': 'has to be trained',
  'dpn_routed': 'is how dpn is trained',
  'dynamic': 'has to be trained',
  'dynamic_context_pruning': 'has to be trained',
  'icae': 'has to be trained',
  'pmod': 'has to be trained',
  'redundancylens': 'removes no token; `rows` has it once',
  'videollm_mod': 'has to be trained',
}


def smaller_image(s: Setting, budget: int) -> Run:
  """The baseline that needs no method: a picture of about so many patches."""
  return dict(stages=[dict(start=0)], image_size=s.model.vision.patch_size * round(budget**0.5))


def registered() -> list[str]:
  """Names of all pieces of the sites that act on prompts; what generated tokens see and leave has no budget of image tokens."""
  return sorted({name for site, pieces in methods.METHODS.items() if site not in ('exit', 'gate', 'revisit') for name in pieces})


def rows(setting: Setting, budgets: Iterable[int], without: Iterable[str] = ()) -> dict[str, Run]:
  """Dense, and every registered training-free method at each budget; a run that two budgets share is there once.

  Args:
    setting: the model; budgets: in image tokens.
    without: methods that the model cannot run; those that go by the question are left out where it has no text tower.
  """
  dense = dict(stages=[dict(start=0)])
  runs = {'dense': dense | dict(method='dense', budget=setting.patches)}
  known = registered()
  without = {*without, *(() if setting.model.clip_text else BY_QUESTION)}
  chosen = {name: recipe for name, recipe in RECIPES.items() if name in known and name not in without}
  for budget in budgets:
    for name, recipe in (chosen | {'smaller_image': smaller_image}).items():
      run = recipe(setting, budget)
      if not any(run == {k: other[k] for k in other if k not in ('method', 'budget')} for other in runs.values()):
        runs[f'{name}_{budget}'] = run | dict(method=name, budget=budget)
  if 'redundancylens' not in without:
    half = list(range(setting.layers // 2, setting.layers))  # the ranking of layers is a calibration of its own
    kind = dict(name='redundancylens', attention_layers=half, ffn_layers=half, attention_range=setting.share(256))
    stages = [dict(start=0), dict(start=half[0], layers=kind)]
    runs['redundancylens'] = dict(stages=stages, method='redundancylens', budget=setting.patches)
  return runs
