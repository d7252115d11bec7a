"""What training minimises besides the cross-entropy, by method."""

import dataclasses

from dynllava_jax.config.parsing import require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityConfig:
  """The Dynamic-LLaVA objective (paper section 3.3; numbers of the released scripts).

  Attributes:
    image_keep_rate, text_keep_rate: shares of the image and of the generated tokens to keep.
    mask_loss_weight: of the squared distances from these shares.
    min_answer_len: tokens; shorter answers are kept whole.
    instruct_keep_rate, min_instruct_len: the same for instructions, where the dynamic stage judges them.
    judge_last_instruct_token: whether training judges an instruction's last token, which generation always keeps; the authors do.
    tau_start, tau_end: temperature of the first and of the last step.
    dense_share: chance of a row to be trained with all its tokens, so that the same weights also run dense (ours; the
      paper has none).
  """

  image_keep_rate: float = 0.2
  text_keep_rate: float = 0.5
  mask_loss_weight: float = 100.0
  min_answer_len: int = 50
  instruct_keep_rate: float = 0.7
  min_instruct_len: int = 25
  judge_last_instruct_token: bool = False
  tau_start: float = 1.0
  tau_end: float = 0.1
  dense_share: float = 0.0

  def __post_init__(self):
    require(0 <= self.dense_share < 1, f'sparsity.dense_share is {self.dense_share}, expected a share in [0, 1)')
    for name in ('image_keep_rate', 'text_keep_rate', 'instruct_keep_rate'):
      value = getattr(self, name)
      require(0 < value <= 1, f'sparsity.{name} is {value}, expected a share in (0, 1]')
    require(self.tau_start > 0 and self.tau_end > 0, 'sparsity: temperatures must be positive')
    for name in ('mask_loss_weight', 'min_answer_len', 'min_instruct_len'):
      require(getattr(self, name) >= 0, f'sparsity.{name} is {getattr(self, name)}, expected 0 or more')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelevanceTraining:
  """How generated tokens that choose among image tokens (`Stage.revisit`) are trained, in this order, a run each.

  Attributes:
    objective: 'distil': scores follow the attention of the layers, which see everything; 'gumbel': scores by masks that are drawn,
      and a penalty on how many they keep; 'decoder': the decoder by the k best, which is no gradient to the scores.
    weight: of the squared distance from the share to keep, per query.
  """

  objective: str = 'distil'
  weight: float = 100.0

  def __post_init__(self):
    known = ('distil', 'gumbel', 'decoder')
    require(self.objective in known, f'relevance.objective is {self.objective!r}, expected one of {", ".join(known)}')
    require(self.weight >= 0, f'relevance.weight is {self.weight}, expected 0 or more')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidTraining:
  """How the routes of a Dynamic Pyramid Network are trained (numbers of the authors' code).

  Attributes:
    weight: of the hinge loss that asks for larger kernels; target: below which it is active, of 0 to the number of kernels - 1.
    fewest: tokens that a draw must leave.
  """

  weight: float = 0.001
  target: float = 1.5
  fewest: int = 18

  def __post_init__(self):
    for name in ('weight', 'target', 'fewest'):
      require(getattr(self, name) >= 0, f'dpn.{name} is {getattr(self, name)}, expected 0 or more')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsTraining:
  """How layers with experts are trained (numbers of MoE-LLaVA's scripts).

  Attributes:
    capacity_factor: an expert takes so many times the tokens that it had if all had equally many; the rest it loses.
    balance_weight: of the loss that balances the load.
  """

  capacity_factor: float = 1.5
  balance_weight: float = 0.01

  def __post_init__(self):
    require_positive(self, 'experts: ', 'capacity_factor')
    require(self.balance_weight >= 0, f'experts.balance_weight is {self.balance_weight}, expected 0 or more')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningTraining:
  """How layers learn to vote on their context (Dynamic Context Pruning; numbers of the authors' code).

  Attributes:
    gamma: weight of the share of tokens that are left.
    alpha_start, alpha_end: how steep votes are at the first and at the last step: 1 for a sigmoid, generation is the limit.
    dense_share: chance of a row to be trained without votes, so that the same weights also run dense (ours; the authors have none).
  """

  gamma: float = 0.3
  alpha_start: float = 1.0
  alpha_end: float = 8.0
  dense_share: float = 0.0

  def __post_init__(self):
    require(self.gamma >= 0, f'pruning.gamma is {self.gamma}, expected 0 or more')
    for name in ('alpha_start', 'alpha_end'):
      require(getattr(self, name) >= 1, f'pruning.{name} is {getattr(self, name)}, expected 1 or more')
    require(0 <= self.dense_share < 1, f'pruning.dense_share is {self.dense_share}, expected a share in [0, 1)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """The settings of every method's part; of a run, the fields of `TrainConfig` that are called so."""

  sparsity: SparsityConfig = SparsityConfig()
  relevance: RelevanceTraining = RelevanceTraining()
  dpn: PyramidTraining = PyramidTraining()
  experts: ExpertsTraining = ExpertsTraining()
  pruning: PruningTraining = PruningTraining()
