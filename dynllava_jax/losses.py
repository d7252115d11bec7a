"""The training objective (paper section 3.3): cross-entropy plus keep-rate penalties."""

import dataclasses

import jax
import jax.numpy as jnp

from dynllava_jax.config import IGNORE, SparsityConfig
from dynllava_jax.models.dynllava import Prompt, TrainOutput, answer_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
  """Scalars; `total = ce + mask_loss_weight * (image_mask + text_mask)`. Keep rates are batch means.

  In a dense run the mask terms are 0 and both keep rates 1. A keep rate is NaN if the batch has nothing that it is about.
  """

  total: jax.Array
  ce: jax.Array
  image_mask: jax.Array
  text_mask: jax.Array
  image_keep: jax.Array
  text_keep: jax.Array


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean over all supervised tokens of the batch; position t predicts label t + 1.

  Args:
    logits: float32[B, S, V]; labels: int32[B, S], `IGNORE` where not supervised.
  """
  targets = labels[:, 1:]
  supervised = targets != IGNORE
  log_probs = jax.nn.log_softmax(logits[:, :-1], -1)
  picked = jnp.take_along_axis(log_probs, jnp.where(supervised, targets, 0)[..., None], -1)[..., 0]
  return -jnp.where(supervised, picked, 0).sum() / supervised.sum()


def training_losses(out: TrainOutput, prompt: Prompt, labels: jax.Array, answer_start: jax.Array, cfg: SparsityConfig) -> Losses:
  """Losses of one batch.

  The image term is the mean over rows with an image of (rate - mean mask)^2, the text term the same over
  last answers; answers shorter than `min_answer_len` contribute 0 but count in the mean. Rows run dense are in neither.

  Args:
    out: from `train_forward`.
    prompt: the batch; labels: int32[B, S]; answer_start: int32[B].
    cfg: rates, weight and threshold.
  """
  ce = cross_entropy(out.logits, labels)
  if out.image_mask is None:
    zero, one = jnp.zeros(()), jnp.ones(())
    return Losses(ce, ce, zero, zero, one, one)
  has_image = (prompt.image_start >= 0) & ~out.dense
  image_means = out.image_mask.mean(-1)
  images = jnp.maximum(has_image.sum(), 1)
  image_term = jnp.where(has_image, jnp.square(cfg.image_keep_rate - image_means), 0).sum() / images
  judged = answer_mask(jnp.arange(labels.shape[1])[None], prompt.length, answer_start, cfg.min_answer_len)
  judged = judged & ~out.dense[:, None]
  counts = judged.sum(-1)
  text_means = jnp.where(judged, out.text_mask, 0).sum(-1) / jnp.maximum(counts, 1)
  text_term = jnp.where(counts > 0, jnp.square(cfg.text_keep_rate - text_means), 0).sum() / jnp.maximum((~out.dense).sum(), 1)
  return Losses(
    total=ce + cfg.mask_loss_weight * (image_term + text_term),
    ce=ce,
    image_mask=image_term,
    text_mask=text_term,
    image_keep=jnp.where(has_image, image_means, 0).sum() / has_image.sum(),
    text_keep=jnp.where(counts > 0, text_means, 0).sum() / (counts > 0).sum(),
  )
