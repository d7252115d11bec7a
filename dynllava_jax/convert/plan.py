"""Which tensor fills which part of which parameter: every source key used once, every slot filled once.

All of it is decided from names, shapes and dtypes, before any tensor is loaded or any byte is written.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import numpy as np

from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.convert.readers import FLOATS, ConversionError, Tensor
from dynllava_jax.convert.tables import Rule, llava_rules, vision_rules
from dynllava_jax.models.params import abstract_params
from dynllava_jax.sharding import unboxed

EXAMPLES = 12  # lines of an error list
PLAUSIBLE = 2**20  # a width up to this is compared tensor by tensor
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter: its shape, and how many leading axes number its slots (layer, part of a fused weight)."""

  shape: tuple[int, ...]
  slot_axes: int

  @property
  def slot_shape(self) -> tuple[int, ...]:
    return self.shape[self.slot_axes :]

  @property
  def slots(self):
    """Every slot index."""
    return itertools.product(*map(range, self.shape[: self.slot_axes]))


@dataclasses.dataclass(frozen=True)
class Assignment:
  """One tensor and the slot it fills; `dtype` is what it is stored as."""

  tensor: Tensor
  rule: Rule
  index: tuple[int, ...]
  leaf: Leaf
  dtype: np.dtype

  @property
  def path(self) -> Path:
    return self.rule.path

  @property
  def nbytes(self) -> int:
    return math.prod(self.leaf.slot_shape) * self.dtype.itemsize

  def load(self) -> np.ndarray:
    """The slot's content."""
    return self.rule.transform.apply(self.tensor.load().astype(self.dtype, copy=False), self.leaf.slot_shape)


def slot_name(path: Path, index: tuple[int, ...]) -> str:
  """`llama/layers/q[3]`."""
  return '/'.join(path) + ''.join(f'[{i}]' for i in index)


def rules_of(info: CheckpointInfo) -> list[Rule]:
  """The table for a checkpoint; the tower's unused top only if it is stored."""
  rules = llava_rules(info.model) + vision_rules(info.model)
  paths = leaf_shapes(info)
  return [r for r in rules if r.path in paths]


