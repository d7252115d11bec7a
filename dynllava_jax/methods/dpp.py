"""Baseline: image tokens that are most diverse as a determinantal point process has it, which is CDPruner without its question.

CDPruner (arXiv 2506.10967) scales the likeness of projected tokens by how much each has to do with the question, as CLIP's text
tower sees it, and takes greedily what raises the determinant most. Here all have as much to do with it; no text tower is needed.
"""

import jax
import jax.numpy as jnp

from dynllava_jax.config import ModelConfig
from dynllava_jax.methods.base import KeptPatches, Reduced, Reducer, TowerOutput, patches_kept
from dynllava_jax.ops.layout import gather_rows
from dynllava_jax.ops.similarity import cosines

SMALLEST = 1e-10  # of what is left of a token, where all that is left is rounding


def greedy(kernel: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """The greedy MAP of a DPP (arXiv 1709.05135): int32[B, count] in the order of choice, and float32[B, count] what each added.

  Args:
    kernel: float32[B, P, P]; count: at most P. Beyond the kernel's rank the choice is rounding's, but of different tokens.
  """

  def of_row(kernel):
    def step(carry, i):
      left, free, factors = carry
      chosen = jnp.argmax(jnp.where(free, left, -jnp.inf))
      explained = jnp.einsum('i,ip->p', factors[:, chosen], factors, precision='highest')
      new = (kernel[chosen] - explained) / jnp.sqrt(jnp.maximum(left[chosen], SMALLEST))
      return (left - new**2, free.at[chosen].set(False), factors.at[i].set(new)), (chosen, left[chosen])

    patches = kernel.shape[0]
    start = jnp.diagonal(kernel), jnp.ones(patches, bool), jnp.zeros((count, patches), jnp.float32)
    return jax.lax.scan(step, start, jnp.arange(count))[1]

  order, gain = jax.vmap(of_row)(kernel)
  return order.astype(jnp.int32), gain


def flops(model: ModelConfig, options: KeptPatches) -> float:
  """The likeness of all, and what each chosen one explains of the others."""
  patches = model.vision.num_patches
  return 2 * patches**2 * model.llama.hidden_size + 2 * options.tokens**2 * patches


def reduce(tower: TowerOutput, project, options: KeptPatches) -> Reduced:
  """The chosen projected tokens, in their places' order."""
  projected = project(tower.features)
  kept = jnp.sort(greedy(cosines(projected, projected), options.tokens)[0], axis=1)
  return Reduced(gather_rows(projected, kept), kept)


REDUCER = Reducer(
  reduce=reduce,
  num_tokens=patches_kept,
  projects_all=True,
  flops=flops,
  options=KeptPatches,
  source='arXiv 2506.10967 without the question; github.com/Theia-4869/CDPruner 9541616',
  verified="the authors' order of choice for their kernels, which hold the question; no run without it was recorded",
)
