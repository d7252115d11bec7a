"""DivPrune (arXiv 2503.02175): keeps the image tokens that lie farthest apart from each other, whatever anything attends to.

Greedy: first the token that is farthest from its nearest neighbour, then again and again the one that is farthest from all that
are chosen. One token after the other, so M - 1 small steps in a row. The authors' `tokens` are `round(0.098 * 576)` = 56.
"""

import jax
import jax.numpy as jnp

from dynllava_jax.methods.base import KeptPatches, Reduced, Reducer, TowerOutput, patches_kept
from dynllava_jax.ops.layout import gather_rows
from dynllava_jax.ops.similarity import cosines


def distances(projected: jax.Array) -> jax.Array:
  """float32[B, P, P], 1 - cosine of projected tokens float[B, P, D]."""
  return 1 - cosines(projected, projected)


def spread(distance: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Tokens in the order of choice, int32[B, count], and float32[B, count] how far each was from its nearest then.

  Args:
    distance: float32[B, P, P]; count: at most P. A chosen token is out, so `count` different ones are found among equal ones too.
  """

  def of_row(distance):
    nearest_two = jnp.sort(distance, axis=0)[: min(2, distance.shape[0])]
    lonely = nearest_two[-1]  # the smallest is the token itself
    first = jnp.argmax(lonely)

    def step(carry, _):
      nearest, free = carry
      score = jnp.where(free, nearest, -jnp.inf)
      chosen = jnp.argmax(score)
      return (jnp.minimum(nearest, distance[chosen]), free.at[chosen].set(False)), (chosen, score[chosen])

    start = distance[first], jnp.arange(distance.shape[0]) != first
    _, (chosen, score) = jax.lax.scan(step, start, length=count - 1)
    return jnp.append(first, chosen).astype(jnp.int32), jnp.append(lonely[first], score)

  return jax.vmap(of_row)(distance)


def reduce(tower: TowerOutput, project, options: KeptPatches) -> Reduced:
  """The chosen projected tokens, in their places' order."""
  projected = project(tower.features)
  kept = jnp.sort(spread(distances(projected), options.tokens)[0], axis=1)
  return Reduced(gather_rows(projected, kept), kept)


REDUCER = Reducer(
  reduce=reduce,
  num_tokens=patches_kept,
  projects_all=True,
  flops=lambda model, options: 2 * model.vision.num_patches**2 * model.llama.hidden_size,
  options=KeptPatches,
  source='arXiv 2503.02175; github.com/vbdi/divprune 799e2d9',
  verified="the authors' code: distances, order of choice, scores, logits, generated tokens",
)
