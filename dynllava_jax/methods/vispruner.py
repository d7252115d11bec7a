"""VisPruner (arXiv 2412.01818 v2): keeps patches that the class token attends to, and of the others those least like the rest.

The others lose their duplicates round by round: every second one, in the order of attention, is compared with those between;
the 8 most similar leave. What is left of the first half goes on in front, the most similar survivor first.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.config import VisionConfig
from dynllava_jax.config.parsing import require
from dynllava_jax.methods.base import KeptPatches, Reduced, Reducer, TowerNeeds, TowerOutput, patches_kept
from dynllava_jax.ops.layout import gather_rows
from dynllava_jax.ops.similarity import cosines

LEAVE = 8  # per round


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(KeptPatches):
  """`tokens`: image tokens kept, `int(tokens * important_ratio)` of them by attention; the authors' `visual_token_num`."""

  important_ratio: float = 0.5

  def __post_init__(self):
    super().__post_init__()
    require(0 <= self.important_ratio <= 1, f'important_ratio is {self.important_ratio}, expected a share from 0 to 1')

  @property
  def important(self) -> int:
    return int(self.tokens * self.important_ratio)


def needs(vision: VisionConfig, options: Options) -> TowerNeeds:
  """The attention row of the block whose output is the features."""
  del options
  return TowerNeeds(class_attention=(vision.selected_block,))


def leaving(live: int, wanted: int) -> int:
  """How many leave in a round that starts with `live` tokens: no more than there are tokens between those compared."""
  return min(LEAVE, live - wanted, live // 2)


def choose(tower: TowerOutput, options: Options) -> tuple[jax.Array, jax.Array]:
  """Important patches int32[B, t] in falling order of attention, and diverse ones int32[B, T - t] as the rounds leave them.

  An odd number of tokens in a round, at which the authors' code fails, has one more in the half that is compared.
  """
  (attention,) = tower.class_attention.values()
  scores = attention.mean(1)
  order = jax.lax.top_k(scores, scores.shape[1])[1].astype(jnp.int32)
  important, residual = order[:, : options.important], order[:, options.important :]
  wanted, live = options.tokens - options.important, residual.shape[1]
  rounds = [live]
  while wanted and rounds[-1] > wanted:
    rounds.append(rounds[-1] - leaving(rounds[-1], wanted))
  if len(rounds) > 1:
    residual = distinct(cosines(tower.features, tower.features), residual, jnp.asarray(rounds, jnp.int32))
  return important, residual[:, :wanted]


def distinct(similarity: jax.Array, residual: jax.Array, live: jax.Array) -> jax.Array:
  """int32[B, R], of which the first `live[-1]` are those that no round has dropped.

  Args:
    similarity: float32[B, P, P]; residual: int32[B, R] patches.
    live: int32[rounds + 1], how many there are before each round and in the end.
  """

  def of_row(similarity, residual):
    places = jnp.arange(residual.shape[0])

    def step(residual, counts):
      before, after = counts
      first, second = residual[0::2], residual[1::2]
      alike = jnp.where(2 * jnp.arange(second.shape[0]) + 1 < before, similarity[first[:, None], second], -jnp.inf).max(1)
      alike = jnp.where(2 * jnp.arange(first.shape[0]) < before, alike, -jnp.inf)
      falling = first[jnp.argsort(-alike, stable=True)]
      survivors = (before + 1) // 2 - (before - after)
      ahead = jnp.take(falling, places + before - after, mode='clip')
      return jnp.where(places < survivors, ahead, jnp.take(second, places - survivors, mode='clip')), None

    return jax.lax.scan(step, residual, (live[:-1], live[1:]))[0]

  return jax.vmap(of_row)(similarity, residual)


def reduce(tower: TowerOutput, project, options: Options) -> Reduced:
  """Both kinds of patches, in their places' order."""
  kept = jnp.sort(jnp.concatenate(choose(tower, options), 1), axis=1)
  return Reduced(project(gather_rows(tower.features, kept)), kept)


REDUCER = Reducer(
  reduce=reduce,
  num_tokens=patches_kept,
  needs=needs,
  flops=lambda model, options: 2 * model.vision.num_patches**2 * model.vision.hidden_size,
  options=Options,
  source='arXiv 2412.01818 v2; github.com/Theia-4869/VisPruner aefa01a',
  verified="the authors' code: attention row, features, both choices, image tokens, logits, generated tokens",
)
