"""One evaluation: several ways to run a checkpoint, on the same questions; or one way to run what is being trained."""

import dataclasses
import re
from collections.abc import Mapping

from dynllava_jax.config.parsing import Path, require, require_positive, require_seed
from dynllava_jax.config.run import MeshConfig, Piece, Stage

# Far above what a model can do, so that a slip of the finger is one line and not a machine without memory.
MOST_TOKENS = 2**20
MOST_AT_ONCE = 2**16  # rows of a batch
MOST_MADE = 10**6  # questions that are made for a run
MOST_PIXELS = 2**12
# What is held as int8: the decoder's matrices, the cache's keys and values.
QUANTIZATIONS = {'': (), 'int8': ('weights',), 'int8_cache': ('cache',), 'int8_all': ('weights', 'cache')}
RUN_NAME = re.compile(r'[\w+=-][\w .+=,-]{0,99}')  # it names files


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRun:
  """One row of the results table.

  Attributes:
    stages: the stage list; () is the checkpoint's own.
    checkpoint: '' is the evaluation's own.
    image_size: pixels that images are scaled to, with fewer image tokens and interpolated position embeddings; 0 is
      the tower's own size.
    reducer: what makes fewer image tokens of the tower's patches; None with no stages is the checkpoint's own too.
    quantization: '' computes with what is stored; 'int8' holds the decoder's matrices as int8, 'int8_cache' the cache's keys and
      values, 'int8_all' both. A checkpoint that is stored as int8 has its matrices so in any case.
    method, budget: what tables call the run, and by which published figures are found: the method's name, and for how many image
      tokens it was set; '' and 0 for a run that stands for none.
  """

  stages: tuple[Stage, ...] = ()
  checkpoint: Path = ''
  image_size: int = 0
  reducer: Piece | None = None
  quantization: str = ''
  method: str = ''
  budget: int = 0

  def __post_init__(self):
    known = ', '.join(filter(None, QUANTIZATIONS))
    require(self.quantization in QUANTIZATIONS, f'quantization is {self.quantization!r}, expected {known}, or nothing')
    require(self.budget >= 0, f'budget is {self.budget}, expected a number of image tokens, or 0')
    require(0 <= self.image_size <= MOST_PIXELS, f'image_size is {self.image_size}, expected 0, or at most {MOST_PIXELS} pixels')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """One evaluation of several stage lists on the same questions.

  Attributes:
    runs: rows of the table by name; the one called 'dense', else the first, is what the others are compared with.
    benchmark: name in `dynllava_jax.evals.benchmarks.suite`.
    labels: file or folder of the labels where it is not in its usual place.
    text_lengths: text buckets, ascending, in tokens besides the image's.
    allow_outside: images may lie outside of their folder: by `..`, as absolute paths, through links.
    questions: only the first so many; 0 is all.
    agreement: also measure how far the runs agree with the reference's own greedy answers, token by token.
  """

  runs: Mapping[str, EvalRun]
  benchmark: str = 'digits'
  labels: Path = ''
  allow_outside: bool = False
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
    for name in self.runs:
      require(
        RUN_NAME.fullmatch(name), f'runs: {name!r} cannot name a file; use letters, digits, blanks and + = , . - _, 100 at most'
      )
    require_positive(self, '', 'batch_size', 'max_new_tokens')
    require(self.questions >= 0, f'questions is {self.questions}, expected a number of questions, or 0 for all')
    for name, value, most in (
      ('batch_size', self.batch_size, MOST_AT_ONCE),
      ('max_new_tokens', self.max_new_tokens, MOST_TOKENS),
      ('text_lengths', max(self.text_lengths, default=0), MOST_TOKENS),
    ):
      require(value <= most, f'{name} is {value:,}, expected at most {most:,}; choose a size that fits the machine')
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


PERPLEXITY = 'perplexity'  # what `TrainEval` takes besides the suite


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainEval:
  """A benchmark that is run while a model is trained, with the weights as they are.

  Attributes:
    every: steps; the last step is evaluated, too. What is evaluated is saved first.
    benchmark: name in the suite, or 'perplexity': of the last answer of each sample in the prepared folder `data`, held out.
    data: folder of the benchmark's files, laid out as LLaVA's `playground/data/eval`; '' for those that need none.
    images: where the image files lie, if the prepared folder holds only their paths.
    labels: as in `EvalConfig`.
    stages: how the model is run; () as it is trained. Others must begin at the same layers.
    questions: only the first so many; 0 is all.
    text_lengths, batch_size, max_new_tokens, seed: as in `EvalConfig`; perplexity takes the lengths of the training data.
  """

  every: int
  benchmark: str = 'digits'
  data: Path = ''
  images: Path = ''
  labels: Path = ''
  stages: tuple[Stage, ...] = ()
  questions: int = 200
  text_lengths: tuple[int, ...] = (128,)
  batch_size: int = 64
  max_new_tokens: int = 128
  seed: int = 0

  def __post_init__(self):
    require_positive(self, '', 'every')
    self.as_config('float32')

  def as_config(self, dtype: str) -> EvalConfig:
    """The same as an evaluation of its own; ConfigError for values that it would not take."""
    names = ('labels', 'questions', 'text_lengths', 'batch_size', 'max_new_tokens', 'seed')
    fields = {name: getattr(self, name) for name in names}
    return EvalConfig(runs={'trained': EvalRun(stages=self.stages)}, benchmark=self.benchmark, dtype=dtype, **fields)

  @property
  def smaller_is_better(self) -> bool:
    """Of its score."""
    return self.benchmark == PERPLEXITY
