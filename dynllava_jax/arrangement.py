"""How weights and cache lie in memory while a model runs, and its tower's kernel: decided here alone, by what runs it.

`STACKED`: layers are stacked and scanned. TPU compilers read a slice of a stack where it lies, heads first; programs are small.
`TILED`: stacked too, but a slot's heads lie side by side, and slots come in whole tiles. Then a row's cache is one matrix, which a
TPU's matrix unit takes as it lies; head by head the vector unit would read it, at a fifth of the memory's bandwidth.
`APART`: every layer's arrays are its own and layers are unrolled. XLA's CPU compiler copies a slice before it multiplies with it,
and transposes what does not lie as its matrix product wants it: all weights and the whole cache, for every token.

Checkpoints and training know `STACKED` alone; `models.params.cut_params` makes either of a checkpoint.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Arrangement:
  """How a stage's arrays lie.

  Attributes:
    apart: whether layers are arrays of their own, and q, k and v one matrix; else stacked [L, ...].
    keys, values: axes of a layer's cache, of a letter each: B batch, C slots, K kv heads, H head dim, X both: K H.
    multiple: slots of a cache are a multiple of this.
    tower: how the vision tower attends, see `ops.full_attention`.
    int8: whether keys and values are held as int8, see `ops.int8`.
  """

  apart: bool
  keys: str
  values: str
  multiple: int = 1
  tower: str = 'xla'
  int8: bool = False

  @property
  def flat(self) -> bool:
    """Whether a slot's heads are one axis."""
    return 'x' in self.keys

  def __str__(self) -> str:
    layers = 'each layer apart' if self.apart else 'layers stacked, heads side by side' if self.flat else 'layers stacked'
    layers += ', keys and values as int8' if self.int8 else ''
    return f'weights and cache: {layers}; attention of the vision tower: {self.tower}'


STACKED = Arrangement(apart=False, keys='bckh', values='bckh')
TILED = Arrangement(apart=False, keys='bcx', values='bcx', multiple=8, tower='flash')
CUDA = dataclasses.replace(STACKED, tower='cudnn')
APART = Arrangement(apart=True, keys='bkhc', values='bkch')


def with_int8_cache(lies: Arrangement) -> Arrangement:
  """The same with keys and values as int8, of which a TPU's tiles hold 32 slots."""
  return dataclasses.replace(lies, int8=True, multiple=32 if lies.flat else lies.multiple)


def best(devices: Iterable[jax.Device]) -> Arrangement:
  """What is fastest where a model runs on these devices. Over several, layers stay stacked, and heads apart, as they are split."""
  devices = list(devices)
  if len(devices) != 1:
    return STACKED
  device = devices[0]
  if device.platform == 'gpu':  # cuDNN's kernel is for Ampere and later
    return CUDA if device.device_kind.startswith('NVIDIA') and float(device.compute_capability) >= 8 else STACKED
  return {'cpu': APART, 'tpu': TILED}.get(device.platform, STACKED)


def best_for(params: Any) -> Arrangement:
  """`best` where a tree of arrays, or of their shapes, lies; what is on no device yet goes to the first one."""
  found: set[jax.Device] = set()
  for leaf in jax.tree.leaves(params):
    place = getattr(leaf, 'sharding', None)
    found |= place.device_set if place else {jax.local_devices()[0]}
  return best(found)


def of_run(params: dict[str, Any]) -> Arrangement:
  """How parameters in the form for a run lie: what is fastest on their devices, of what the form of their decoder allows."""
  if 'stage_0' not in params['llama']:
    return APART
  fastest = best_for(params)
  return STACKED if fastest.apart else fastest


def layer_names(starts: Sequence[int], num_layers: int) -> list[str]:
  """Where the parameters of each layer lie in `llama` if they lie apart: layer j of stage i in `stage_{i}_{j}`."""
  bounds = zip(starts, [*starts[1:], num_layers])
  return [f'stage_{i}_{j}' for i, (start, end) in enumerate(bounds) for j in range(end - start)]


def stack_start(name: str) -> int | None:
  """The first decoder layer of a stack that checkpoints hold, by its name in `llama`; None for what is no stack of layers.

  `layers` are all of them. Where layers are unlike, those next to each other that are alike are a stack: `layers_N`, from layer N.
  """
  found = re.fullmatch(r'layers(?:_(\d+))?', name)
  return found and int(found[1] or 0)


def cut_stack(first: int, count: int, starts: Sequence[int]) -> list[tuple[str, int, int]]:
  """What becomes of a stack of `count` layers from decoder layer `first` on where stages start at `starts`.

  Returns:
    (name, first row, row after the last) of each part: `stage_I`, or `stage_I_at_N` of one that begins inside its stage, at
    layer N.
  """
  parts = []
  for i, (start, end) in enumerate(zip(starts, [*starts[1:], first + count])):
    a, b = max(start, first), min(end, first + count)
    if a < b:
      parts.append((part_name(i, start, a), a - first, b - first))
  return parts


def part_name(stage: int, start: int, layer: int) -> str:
  """Of the part of a stage that begins at a layer; `start` is where the stage does."""
  return f'stage_{stage}' if layer == start else f'stage_{stage}_at_{layer}'


def joined_projections(layer: dict[str, Any]) -> dict[str, Any]:
  """A layer's weights with q, k and v, [N, D, H] and [K, D, H], as one matrix `qkv` [D, (N + 2 K) H]; or scales [N, H] as [X]."""
  flat = lambda w: w.transpose(1, 0, 2).reshape(w.shape[1], -1) if w.ndim == 3 else w.reshape(-1)
  rest = {name: w for name, w in layer.items() if name not in ('q', 'k', 'v')}
  return rest | {'qkv': jnp.concatenate([flat(layer[name]) for name in 'qkv'], -1)}


def lay_apart(llama: dict[str, Any]) -> dict[str, Any]:
  """A decoder, or its scales, whose layers are stacks of one each (`stage_0_0`), as a run takes it. `llama` is consumed."""
  return {name: _from_stack(llama.pop(name)) if name.startswith('stage_') else llama[name] for name in list(llama)}


@jax.jit
def _from_stack(layer: dict[str, Any]) -> dict[str, Any]:
  return joined_projections(jax.tree.map(lambda x: x[0], layer))


def parted_projections(qkv: jax.Array, heads: int, kv_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The inverse: (q, k, v)."""
  by_head = qkv.reshape(qkv.shape[0], heads + 2 * kv_heads, -1).transpose(1, 0, 2)
  return tuple(jnp.split(by_head, [heads, heads + kv_heads]))
