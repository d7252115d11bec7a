"""Dynamic Context Pruning (arXiv 2305.15805): each layer deletes earlier tokens from its own context, for good, as it reads on.

`Stage(layers=Piece('dynamic_context_pruning'))`, on a model with interaction weights (`ModelConfig.pruning`). Any token may go, of
image or text, given or generated; every query votes, so a token can be held until it has been read. The prefill costs what a dense
one does; what is saved are slots of the cache and what is read of it. Two quirks of the authors' code are not copied: their store
moves keys and values in place while an older mask still reads them, and their `propagate_in_depth` is forgotten by decoding.
"""

import dataclasses

import jax

from dynllava_jax.config import ConfigError, ModelConfig
from dynllava_jax.methods.base import LayerKind
from dynllava_jax.methods.voting import Voting
from dynllava_jax.ops.pruning import Votes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How large the cache is.

  Attributes:
    tokens: that each layer of the stage has room for, of whatever comes; beyond these the one with the smallest score is given up,
      and counted. 0 has room for all.
  """

  tokens: int = 0

  def __post_init__(self):
    if self.tokens < 0:
      raise ConfigError(f'tokens is {self.tokens}, expected 0 or more')


def votes(x: jax.Array, weights: dict[str, jax.Array], options: Options) -> Votes:
  """By linear maps of the normalised rows float[B, T, D], shared by all heads of the layer."""
  del options
  q, k = (x @ weights[f'pruning/{name}'].astype(x.dtype) for name in 'qk')
  return Votes(q, k, weights['pruning/bias'])


def flops(model: ModelConfig, queries: float, keys: float, options: Options) -> float:
  """Interaction queries and keys, and their scores."""
  return model.pruning.dim * (4 * model.llama.hidden_size * queries + 2 * keys)


LAYERS = LayerKind(
  voting=Voting(votes=votes, holds=lambda options: options.tokens, flops=flops, numbers=lambda model, options: model.pruning.dim),
  training='votes',
  options=Options,
  source='arXiv 2305.15805; github.com/sanagno/adaptively_sparse_attention',
  verified="the authors' code on a small GPT-2, its store repaired, and the same rule in a LLaMA: scores, survival, logits, "
  'tokens, tokens held per layer and step; of a training step survival, losses and gradients',
)
