"""PyTorch checkpoint -> parameters: every source key used once, every target slot filled once."""

import dataclasses
import itertools
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from dynllava_jax import checkpoint
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import TOKENIZER_FILES
from dynllava_jax.convert.readers import ConversionError, read_config, read_json, shards, tensors, vision_directory
from dynllava_jax.convert.tables import Rule, llava_rules, vision_rules
from dynllava_jax.models.dynllava import abstract_params
from dynllava_jax.sharding import unboxed

TOWER_PREFIX = 'model.vision_tower.vision_tower.'
ROTARY = '.rotary_emb.inv_freq'  # a buffer that transformers before 4.32 saved
TEXT_SIDE = ('text_model.', 'text_projection.', 'visual_projection.', 'logit_scale')  # rest of a full CLIP
EXAMPLES = 12  # lines of an error list


@dataclasses.dataclass(frozen=True)
class Mapped:
  """One line of the report."""

  source: str
  target: str
  shape: tuple[int, ...]
  dtype: str


def fill(cfg_params: Any, rules: list[Rule], source: Iterable[tuple[str, np.ndarray]]) -> tuple[dict[str, Any], list[Mapped]]:
  """Fills a tree of shapes from (key, tensor) pairs.

  Args:
    cfg_params: nested dict of ShapeDtypeStruct, the target.
    rules: the table.
    source: (torch key, tensor) pairs.

  Returns:
    (nested dict of numpy arrays in the tensors' dtype, report).

  Raises:
    ConversionError: one message that lists every unknown, duplicate, ill-shaped and missing tensor.
  """
  shapes = {tuple(k.key for k in p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(cfg_params)}
  leaves: dict[tuple, np.ndarray] = {}
  filled: dict[tuple, str] = {}
  report, problems = [], []
  for key, tensor in source:
    matches = [(rule, index) for rule in rules if (index := rule.match(key)) is not None]
    if not matches:
      problems.append(f'+ {key} {tuple(tensor.shape)}: unknown, nothing in the model takes it')
      continue
    ((rule, index),) = matches
    shape = shapes[rule.path]
    slot, slot_shape = (rule.path, index), shape[len(index) :]
    name = '/'.join(rule.path) + ''.join(f'[{i}]' for i in index)
    if any(i >= n for i, n in zip(index, shape)):
      problems.append(f'+ {key}: beyond the {shape[0]} layers of the config')
    elif slot in filled:
      problems.append(f'! {key}: fills {name} a second time, after {filled[slot]}')
    elif tuple(tensor.shape) != rule.transform.torch_shape(slot_shape):
      problems.append(f'! {key}: shape {tuple(tensor.shape)}, the config asks for {rule.transform.torch_shape(slot_shape)}')
    else:
      leaf = leaves.setdefault(rule.path, np.empty(shape, tensor.dtype))
      if leaf.dtype != tensor.dtype:
        problems.append(f'! {key}: stored as {tensor.dtype}, other layers as {leaf.dtype}; save them in one dtype')
      leaves[rule.path][index] = rule.transform.apply(tensor, slot_shape)
      report.append(Mapped(key, name, tuple(tensor.shape), str(tensor.dtype)))
    filled.setdefault(slot, key)
  for path, shape in shapes.items():
    depth = max((len(i) for p, i in filled if p == path), default=0) or int('layers' in path or 'blocks' in path)
    for index in itertools.product(*map(range, shape[:depth])):
      if (path, index) not in filled:
        problems.append('- ' + '/'.join(path) + ''.join(f'[{i}]' for i in index) + ': missing, no tensor fills it')
  if problems:
    more = [f'... and {len(problems) - EXAMPLES} more'] if len(problems) > EXAMPLES else []
    raise ConversionError(
      f'{len(problems)} problems (+ left over, - missing, ! wrong):\n  ' + '\n  '.join(sorted(problems)[:EXAMPLES] + more)
    )
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf
  return tree, report


def read_checkpoint(src: pathlib.Path, vision: str | None = None) -> tuple[CheckpointInfo, dict[str, Any], list[Mapped], int]:
  """Reads a checkpoint in the authors' format.

  Args:
    src: directory with config.json and weights.
    vision: CLIP directory; the config's `mm_vision_tower` if None.

  Returns:
    (info, parameters in checkpoint form as numpy arrays, report, number of tensors passed over: tower copies and rotary buffers).
  """
  vision_dir = vision_directory(src, read_json(src / 'config.json'), vision)
  info = read_config(src, vision_dir)
  copies = 0

  def source():
    nonlocal copies
    for file in shards(src):
      for key, tensor in tensors(file):
        # The authors' code ignores the copy of the tower and reads the CLIP directory; frequencies are computed.
        if key.startswith(TOWER_PREFIX) or key.endswith(ROTARY):
          copies += 1
        else:
          yield key, tensor
    for file in shards(vision_dir):
      for key, tensor in tensors(file):
        if not key.startswith(TEXT_SIDE) and not key.endswith('position_ids'):
          yield key, tensor

  target = unboxed(abstract_params(info.model, with_tail=info.unused_vision_layers))
  params, report = fill(target, llava_rules(info.model) + vision_rules(info.model), source())
  return info, params, report, copies


def convert(src: pathlib.Path, dst: pathlib.Path, vision: str | None = None) -> tuple[CheckpointInfo, list[Mapped], int]:
  """Converts a checkpoint directory; `dst` must not hold one yet.

  Returns:
    (info, report, number of tensors passed over: tower copies and rotary buffers).

  Raises:
    ConversionError: see `fill` and `readers`; nothing is written then.
  """
  dst = dst.absolute()
  if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
    raise ConversionError(f'{dst}: exists and is not empty; choose another --dst')
  info, params, report, copies = read_checkpoint(src, vision)
  tokenizer = {name: (src / name).read_bytes() for name in TOKENIZER_FILES if (src / name).is_file()}
  # Under another name until it is whole: an interrupted conversion neither looks finished nor blocks the next.
  partial = dst.with_name(f'.{dst.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  checkpoint.save_params(partial, 0, jax.tree.map(jax.numpy.asarray, params))
  checkpoint.write_info(partial, info, tokenizer)
  os.replace(partial, dst)
  return info, report, copies
