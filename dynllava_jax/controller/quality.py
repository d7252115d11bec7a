"""How good a setting is, where that was measured: agreement with dense or a benchmark's score, from `results.json` of `eval.py`.

A setting that was not measured itself is taken to be at least as good as a measured one that drops no less of image and of text.
Nothing is guessed: of a setting sparser than all that were measured the quality is not known.
"""

import pathlib
from collections.abc import Sequence

from dynllava_jax.config import ConfigError
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.reading import read_objects

AGREEMENT = 'token_agreement'


class Quality:
  """Measured points: (image share, text share, quality as a share of the reference's). Without any nothing is known."""

  def __init__(self, points: Sequence[tuple[float, float, float]] = (), source: str = 'not measured'):
    self.points, self.source = tuple(points), source

  def of(self, image: float, text: float) -> float | None:
    """Of a setting; dense's is 1."""
    if image == text == 1:
      return 1.0
    sparser = [quality for i, t, quality in self.points if i <= image + 1e-9 and t <= text + 1e-9]
    return max(sparser, default=None)


def read_quality(path: pathlib.Path, selector: str) -> Quality:
  """Points of all runs of an evaluation whose stages are cut by `selector`; ConfigError if it is no such file.

  Agreement with the reference's answers is taken where it was measured, the score divided by the reference's else.
  """
  try:
    result = read_objects(path)
    rows, stages = result['runs'], result['stages']
    reference = rows[result['reference']]
    points, agreed = [], all('agreement' in r for r in rows.values())
    for name, row in rows.items():
      shares = [(s['image_keep_rate'], s['text_keep_budget'], s['selector']) for s in stages[name]]
      if {s[2] for s in shares} - {'all', selector} or any(s['image_tokens'] for s in stages[name]) or result['reducer'][name]:
        continue
      value = row['agreement'][AGREEMENT] / 100 if agreed else row['score'] / reference['score']
      points.append((min(s[0] for s in shares), min(s[1] for s in shares), value))
  except (OSError, DataError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError):
    raise ConfigError(
      f'--results={path}: not what eval.py writes, or without scores; give the results.json of an evaluation'
    ) from None
  what = 'agreement with dense, token by token' if agreed else f'score on {result["benchmark"]} over that of {result["reference"]}'
  return Quality(points, f'{what}, {result["questions"]} questions ({path.name})')
