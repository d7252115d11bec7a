"""Weights that some methods add to a model: exit heads, and memory tokens with their adapter."""

import dataclasses

from dynllava_jax.config.parsing import require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitHeadConfig:
  """A second final norm and output matrix, shared by all depths that a run may leave at. Their sizes are the decoder's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
  """Memory tokens that stand for a context (ICAE, arXiv 2307.06945), and the adapter by which the decoder reads it; their defaults.

  Attributes:
    slots: memory tokens of a segment, which holds at most `slots * rate` tokens.
    rank, alpha, targets: of the adapter, as in `LoraConfig`.
  """

  slots: int = 128
  rate: int = 4
  rank: int = 128
  alpha: float = 32.0
  targets: tuple[str, ...] = ('q', 'v')

  def __post_init__(self):
    require_positive(self, 'memory: ', 'slots', 'rate', 'rank', 'alpha')
    known = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
    require(
      self.targets and set(self.targets) <= set(known) and len(set(self.targets)) == len(self.targets),
      f'memory: targets are {list(self.targets)}, expected some of {", ".join(known)}, each once',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningConfig:
  """Weights by which the rows of a decoder layer vote on what stands before them (`Stage.layers` 'dynamic_context_pruning').

  Attributes:
    dim: of interaction queries and keys.
    bias: what is added to their products at first; the larger, the more is held.
  """

  dim: int = 64
  bias: float = 2.0

  def __post_init__(self):
    require_positive(self, 'pruning: ', 'dim')
