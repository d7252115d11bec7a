"""One measurement of speed and memory: a model of random weights, several ways to run it, several batch sizes."""

import dataclasses
from collections.abc import Mapping

from dynllava_jax.config.evaluation import MOST_AT_ONCE, MOST_TOKENS, EvalRun
from dynllava_jax.config.model import ModelConfig
from dynllava_jax.config.parsing import require, require_positive, require_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """What is measured.

  Attributes:
    model: its sizes; weights are random, in `dtype`.
    runs: stage lists by name; the one called 'dense', else the first, is what the others are compared with.
    rows: batch sizes.
    text: text tokens of every prompt; new: tokens that are generated with a cache, and uncached_new without one, 0 for not at all.
    repeats: how often each is timed, in turn with the others, after one call that is not.
    engine: whether the engine is timed too, with as many slots as rows.
  """

  model: ModelConfig
  runs: Mapping[str, EvalRun]
  rows: tuple[int, ...] = (1, 8)
  text: int = 64
  new: int = 128
  uncached_new: int = 8
  repeats: int = 5
  dtype: str = 'bfloat16'
  engine: bool = True
  seed: int = 0

  def __post_init__(self):
    require(len(self.runs) > 0 and all(r.stages for r in self.runs.values()), 'runs: at least one is needed, each with stages')
    for name, run in self.runs.items():
      require(
        not run.image_size, f'runs.{name}.image_size is {run.image_size}: pictures here have the size of the model; set it there'
      )
    require(len(self.rows) > 0 and all(0 < n <= MOST_AT_ONCE for n in self.rows), f'rows are {self.rows}, expected batch sizes')
    require_positive(self, '', 'text', 'new', 'repeats')
    require(max(self.text, self.new, self.uncached_new) <= MOST_TOKENS, f'text, new and uncached_new: at most {MOST_TOKENS:,}')
    require(self.uncached_new >= 0, f'uncached_new is {self.uncached_new}, expected 0 or more')
    require(self.new > 1, 'new: decoding is timed from the second token on, expected 2 or more')
    require(self.dtype in ('float32', 'bfloat16'), f'dtype {self.dtype!r}: expected float32 or bfloat16')
    require_seed(self.seed)

  @property
  def reference(self) -> str:
    """Name of the run that the others are compared with."""
    return 'dense' if 'dense' in self.runs else next(iter(self.runs))
