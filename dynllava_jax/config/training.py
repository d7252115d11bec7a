"""One training run: data, optimiser, objective."""

import dataclasses
from collections.abc import Mapping

from dynllava_jax.config.evaluation import PERPLEXITY, RUN_NAME, TrainEval
from dynllava_jax.config.groups import GROUPS, LLAVA, STORED_ALONG, groups_of, idle
from dynllava_jax.config.model import ModelConfig
from dynllava_jax.config.objective import (
  ExpertsTraining,
  Objective,
  PruningTraining,
  PyramidTraining,
  RelevanceTraining,
  SparsityConfig,
)
from dynllava_jax.config.parsing import Path, require, require_positive, require_seed
from dynllava_jax.config.run import DENSE, MeshConfig, Piece, Stage, check_stages, judges_instructions

FLOATS = ('float32', 'bfloat16')
LORA_BASES = ('float32', 'bfloat16', 'int8')
LORA_TARGETS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
OPTIMIZERS = ('adamw', 'adafactor')
REMAT = ('none', 'block', 'dots', 'offload')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where samples come from and how they are batched.

  Attributes:
    source: name in `data.sources`: 'prepared', or one of the embedded ones.
    path: folder written by `python -m dynllava_jax.data.prepare`, for 'prepared'.
    images: where the image files lie, if the prepared folder holds only their paths.
    tokenizer: folder with the tokenizer's files, if `init_from` brings none.
    conversation: template, a name in `data.conversation.TEMPLATES`.
    text_length: largest text bucket, in tokens besides the image's.
    buckets: further, smaller ones; each is one more compiled program.
    group_lengths: put samples of like lengths into one batch.
    truncate: cut what is longer than the largest bucket, as LLaVA does, instead of counting it as bad.
    on_bad_sample: 'error' starts no run on data with samples that cannot be used, 'skip' leaves them out and counts them.
    images_only: leave samples without image out.
    image_aspect: 'pad' (LLaVA-1.5) or 'square', see `data.images.preprocess`.
    rotate_images: turn pictures as their EXIF orientation says; LLaVA does not.
    allow_outside: paths of image files may lead out of `images`: by `..`, as absolute paths, through links.
    shuffle: a new permutation every epoch; off where the source's order is a curriculum.
    workers: grain worker processes; 0 reads in threads.
  """

  source: str = 'digits'
  path: Path = ''
  images: Path = ''
  tokenizer: Path = ''
  conversation: str = 'plain_turns'
  text_length: int = 128
  buckets: tuple[int, ...] = ()
  group_lengths: bool = False
  truncate: bool = False
  on_bad_sample: str = 'error'
  images_only: bool = False
  image_aspect: str = 'pad'
  rotate_images: bool = False
  allow_outside: bool = False
  shuffle: bool = True
  workers: int = 0

  def __post_init__(self):
    require_positive(self, 'data: ', 'text_length')
    require(0 <= self.workers <= 1024, f'data: workers is {self.workers}, expected 0 to 1024')
    require(self.text_length <= 2**24, f'data: text_length is {self.text_length}, expected at most {2**24:,} tokens')
    lengths = (0, *self.buckets, self.text_length)
    require(
      list(lengths) == sorted(set(lengths)),
      f'data: buckets {self.buckets} must ascend and stay below text_length {self.text_length}',
    )
    require(self.on_bad_sample in ('error', 'skip'), f'data: on_bad_sample is {self.on_bad_sample!r}, expected error or skip')
    require(self.image_aspect in ('pad', 'square'), f'data: image_aspect is {self.image_aspect!r}, expected pad or square')

  @property
  def text_buckets(self) -> tuple[int, ...]:
    """All text buckets, ascending."""
    return (*self.buckets, self.text_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Cosine with linear warm-up, one peak learning rate per parameter group.

  Attributes:
    name: 'adamw', or 'adafactor' (arXiv 1804.04235; rows and columns of second moments, no first ones: almost no memory).
    learning_rate: peak for everything but the predictors; predictor_learning_rate: theirs.
    warmup_share: of the steps.
    weight_decay: per step and learning rate; norms and biases have none.
    decay_embeddings: whether token, class and position embeddings have.
    b2: decay of AdamW's second moments.
    clip_norm: of the gradients of all groups together.
    moment_dtype: what moments are stored as. bfloat16 halves them; they are rounded up or down at random.
  """

  name: str = 'adamw'
  learning_rate: float = 5e-6
  predictor_learning_rate: float = 2e-4
  warmup_share: float = 0.03
  weight_decay: float = 0.0
  decay_embeddings: bool = True
  b2: float = 0.999
  clip_norm: float = 1.0
  moment_dtype: str = 'float32'

  def __post_init__(self):
    require(self.name in OPTIMIZERS, f'optimizer.name is {self.name!r}, expected one of {", ".join(OPTIMIZERS)}')
    require(self.moment_dtype in FLOATS, f'optimizer.moment_dtype is {self.moment_dtype!r}, expected float32 or bfloat16')
    require(0 < self.b2 < 1, f'optimizer.b2 is {self.b2}, expected a number in (0, 1)')
    require_positive(self, 'optimizer: ', 'clip_norm')
    require(0 <= self.warmup_share < 1, f'optimizer.warmup_share is {self.warmup_share}, expected [0, 1)')
    require(self.learning_rate > 0 and self.predictor_learning_rate > 0, 'optimizer: learning rates must be positive')
    require(self.weight_decay >= 0, f'optimizer.weight_decay is {self.weight_decay}, expected 0 or more')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Low-rank adapters in place of the decoder's own weights; defaults as LLaVA's scripts.

  Attributes:
    rank, alpha: what an adapter adds is `alpha / rank` times a product of rank `rank`.
    dropout: of the adapters' inputs.
    targets: matrices of every decoder layer that have one.
    base: what the decoder's own weights are held as. With int8 (one scale per output) the adapter is trained beside rounded
      weights, but belongs to those that are stored.
  """

  rank: int = 128
  alpha: float = 256.0
  dropout: float = 0.05
  targets: tuple[str, ...] = LORA_TARGETS
  base: str = 'bfloat16'

  def __post_init__(self):
    require_positive(self, 'lora: ', 'rank', 'alpha')
    require(0 <= self.dropout < 1, f'lora.dropout is {self.dropout}, expected a share in [0, 1)')
    for target in self.targets:
      require(
        target in LORA_TARGETS, f'lora.targets: {target!r} is no matrix of a layer; expected some of {", ".join(LORA_TARGETS)}'
      )
    require(len(set(self.targets)) == len(self.targets) > 0, f'lora.targets is {self.targets}, expected some matrices, each once')
    require(self.base in LORA_BASES, f'lora.base is {self.base!r}, expected one of {", ".join(LORA_BASES)}')

  @property
  def scale(self) -> float:
    """What the product of an adapter's two matrices is multiplied with."""
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """One training run.

  Attributes:
    init_from: checkpoint directory to start from; '' initialises at random.
    frozen: what is not trained: groups of parameters, or paths in them, in which `*` stands for any part, such as `llama/norm`,
      `llama/layers/q` or `llama/*/q`.
    only: such groups and paths outside of which nothing is trained; () for no such limit.
    lora: train adapters of the decoder in place of its own weights; the other groups as ever.
    accumulate: parts in which each device computes its rows, one after the other: the same update, less memory.
    dtype: of the computation.
    param_dtype: of what is trained. bfloat16 halves it; updates are then rounded up or down at random, so that small ones count.
    remat: what decoder layers keep for the way back: 'none' of it is computed again, 'block' keeps their input alone, 'dots' also
      matrix products with weights, 'offload' these in the host's memory.
    log_every, save_every: steps; save_minutes: also when so many have passed since the last save; 0 for steps alone.
    keep: so many of the newest saved steps stay.
    keep_every: saved steps that are a multiple of it stay for good; 0 for none.
    keep_best, keep_best_by: so many steps stay whose score in this evaluation is best; '' is the only one there is.
    evals: benchmarks that are run while training, by name.
    on_bad_step: a step whose loss or gradient is no number, or a spike: 'stop' ends the run, 'skip' leaves weights and moments as
      they are and counts it.
    spike: a step is bad if its loss or gradient norm is more than so many times the median of the last 64; 0 for never.
    grace_seconds: SIGTERM ends the run within this time, saved or not.
  """

  model: ModelConfig
  stages: tuple[Stage, ...] = DENSE
  reducer: Piece | None = None
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  sparsity: SparsityConfig = SparsityConfig()
  relevance: RelevanceTraining = RelevanceTraining()
  dpn: PyramidTraining = PyramidTraining()
  experts: ExpertsTraining = ExpertsTraining()
  pruning: PruningTraining = PruningTraining()
  mesh: MeshConfig = MeshConfig()
  init_from: Path = ''
  frozen: tuple[str, ...] = ()
  only: tuple[str, ...] = ()
  lora: LoraConfig | None = None
  batch_size: int = 64
  accumulate: int = 1
  steps: int = 1000
  seed: int = 0
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  remat: str = 'none'
  log_every: int = 20
  save_every: int = 500
  save_minutes: float = 0.0
  keep: int = 3
  keep_every: int = 0
  keep_best: int = 0
  keep_best_by: str = ''
  evals: Mapping[str, TrainEval] = dataclasses.field(default_factory=dict)
  on_bad_step: str = 'stop'
  spike: float = 0.0
  grace_seconds: float = 120.0

  def __post_init__(self):
    if self.reducer is None:  # else `methods.check_run`, which knows how many image tokens there are
      check_stages(self.stages, self.model)
    require(not (self.init_from and self.data.tokenizer), 'data.tokenizer: init_from brings its own; leave one of them empty')
    require_positive(self, '', 'batch_size', 'accumulate', 'steps', 'log_every', 'save_every', 'keep')
    require_seed(self.seed)
    for stage in self.stages:
      require(
        stage.selector != 'dynamic' or stage.image_keep_rate == self.sparsity.image_keep_rate,
        f'sparsity.image_keep_rate is {self.sparsity.image_keep_rate}, but the dynamic stage keeps {stage.image_keep_rate}',
      )
    for name in ('dtype', 'param_dtype'):
      require(getattr(self, name) in FLOATS, f'{name} {getattr(self, name)!r}: expected float32 or bfloat16')
    require(self.remat in REMAT, f'remat {self.remat!r}: expected one of {", ".join(REMAT)}')
    groups = (*LLAVA, STORED_ALONG[0], *GROUPS)
    for name in ('frozen', 'only'):
      for path in getattr(self, name):
        group = path.split('/')[0]
        require(group in groups, f'{name}: {group!r} is no parameter group; expected some of {", ".join(groups)}')
    predictor = self.model.predictor
    require(
      not judges_instructions(self.stages) or (predictor is not None and predictor.instruct),
      'stages: option instruct needs an instruction predictor; set model.predictor.instruct to True',
    )
    learning = {*LLAVA, *(name for name, group in groups_of(self.model).items() if group.learns(self.stages))}
    require(not (self.lora and self.model.llama.experts), 'lora: adapters know no layers with experts; train the whole decoder')
    if self.lora:
      require(bool(self.init_from), 'lora: adapters belong to trained weights; give their checkpoint with init_from')
      require('llama' not in self.frozen, "frozen: with lora the decoder's own weights are; leave 'llama' out")
    require(not learning <= set(self.frozen), f'frozen: {", ".join(self.frozen)} leaves nothing to train')
    self._check_watching()

  def _check_watching(self) -> None:
    """What is measured, kept and given up while the run goes on."""
    for name in ('save_minutes', 'keep_every', 'keep_best'):
      require(getattr(self, name) >= 0, f'{name} is {getattr(self, name)}, expected 0 or more')
    require_positive(self, '', 'grace_seconds')
    require(self.on_bad_step in ('stop', 'skip'), f'on_bad_step is {self.on_bad_step!r}, expected stop or skip')
    require(self.spike == 0 or self.spike > 1, f'spike is {self.spike}, expected more than 1, or 0 for never')
    for name, task in self.evals.items():
      require(RUN_NAME.fullmatch(name), f'evals: {name!r} cannot name a folder; use letters, digits, blanks and + = , . - _')
      held_out = task.benchmark != PERPLEXITY or task.data != self.data.path
      require(held_out, f'evals.{name}.data: {task.data} is what the run is trained on; give data that is held out')
      same = not task.stages or [s.start for s in task.stages] == [s.start for s in self.stages]
      starts = ', '.join(str(s.start) for s in self.stages)
      require(same, f'evals.{name}.stages: must begin at the layers of the trained ones ({starts}); the weights are cut for these')
    if self.keep_best:
      known = ', '.join(self.evals) or 'none'
      require(
        self.keep_best_by in self.evals or (not self.keep_best_by and len(self.evals) == 1),
        f'keep_best_by is {self.keep_best_by!r}, expected the name of one of evals ({known})',
      )

  @property
  def best_by(self) -> str:
    """Name of the evaluation by which the best steps are kept; '' if none are."""
    return (self.keep_best_by or next(iter(self.evals))) if self.keep_best else ''

  @property
  def objective(self) -> Objective:
    """What is minimised besides the cross-entropy."""
    return Objective(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Objective)})

  @property
  def held(self) -> tuple[str, ...]:
    """Parameter groups, and paths in them, that the step takes and leaves as they are; see `only` besides."""
    out = (*self.frozen, *idle(self.stages))
    return (*out, 'llama', 'scales') if self.lora else out
