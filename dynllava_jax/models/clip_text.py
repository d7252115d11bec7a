"""CLIP's text tower (arXiv 2103.00020), and patches in the space that it shares with the vision tower.

Everything is computed in float32: what is made of it serves choices. Axes: B batch, N segments, L positions, D width,
E shared space.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynllava_jax.config import ClipTextConfig, ModelConfig, VisionConfig
from dynllava_jax.methods.base import TowerOutput
from dynllava_jax.models.clip import VisionBlock
from dynllava_jax.models.layers import LayerNorm, partitioned, scan_layers

NO_SEGMENT = -1  # all ids of a segment that is not there


def pooled_place(ids: jax.Array, end_id: int | None) -> jax.Array:
  """int32[...], where in segments int32[..., L] the summary stands, see `ClipTextConfig.end_id`."""
  return jnp.argmax(ids if end_id is None else ids == end_id, axis=-1)


class ClipText(nn.Module):
  """The group `clip_text`: the text tower, and the projections of text and of patches."""

  cfg: ClipTextConfig
  vision: VisionConfig

  def setup(self):
    cfg, init = self.cfg, nn.initializers.normal(0.02)
    table = lambda name, rows: self.param(name, partitioned(init, None, 'embed'), (rows, cfg.hidden_size))
    self.token_embedding = table('token_embedding', cfg.vocab_size)
    self.position_embedding = table('position_embedding', cfg.num_positions)
    self.layers = scan_layers(VisionBlock, cfg.num_layers, ())(cfg, jnp.float32, causal=True)
    self.final_layer_norm = LayerNorm(cfg.layer_norm_eps, jnp.float32)
    linear = partitioned(nn.initializers.lecun_normal(), None, None)
    projection = lambda name, width: self.param(name, linear, (width, cfg.embed_dim))
    self.text_projection = projection('text_projection', cfg.hidden_size)
    self.visual_projection = projection('visual_projection', self.vision.hidden_size)

  def text(self, segments: jax.Array) -> jax.Array:
    """int32[B, N, L] token ids with begin and end, padded with 0 -> float32[B, N, E]; anything for segments that are not there."""
    batch, count, length = segments.shape
    ids = jnp.maximum(segments, 0).reshape(batch * count, length)
    embed = lambda table: table.astype(jnp.float32)
    x = embed(self.token_embedding)[ids] + embed(self.position_embedding)[:length]
    (x, _), _ = self.layers((x, None))
    x = jnp.take_along_axis(x, pooled_place(ids, self.cfg.end_id)[:, None, None], 1)[:, 0]  # no row sees what is behind it
    x = self.final_layer_norm(x)
    return jnp.dot(x, embed(self.text_projection), precision='highest').reshape(batch, count, -1)

  def patches(self, normed: jax.Array) -> jax.Array:
    """float32[B, P, vision width] behind the vision tower's last norm -> float32[B, P, E]."""
    return jnp.dot(normed, self.visual_projection.astype(jnp.float32), precision='highest')

  def __call__(self, segments: jax.Array, normed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`text` and `patches`."""
    return self.text(segments), self.patches(normed)


def with_question(tower: TowerOutput, params: dict[str, Any], cfg: ModelConfig, question: jax.Array | None) -> TowerOutput:
  """What the tower gives, with question and patches in the space that CLIP's two towers share.

  Args:
    tower: its output; params: the model's, with `vision_tail` and `clip_text`; cfg: the model.
    question: int32[B, N, L], see `Prompt`; ValueError if it is None.
  """
  if question is None:
    raise ValueError('prompt.question: None, but this run chooses image tokens by the question; give it in CLIP tokens')
  norm = LayerNorm(cfg.vision.layer_norm_eps, jnp.float32, parent=None)
  normed = norm.apply({'params': params['vision_tail']['post_layernorm']}, tower.features)
  text, patches = ClipText(cfg.clip_text, cfg.vision, parent=None).apply({'params': params['clip_text']}, question, normed)
  return dataclasses.replace(tower, text_embeds=text, has_text=question[..., 0] != NO_SEGMENT, patch_embeds=patches)
