"""Bytes that a run takes of each device, by kind and by arithmetic: nothing is allocated, traced or compiled.

What is stored is exact: shapes and shardings of the run's own state. What a step makes on its way follows from a model of the
TPU compiler's allocations, whose factors were fitted to what it says of whole steps of 7B and 13B models (docs/scale.md, where the
errors stand); tests/training/test_plan.py compares.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from dynllava_jax import methods, sharding
from dynllava_jax.config import TrainConfig
from dynllava_jax.models.cross_entropy import CHUNK
from dynllava_jax.ops.attention import causal_blocks
from dynllava_jax.training.ahead import abstract_state
from dynllava_jax.training.step import cut_abstract, make_optimizer, split_frozen, state_shardings

FLOAT32 = 4
# How many copies of each the compiler has at once, fitted.
LAYERS_GATHERED = 2.0  # a layer's whole weights and their gradient, one layer being fetched while another is computed
SCORES_POLICY, SCORES_CAUSAL = 4.0, 4.0  # float32 scores of the largest block of queries
MLP_ROWS = 4.0  # arrays of the MLP's width
HEADS = 2.0  # the output head with its gradient, whole in float32
LOGITS = 3.0  # float32 logits of a chunk
VISION_ROWS = 6.0  # arrays of the vision tower's MLP


@dataclasses.dataclass(frozen=True)
class Footprint:
  """Bytes per device."""

  parameters: float
  gradients: float
  optimizer: float
  activations: float
  temporaries: float
  batch: float

  @property
  def total(self) -> float:
    """All of them."""
    return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Stored:
  """What lies on each device between two steps, in bytes; `numbers`: how many of them are trained there."""

  parameters: float
  trained: float
  optimizer: float
  numbers: float


def stored(cfg: TrainConfig, sizes: dict[str, int]) -> Stored:
  """Of a run on a mesh with axes of these sizes; `accumulate` and `remat` change nothing."""
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
  state, kept = abstract_state(cfg)
  places = state_shardings(cfg, make_optimizer(cfg.optimizer, cfg.steps), mesh)
  kept_places = sharding.shardings(split_frozen(cut_abstract(cfg), cfg.held, cfg.only)[1], mesh)
  trained = _bytes(state.params, places.params)
  bytes_each = np.dtype(cfg.param_dtype).itemsize
  return Stored(trained + _bytes(kept, kept_places), trained, _bytes(state.opt_state, places.opt_state), trained / bytes_each)


def of_run(cfg: TrainConfig, sizes: dict[str, int], text_length: int | None = None, lies: Stored | None = None) -> Footprint:
  """Of one step of the largest text bucket, or of another.

  Args:
    cfg: the run.
    sizes: of the mesh's axes, as `sharding.mesh_sizes` gives them.
    text_length: a bucket.
    lies: `stored` of them, if it is known.
  """
  lies = lies or stored(cfg, sizes)
  rows = -(-cfg.batch_size // sharding.batch_ways(sizes))
  step = _Step(cfg, sizes, -(-rows // cfg.accumulate), text_length or cfg.data.text_length)
  sums = FLOAT32 * lies.numbers if cfg.accumulate > 1 else 0.0
  return Footprint(
    parameters=lies.parameters,
    gradients=lies.trained + sums,
    optimizer=lies.optimizer,
    activations=step.activations(),
    temporaries=step.temporaries(lies.numbers),
    batch=rows * (cfg.model.vision.image_size**2 * 3 + 8 * step.positions),
  )


def _bytes(tree: Any, places: Any) -> float:
  """Of a tree of shapes, on each device."""
  sizes = jax.tree.map(lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize, tree, places)
  return float(sum(jax.tree.leaves(sizes)))


class _Step:
  """What a step makes of `rows` rows on one device."""

  def __init__(self, cfg: TrainConfig, sizes: dict[str, int], rows: int, text_length: int):
    self.cfg, self.rows, self.tensor, self.split = cfg, rows, sizes['tensor'], sizes['fsdp'] * sizes['tensor']
    self.positions = text_length + methods.num_image_tokens(cfg.model, cfg.reducer)
    self.size = np.dtype(jax.numpy.dtype(cfg.dtype)).itemsize
    llama = cfg.model.llama
    self.width, self.mlp = llama.hidden_size, llama.mlp_dim
    self.kv = llama.num_kv_heads * llama.head_dim
    experts = llama.experts  # a layer with them is the largest
    mlps = experts.count if experts else 1
    self.layer_numbers = 2 * self.width**2 + 2 * self.width * self.kv + 3 * self.width * self.mlp * mlps
    self.mlp_passes = experts.top_k * cfg.experts.capacity_factor if experts else 1

  def activations(self) -> float:
    """What decoder layers keep for the way back, and a vision tower that is trained."""
    per_position = {
      'block': self.width,
      'offload': self.width,
      'dots': 3 * self.width + (self.width + 2 * self.kv + 2 * self.mlp) / self.tensor,
      'none': 6 * self.width + (4 * self.width + 4 * self.kv + 4 * self.mlp) / self.tensor,
    }[self.cfg.remat]
    layers = self.cfg.model.llama.num_layers
    kept = self.rows * self.positions * per_position * self.size * layers
    if self.cfg.remat == 'none' and methods.trained_by(self.cfg.stages) != 'masks':
      kept += layers * sum(self._scores(end - start, end) for start, end in causal_blocks(self.positions))
    if 'vision' not in self.cfg.held:
      vision = self.cfg.model.vision
      per_patch = (8 * vision.hidden_size + 4 * vision.mlp_dim) * self.size
      kept += (
        self.rows
        * vision.layers_run
        * (vision.num_patches + 1)
        * (per_patch + vision.num_heads / self.tensor * (vision.num_patches + 1) * FLOAT32)
      )
    return kept

  def temporaries(self, numbers: float) -> float:
    """The most that is there at one time besides; `numbers`: how many a device trains."""
    cast = numbers * self.size if self.cfg.dtype != self.cfg.param_dtype else 0.0
    return cast + max(self._layer(), self._loss(), self._vision())

  def _scores(self, queries: int, keys: int) -> float:
    return self.rows * self.cfg.model.llama.num_heads / self.tensor * queries * keys * FLOAT32

  def _layer(self) -> float:
    """One decoder layer on the way back."""
    gathered = self.layer_numbers / self.tensor * self.size * (1 if self.split > self.tensor else 0.5)
    masks = methods.trained_by(self.cfg.stages) == 'masks'
    scores = (SCORES_POLICY if masks else SCORES_CAUSAL) * max(self._scores(e - s, e) for s, e in causal_blocks(self.positions))
    mlp = MLP_ROWS * self.rows * self.positions * self.mlp * self.mlp_passes / self.tensor * self.size
    return LAYERS_GATHERED * gathered + scores + mlp

  def _loss(self) -> float:
    """The output head, its gradient and the logits of a chunk of positions."""
    vocab = self.cfg.model.llama.vocab_size / self.tensor
    head = self.width * vocab * ((self.size if 'llama' in self.cfg.held else FLOAT32) * HEADS)
    return head + LOGITS * self.rows * min(CHUNK, self.positions) * vocab * FLOAT32

  def _vision(self) -> float:
    vision = self.cfg.model.vision
    rows = self.rows * (vision.num_patches + 1)
    scores = self.rows * vision.num_heads / self.tensor * (vision.num_patches + 1) ** 2 * FLOAT32
    return VISION_ROWS * rows * vision.mlp_dim * self.size + 2 * scores
