"""Gate: the newest tokens stay, and the first few: what leaves the window is dropped (as in StreamingLLM, arXiv 2309.17453).

It has no share: with one judgement per token, and that when it leaves, the newest are the window.
"""

import dataclasses

import jax.numpy as jnp

from dynllava_jax.config.parsing import require
from dynllava_jax.methods.gate import Gate, GateOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(GateOptions):
  """`sinks` and `window` alone mean something."""

  sinks: int = 4
  window: int = 4

  def __post_init__(self):
    super().__post_init__()
    require(not self.share, f'share is {self.share}, but recency keeps a window; give window, the number of newest tokens')


GATE = Gate(score=lambda fed, state, options: jnp.full(fed.token.shape, -jnp.inf), options=Options, source='after arXiv 2309.17453')
