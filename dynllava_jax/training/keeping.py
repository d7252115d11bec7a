"""Which saved steps of a run stay: the newest ones, multiples of a number, and those that an evaluation finds best."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from dynllava_jax.config import TrainConfig

SCORE = 'score'  # the figure of an evaluation that steps are compared by


def score_name(evaluation: str) -> str:
  """What `metrics.jsonl` calls the score of an evaluation."""
  return f'eval/{evaluation}/{SCORE}'


@dataclasses.dataclass
class Keeping:
  """The policy, and the scores that it knows by now.

  Attributes:
    last: so many of the newest steps stay.
    every: multiples of it stay; 0 for none.
    best: so many of the best stay.
    by: name of their score in the metrics.
    smaller: whether smaller scores are better.
    scores: by step.
  """

  last: int = 1
  every: int = 0
  best: int = 0
  by: str = ''
  smaller: bool = False
  scores: dict[int, float] = dataclasses.field(default_factory=dict)

  @classmethod
  def of_run(cls, cfg: TrainConfig, lines: Iterable[Mapping[str, float]] = ()) -> 'Keeping':
    """A run's policy, with the scores in the lines of its metrics."""
    by = cfg.best_by
    out = cls(cfg.keep, cfg.keep_every, cfg.keep_best, score_name(by) if by else '', bool(by) and cfg.evals[by].smaller_is_better)
    for line in lines:
      out.note(int(line['step']), line)
    return out

  def note(self, step: int, figures: Mapping[str, float]) -> None:
    """Remembers the score of a step, if it is among the figures."""
    if self.by in figures:
      self.scores[step] = figures[self.by]

  def kept(self, steps: Iterable[int]) -> set[int]:
    """Those of the saved steps that stay. Of equal scores the later step counts as better."""
    steps = sorted(steps)
    sign = -1 if self.smaller else 1
    ranked = sorted((s for s in steps if s in self.scores), key=lambda s: (sign * self.scores[s], s))
    multiples = [s for s in steps if self.every and s % self.every == 0]
    return {*steps[-self.last :], *multiples, *(ranked[-self.best :] if self.best else ())}

  def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
    """The same as a preservation policy of Orbax."""
    del context
    kept = self.kept(c.step for c in checkpoints)
    return [c.step in kept for c in checkpoints]
