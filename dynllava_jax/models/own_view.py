"""What generated tokens see of the image in one layer of a stage with a `revisit` piece.

Axes: B batch, S sequence, T new tokens, M candidates, N heads, K kv heads, H head dim.
"""

import jax

from dynllava_jax import methods
from dynllava_jax.config import Stage
from dynllava_jax.methods import revisit
from dynllava_jax.models.layer_types import Context
from dynllava_jax.ops import layout


def image_of(stage: Stage, q: jax.Array, context: Context, layer: jax.Array, num_image: int) -> jax.Array:
  """What is seen of the candidates in this layer of the stage: float[B, k, 2, K, H]; q float[B, T, N, H]."""
  held, index = context.candidates, context.chosen
  if context.generated is not None:
    piece, options = methods.bound(stage.revisit, 'revisit')
    keys = held.of_layer(None, layer)[:, :, 0]
    index = revisit.choose(piece.score(q, keys, {}, None), options.count(num_image))[:, 0]
  return held.of_layer(index, layer)


def of_rows(stage: Stage, q: jax.Array, k: jax.Array, context: Context, num_image: int) -> jax.Array:
  """bool[B, S, M], what each row sees of the image where this layer chooses for generated ones."""
  piece, options = methods.bound(stage.revisit, 'revisit')
  rows = context.rows
  image_k = layout.split_rows(k, rows.image_start, rows.num_image)[1]
  index = revisit.choose(piece.score(q, image_k, {}, None), options.count(num_image))
  return revisit.seen(index, rows.num_image) | ~context.generated[..., None]
