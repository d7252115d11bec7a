"""CDPruner (arXiv 2506.10967): image tokens that are most diverse as a determinantal point process has it, by what is asked.

The likeness of projected tokens is scaled on both sides by how much each patch has to do with the question, as CLIP's text tower
sees it: the less alike patch and text, the more, which the authors mean so. Needs the text tower and the top of the vision tower.
The authors scale relevance by its range over the whole batch; here every row has its own. Later questions change nothing.
"""

import jax
import jax.numpy as jnp

from dynllava_jax.config import ClipTextConfig, ModelConfig, VisionConfig
from dynllava_jax.config.parsing import require
from dynllava_jax.methods import dpp
from dynllava_jax.methods.base import KeptPatches, Reduced, Reducer, TowerNeeds, TowerOutput, patches_kept
from dynllava_jax.ops.layout import gather_rows
from dynllava_jax.ops.similarity import cosines

EPS = 1e-6


def num_tokens(model: ModelConfig, options: KeptPatches) -> int:
  """`tokens`; ConfigError if the tower has fewer patches, or no text tower belongs to it."""
  require(
    model.clip_text is not None,
    "needs CLIP's text tower, which this model has not; convert it again with --vision=DIR, a CLIP directory that has one",
  )
  return patches_kept(model, options)


def needs(vision: VisionConfig, options: KeptPatches) -> TowerNeeds:
  """Patches and question in one space."""
  del vision, options
  return TowerNeeds(question=True)


def relevance(tower: TowerOutput) -> jax.Array:
  """float32[B, P], above 0 and about 1 at most: minus the mean cosine to the question's segments, scaled to the row's range."""
  real = tower.has_text.astype(jnp.float32)
  alike = jnp.einsum('bpn,bn->bp', cosines(tower.patch_embeds, tower.text_embeds), real, precision='highest')
  unlike = -alike / jnp.maximum(real.sum(-1, keepdims=True), 1)
  least, most = unlike.min(-1, keepdims=True), unlike.max(-1, keepdims=True)
  return jnp.where(most > least, (unlike - least + EPS) / jnp.where(most > least, most - least, 1), 1.0)


def kernel(projected: jax.Array, relevant: jax.Array) -> jax.Array:
  """float32[B, P, P] of float[B, P, D] image tokens and float32[B, P]."""
  return relevant[:, :, None] * cosines(projected, projected) * relevant[:, None]


def reduce(tower: TowerOutput, project, options: KeptPatches) -> Reduced:
  """The chosen projected tokens, in their places' order."""
  projected = project(tower.features)
  kept = jnp.sort(dpp.greedy(kernel(projected, relevance(tower)), options.tokens)[0], axis=1)
  return Reduced(gather_rows(projected, kept), kept)


def text_flops(text: ClipTextConfig) -> float:
  """One segment through the text tower."""
  width, length = text.hidden_size, text.num_positions
  block = 2 * length * (4 * width**2 + 2 * width * text.mlp_dim) + 4 * length**2 * width
  return text.num_layers * block + 2 * width * text.embed_dim


def flops(model: ModelConfig, options: KeptPatches) -> float:
  """A question of one segment, the patches' projection, and the choice."""
  patches = 2 * model.vision.num_patches * model.clip_text.embed_dim * (model.vision.hidden_size + 1)
  return text_flops(model.clip_text) + patches + dpp.flops(model, options)


REDUCER = Reducer(
  reduce=reduce,
  num_tokens=num_tokens,
  needs=needs,
  projects_all=True,
  flops=flops,
  options=KeptPatches,
  source='arXiv 2506.10967; github.com/Theia-4869/CDPruner 9541616',
  verified="the authors' code: embeddings of text and patches, relevance, kernel, order of choice, logits, generated tokens",
)
