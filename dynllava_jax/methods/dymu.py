"""DyMU (arXiv 2504.17040): in every block of the vision tower the likest tokens are merged in pairs, between attention and MLP.

Its first part, with a fixed number of merges per block as in token merging (arXiv 2210.09461); the merged tokens enter the language
model in the order that merging leaves them in. The authors' thresholds let the number follow from each picture, which has no static
form: `above` counts what a threshold would merge, to choose a schedule by. The second part, virtual unmerging: the decoder's linear
layers see merged tokens, its attention all patches at their places, so that the prefill gets cheaper and the cache no smaller.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.config import ModelConfig, VisionConfig
from dynllava_jax.config.parsing import require
from dynllava_jax.methods.base import MergedTokens, Reduced, Reducer, TowerNeeds, TowerOutput
from dynllava_jax.ops.layout import gather_rows
from dynllava_jax.ops.similarity import cosines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """`merges`: tokens merged away in each block that is run, or one number for all; never more than half of them.

  Of 576 patches 21 in each of CLIP-L's blocks leave 93, 16 leave 208, 8 leave 392. `unmerge`: the second part.
  """

  merges: tuple[int, ...]
  unmerge: bool = True

  def __post_init__(self):
    require(len(self.merges) > 0 and min(self.merges) >= 0, f'merges is {self.merges}, expected numbers of tokens, 0 or more')


def schedule(vision: VisionConfig, options: Options) -> tuple[int, ...]:
  """Tokens merged in each block that is run, as far as there are enough."""
  merges = options.merges * vision.layers_run if len(options.merges) == 1 else options.merges
  require(
    len(merges) == vision.layers_run,
    f'merges has {len(merges)} numbers, expected one, or one for each of the {vision.layers_run} blocks that are run',
  )
  tokens, counts = vision.num_patches + 1, []
  for wanted in merges:
    counts.append(min(wanted, (tokens - 1) // 2))
    tokens -= counts[-1]
  return tuple(counts)


def num_tokens(model: ModelConfig, options: Options) -> int:
  """Patches less what is merged away; ConfigError for a schedule of another length."""
  return model.vision.num_patches - sum(schedule(model.vision, options))


def needs(vision: VisionConfig, options: Options) -> TowerNeeds:
  """Merging inside the tower."""
  return TowerNeeds(merges=schedule(vision, options), merge=merge)


def merge(x: jax.Array, keys: jax.Array, tokens: MergedTokens, count: int) -> tuple[jax.Array, MergedTokens]:
  """Merges the `count` likest pairs of one block.

  Every second token, the class token among them, may go into one of those between, several into the same. What stays of the first
  kind comes first, then all of the second: so the next block pairs otherwise.

  Args:
    x: float[B, T, C] behind the attention; keys: float32[B, T, H], head means.
    tokens: what the rows of x are; count: at most (T - 1) // 2.

  Returns:
    float[B, T - count, C], means weighted by size, and what its rows are.
  """
  rows = jnp.arange(x.shape[0])[:, None]
  alike = cosines(keys[:, 0::2], keys[:, 1::2]).at[:, 0].set(-jnp.inf)  # the class token stays alone
  best, into = alike.max(-1), alike.argmax(-1).astype(jnp.int32)
  going = jax.lax.top_k(best, count)[1]
  target = gather_rows(into, going)
  gone = jnp.zeros(best.shape, bool).at[rows, going].set(True)
  staying = jnp.argsort(gone, axis=1, stable=True)[:, : best.shape[1] - count]

  def joined(values, added=True):
    first, second = values[:, 0::2], values[:, 1::2]
    second = second.at[rows, target].add(gather_rows(first, going)) if added else second
    return jnp.concatenate([gather_rows(first, staying), second], 1)

  size = joined(tokens.size)
  sums = joined(x.astype(jnp.float32) * tokens.size[..., None])
  behind = staying.shape[1]
  new_first = (jnp.cumsum(~gone, axis=1) - 1).at[rows, going].set(behind + target)
  new_second = jnp.broadcast_to(behind + jnp.arange(x.shape[1] // 2), (x.shape[0], x.shape[1] // 2))
  places = jnp.zeros(x.shape[:2], jnp.int32).at[:, 0::2].set(new_first.astype(jnp.int32)).at[:, 1::2].set(new_second)
  patch = joined(tokens.patch, added=False)
  return (sums / size[..., None]).astype(x.dtype), MergedTokens(size, gather_rows(places, tokens.group), patch, best)


def above(best: jax.Array, threshold: float) -> jax.Array:
  """int32[B]: how many of `MergedTokens.best` float32[B, A] a threshold would merge; a schedule's caps hold besides."""
  return (best > threshold).sum(-1, dtype=jnp.int32)


def flops(model: ModelConfig, options: Options) -> float:
  """The likeness of the keys of every second token to those between, in each block."""
  vision, total = model.vision, 0
  tokens = vision.num_patches + 1
  for merged in schedule(vision, options):
    total += 2 * (tokens - tokens // 2) * (tokens // 2) * (vision.hidden_size // vision.num_heads)
    tokens -= merged
  return total


def reduce(tower: TowerOutput, project, options: Options) -> Reduced:
  """Merged tokens as the last block leaves them; each stands for the patch that others went into."""
  tokens = tower.merged[-1][1]
  group = tokens.group[:, 1:] - 1 if options.unmerge else None  # without the class token
  return Reduced(project(tower.features), tokens.patch[:, 1:], group)


REDUCER = Reducer(
  reduce=reduce,
  num_tokens=num_tokens,
  needs=needs,
  flops=flops,
  unmerges=lambda options: options.unmerge,
  options=Options,
  source='arXiv 2504.17040; github.com/MikeWangWZHL/dymu c57d75a',
  verified="the authors' code with and without unmerging: groups, sizes and hidden states of every block that is run, image "
  'tokens, places, logits, generated tokens; thresholds as the schedule that each picture gives',
)
