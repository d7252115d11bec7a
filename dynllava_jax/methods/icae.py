"""In-context autoencoder (arXiv 2307.06945): memory tokens behind the context, read by an adapted copy of the decoder, stand for it

The decoder with an adapter reads [image tokens ; memory tokens]; the final hidden states of the memory tokens, "slots", are then
the image tokens of the decoder without it. A long context is read in segments, each with all memory tokens behind it. That is one
more pass over the image, so it pays where slots are reused: over several questions, turns and long answers. The authors' code is
for text; that the context is an image's tokens is this project's, as is that a row is what it is alone.

Axes: P image tokens, M slots of all segments.
"""

import dataclasses

import jax.numpy as jnp

from dynllava_jax.config import MemoryConfig, ModelConfig
from dynllava_jax.config.parsing import require
from dynllava_jax.methods.base import Reduced, Reducer, TowerOutput, row_flops

TASKS = ('ae', 'lm', 'ft')  # what follows the slots: restore the context, go on with the text, follow an instruction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """`task`: whose vector follows the slots, `ae`, `lm` or `ft`; '' for none."""

  task: str = 'ft'

  def __post_init__(self):
    require(self.task in (*TASKS, ''), f"task is {self.task!r}, expected one of {', '.join(TASKS)}, or ''")


def segments(tokens: int, memory: MemoryConfig) -> list[range]:
  """Which tokens of a context of `tokens` are read together: as few segments as the rate allows, all of one length but the last."""
  number = -(-tokens // (memory.slots * memory.rate))
  length = -(-tokens // number)
  return [range(i, min(i + length, tokens)) for i in range(0, tokens, length)]


def num_tokens(model: ModelConfig, options: Options) -> int:
  """Slots of all segments, and the task's vector; ConfigError for a model without memory tokens."""
  require(model.memory is not None, 'the model has no memory tokens; train them with configs/methods.py:icae')
  require(model.llama.experts is None, 'reads the image by an adapter, which a decoder with experts has no place for')
  return len(segments(model.num_image_tokens, model.memory)) * model.memory.slots + (options.task != '')


def reduce(tower: TowerOutput, project, options: Options) -> Reduced:
  """All patches: what is made of them takes the decoder, `models.memory`."""
  tokens = project(tower.features)
  return Reduced(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2]))


def flops(model: ModelConfig, options: Options) -> float:
  """The adapted decoder over every segment and its memory tokens."""
  llama, total = model.llama, 0.0
  attention = 2 * llama.head_dim * (llama.num_heads + llama.num_kv_heads)
  widths = {'q': llama.num_heads, 'k': llama.num_kv_heads, 'v': llama.num_kv_heads, 'o': llama.num_heads}
  adapted = 0
  for target in model.memory.targets:
    other = widths[target] * llama.head_dim if target in widths else llama.mlp_dim
    adapted += model.memory.rank * (llama.hidden_size + other)
  for segment in segments(model.num_image_tokens, model.memory):
    rows = len(segment) + model.memory.slots
    total += 2 * rows * (llama.hidden_size * (attention + 3 * llama.mlp_dim) + adapted) + row_flops(llama, rows, (rows + 1) / 2) * 2
  return llama.num_layers * total


REDUCER = Reducer(
  reduce=reduce,
  num_tokens=num_tokens,
  projects_all=True,
  compresses=True,
  flops=flops,
  options=Options,
  source='arXiv 2307.06945; github.com/getao/icae, code/icae_v2',
  verified="the authors' code on text: slots of two segments, both objectives with gradients, logits and tokens",
)
