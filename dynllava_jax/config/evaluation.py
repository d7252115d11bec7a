"""One evaluation: several ways to run a checkpoint, on the same questions."""

import dataclasses
from collections.abc import Mapping

from dynllava_jax.config.parsing import Path, require, require_positive, require_seed
from dynllava_jax.config.run import MeshConfig, Piece, Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRun:
  """One row of the results table.

  Attributes:
    stages: the stage list; () is the checkpoint's own.
    checkpoint: '' is the evaluation's own.
    image_size: pixels that images are scaled to, with fewer image tokens and interpolated position embeddings; 0 is
      the tower's own size.
    reducer: what makes fewer image tokens of the tower's patches; None with no stages is the checkpoint's own too.
  """

  stages: tuple[Stage, ...] = ()
  checkpoint: Path = ''
  image_size: int = 0
  reducer: Piece | None = None

  def __post_init__(self):
    require(self.image_size >= 0, f'image_size is {self.image_size}, expected 0 or a number of pixels')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """One evaluation of several stage lists on the same questions.

  Attributes:
    runs: rows of the table by name; the one called 'dense', else the first, is what the others are compared with.
    benchmark: name in `dynllava_jax.evals.benchmarks.suite`.
    labels: file or folder of the labels where it is not in its usual place.
    text_lengths: text buckets, ascending, in tokens besides the image's.
    questions: only the first so many; 0 is all.
    agreement: also measure how far the runs agree with the reference's own greedy answers, token by token.
  """

  runs: Mapping[str, EvalRun]
  benchmark: str = 'digits'
  labels: Path = ''
  text_lengths: tuple[int, ...] = (128,)
  mesh: MeshConfig = MeshConfig()
  questions: int = 600
  batch_size: int = 100
  max_new_tokens: int = 128
  dtype: str = 'float32'
  seed: int = 0
  agreement: bool = False

  def __post_init__(self):
    require(len(self.runs) > 0, 'runs: at least one run is needed')
    require_positive(self, '', 'batch_size', 'max_new_tokens')
    require(self.questions >= 0, f'questions is {self.questions}, expected a number of questions, or 0 for all')
    require_seed(self.seed)
    require(self.dtype in ('float32', 'bfloat16'), f'dtype {self.dtype!r}: expected float32 or bfloat16')
    lengths = self.text_lengths
    require(
      lengths and list(lengths) == sorted(set(lengths)) and lengths[0] > 0,
      f'text_lengths are {lengths}, expected increasing positive numbers',
    )

  @property
  def reference(self) -> str:
    """Name of the run that the others are compared with."""
    return 'dense' if 'dense' in self.runs else next(iter(self.runs))