@functools.lru_cache(maxsize=8)  # tracing the model takes a second
def leaf_shapes(info: CheckpointInfo) -> dict[Path, tuple[int, ...]]:
  """Shape of every parameter, by path."""
  tree: Any = unboxed(abstract_params(info.model, with_tail=info.unused_vision_layers))
  return {tuple(k.key for k in p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def slots_by_key(info: CheckpointInfo) -> dict[str, tuple[Rule, tuple[int, ...], Leaf]]:
  """Every tensor name of the model, and where it goes."""
  shapes = leaf_shapes(info)
  rules = rules_of(info)
  missing = shapes.keys() - {r.path for r in rules}
  assert not missing, f'no rule fills {missing}'
  return {
    key: (rule, index, Leaf(shapes[rule.path], rule.slot_axes)) for rule in rules for key, index in rule.keys(shapes[rule.path][0])
  }


def check_sizes(info: CheckpointInfo, tensors: list[tuple[str, Tensor]]) -> None:
  """ConversionError if a config asks for far more than there is, before anything of that size is made, or for each layer."""
  model, vision, llama, predictor = info.model, info.model.vision, info.model.llama, info.model.predictor
  origin = tensors[0][1].origin if tensors else 'the source'
  layers = {'the decoder': llama.num_layers, 'the tower': vision.num_layers, 'the projector': model.projector_depth}
  widths = {'vocab_size': llama.vocab_size, 'hidden_size': llama.hidden_size, 'intermediate_size': llama.mlp_dim}
  widths |= {'patches': vision.num_patches, 'hidden_size of the tower': vision.hidden_size}
  widths |= {'intermediate_size of the tower': vision.mlp_dim}
  if text := model.clip_text:
    layers |= {"CLIP's text tower": text.num_layers}
    widths |= {'vocab_size of the text tower': text.vocab_size, 'hidden_size of the text tower': text.hidden_size}
    widths |= {'intermediate_size of the text tower': text.mlp_dim, 'projection_dim of the towers': text.embed_dim}
    widths |= {'max_position_embeddings of the text tower': text.num_positions}
  if predictor:
    layers |= {'the image predictor': predictor.num_layers}
    widths |= {'d_model of the predictors': predictor.d_model, 'dim_feedforward of the predictors': predictor.mlp_dim}
  for part, count in layers.items():
    if count > len(tensors):
      raise ConversionError(f'{origin}: {len(tensors)} tensors in all, but the config asks for {count:,} layers of {part} alone')
  largest = max((n for _, t in tensors for n in t.shape), default=0)
  for name, width in widths.items():
    if width > max(largest, PLAUSIBLE):
      raise ConversionError(
        f'{origin}: no tensor has more than {largest:,} rows or columns, but the config asks for {width:,} ({name})'
      )


def assign(info: CheckpointInfo, tensors: list[tuple[str, Tensor]], dtype: np.dtype | None) -> list[Assignment]:
  """Gives every tensor its slot.

  Args:
    info: the model.
    tensors: (the converter's name, tensor).
    dtype: what to store; each tensor's own if None.

  Raises:
    ConversionError: one message that lists every unknown, duplicate, ill-shaped and missing tensor.
  """
  check_sizes(info, tensors)
  expected, rules = slots_by_key(info), rules_of(info)
  filled: dict[str, Tensor] = {}
  leaf_dtypes: dict[Path, np.dtype] = {}
  plan, problems = [], []
  for key, tensor in tensors:
    if key not in expected:
      beyond = next((rule for rule in rules if rule.match(key)), None)
      if beyond:
        layers = leaf_shapes(info)[beyond.path][0]
        problems.append(f'+ {tensor.key}: beyond the {layers} layers of the config ({tensor.origin})')
      else:
        problems.append(f'+ {tensor.key} {tensor.shape}: unknown, nothing in the model takes it ({tensor.origin})')
      continue
    rule, index, leaf = expected[key]
    wanted = rule.transform.torch_shape(leaf.slot_shape)
    own = dtype or leaf_dtypes.setdefault(rule.path, tensor.dtype)
    if key in filled:
      problems.append(
        f'! {tensor.key}: fills {slot_name(rule.path, index)} a second time ({tensor.origin}, after {filled[key].origin})'
      )
    elif tensor.shape != wanted:
      problems.append(f'! {tensor.key}: shape {tensor.shape}, the config asks for {wanted} ({tensor.origin})')
    elif tensor.dtype not in FLOATS:
      problems.append(f'! {tensor.key}: stored as {tensor.dtype}; only floating point checkpoints are supported ({tensor.origin})')
    elif own == np.float64:  # jax holds no such numbers, so the checkpoint could not be loaded
      problems.append(f'! {tensor.key}: stored as float64, which is not supported; choose --dtype=float32 ({tensor.origin})')
    elif tensor.dtype != own and dtype is None:
      problems.append(f'! {tensor.key}: stored as {tensor.dtype}, other layers as {own}; choose one with --dtype')
    else:
      plan.append(Assignment(tensor, rule, index, leaf, own))
    filled.setdefault(key, tensor)
  for key in expected.keys() - filled.keys():
    rule, index, _ = expected[key]
    problems.append(f'- {slot_name(rule.path, index)}: missing, no tensor fills it (expected {key})')
  if problems:
    more = [f'... and {len(problems) - EXAMPLES} more'] if len(problems) > EXAMPLES else []
    raise ConversionError(
      f'{len(problems)} problems (+ left over, - missing, ! wrong):\n  ' + '\n  '.join(sorted(problems)[:EXAMPLES] + more)
    )
  return plan
