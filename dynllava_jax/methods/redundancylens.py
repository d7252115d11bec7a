"""RedundancyLens (arXiv 2501.19036): in some layers of the prefill image rows get hollow attention, in some a part of the MLP.

`Stage(layers=Piece("redundancylens", dict(attention_layers=(...), ffn_layers=(...))))`; layers count from 0 over the decoder, and
named with the stage that they lie in. No token leaves, the cache is complete, and what is decoded runs in plain layers. The
authors' code could not be had: window, probes, scores and rounding are conventions, and no figure of the paper is claimed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dynllava_jax.config import ConfigError, LlamaConfig
from dynllava_jax.methods.base import LayerKind, Rows
from dynllava_jax.ops import layout
from dynllava_jax.ops.attention import causal_attention, hollow_attention
from dynllava_jax.ops.selection import top_indices

ROWS_AT_ONCE = 8  # the channels of a row are a copy of its own of so much of the weights; more rows wait


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Which layers, and how much of them.

  Attributes:
    attention_layers: decoder layers with hollow attention.
    attention_range: an image row sees those that are less than so many tokens of the whole image before it, and itself.
    ffn_layers: decoder layers in which image rows pass a part of the MLP; the part is each sample's own.
    channel_ratio: share of the MLP's channels in it, rounded.
    probe_tokens: image rows, evenly spaced, that choose the channels; 0 for a tenth of them.
  """

  attention_layers: tuple[int, ...] = ()
  attention_range: int = 256
  ffn_layers: tuple[int, ...] = ()
  channel_ratio: float = 0.2
  probe_tokens: int = 0

  def __post_init__(self):
    for name in ('attention_layers', 'ffn_layers'):
      if min(getattr(self, name), default=0) < 0:
        raise ConfigError(f'{name} are {getattr(self, name)}, expected layers counted from 0')
    if self.attention_range < 1:
      raise ConfigError(f'attention_range is {self.attention_range}, expected at least 1: a row sees itself')
    if not 0 < self.channel_ratio <= 1:
      raise ConfigError(f'channel_ratio is {self.channel_ratio}, expected a share in (0, 1]')
    if self.probe_tokens < 0:
      raise ConfigError(f'probe_tokens is {self.probe_tokens}, expected 0 or more')


def flags(layers: int, options: Options) -> dict[str, tuple[bool, ...]]:
  """Per decoder layer, whether it is reduced; ConfigError for a layer that the decoder does not have."""
  listed = {'attention': options.attention_layers, 'ffn': options.ffn_layers}
  for name, which in listed.items():
    if max(which, default=0) >= layers:
      raise ConfigError(f'{name}_layers name layer {max(which)}, the decoder has {layers}, 0 to {layers - 1}')
  return {name: tuple(i in which for i in range(layers)) for name, which in listed.items()}


def attend(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, marks: dict[str, jax.Array], options: Options) -> jax.Array:
  """Hollow in the marked layers, causal in the others."""
  if not options.attention_layers:
    return causal_attention(q, k, v)
  hollow = lambda q, k, v: hollow_attention(q, k, v, rows.image_start, rows.image_index, options.attention_range)
  return jax.lax.cond(marks['attention'], hollow, causal_attention, q, k, v)


def probe_places(num_image: int, probes: int) -> list[int]:
  """Which image rows choose the channels: evenly spaced from the first to the last."""
  probes = min(probes or max(num_image // 10, 1), num_image)
  return [i * (num_image - 1) // max(probes - 1, 1) for i in range(probes)]


def num_channels(channels: int, ratio: float) -> int:
  """Channels of the MLP that image rows pass."""
  return max(round(ratio * channels), 1)


def mlp(
  x: jax.Array, weights: tuple[jax.Array, jax.Array, jax.Array], rows: Rows, marks: dict[str, jax.Array], options: Options
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Text rows pass the whole MLP; image rows that of the chosen channels in the marked layers."""
  if not options.ffn_layers:
    return plain(x, *weights), {}
  reduced = functools.partial(_reduced, rows=rows, options=options)
  channels = num_channels(weights[0].shape[1], options.channel_ratio)

  def whole(x, *weights):
    nothing = {
      'channel_scores': jnp.zeros((x.shape[0], weights[0].shape[1]), jnp.float32),
      'channels': jnp.zeros((x.shape[0], channels), jnp.int32),
    }
    return plain(x, *weights), nothing

  return jax.lax.cond(marks['ffn'], reduced, whole, x, *weights)


def plain(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
  """The MLP of a block."""
  return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def _reduced(x, gate, up, down, rows: Rows, options: Options):
  num_image = rows.num_image
  text, image = layout.split_rows(x, rows.image_start, num_image)
  probes = image[:, jnp.asarray(probe_places(num_image, options.probe_tokens))]
  active = (jax.nn.silu(probes @ gate) * (probes @ up)).astype(jnp.float32)
  scores = jnp.abs(active).mean(1)
  channels = top_indices(scores, num_channels(gate.shape[1], options.channel_ratio))
  own = lambda row: plain(row[0], gate[:, row[1]], up[:, row[1]], down[row[1]])
  image = jax.lax.map(own, (image, channels), batch_size=ROWS_AT_ONCE)
  out = layout.join_rows(plain(text, gate, up, down), image, rows.image_start)
  return out, {'channel_scores': scores, 'channels': channels}


def saves(llama: LlamaConfig, layer: int, image: int, options: Options) -> tuple[float, float]:
  """Keys outside the window; channels left out, less what the probes cost, which pass two of the MLP's three products."""
  hidden = max(image - options.attention_range, 0) if layer in options.attention_layers else 0
  if layer not in options.ffn_layers or not image:
    return hidden * (hidden + 1) / 2, 0.0
  left = num_channels(llama.mlp_dim, options.channel_ratio) / llama.mlp_dim
  return hidden * (hidden + 1) / 2, image * (1 - left) - len(probe_places(image, options.probe_tokens)) * 2 / 3


LAYERS = LayerKind(
  flags=flags,
  attend=attend,
  mlp=mlp,
  saves=saves,
  options=Options,
  source="arXiv 2501.19036; the authors' code could not be had",
  verified='an independent program written from descriptions of the paper: outputs of both parts, channels, logits and tokens',
)
