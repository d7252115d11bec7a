"""Checkpoints of adapters on their way out: merged with their base slot by slot, or as PEFT keeps an adapter.

PEFT's format is that of LLaVA's LoRA training: `adapter_config.json`, `adapter_model.safetensors`, and beside them what was trained
whole, `non_lora_trainables.safetensors` (LLaVA's `.bin` without pickle).
"""

import json
import pathlib
from typing import Any

import numpy as np
import tensorstore as ts

from dynllava_jax import checkpoint
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import LoraConfig
from dynllava_jax.convert.plan import Path, slots_by_key
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.step_reader import Out, StepReader
from dynllava_jax.models.lora import ADAPTERS
from dynllava_jax.models.matrices import MATRICES

ADAPTER_FILE, TRAINED_WHOLE_FILE = 'adapter_model', 'non_lora_trainables'
PREFIX = 'base_model.model.'
LAYERS = ('llama', 'layers')


class MergingReader:
  """Reads a step with adapters as `StepReader` reads the whole model: own groups, or those of the base with the adapters added."""

  def __init__(self, base: 'StepReader | MergingReader', own: StepReader, groups: set[str], lora: LoraConfig):
    self.base, self.own, self.groups, self.lora = base, own, groups, lora

  def array(self, path: Path) -> ts.TensorStore:
    """The stored parameter; of an adapted matrix the base's, whose shape and dtype the sum has."""
    return (self.own if path[0] in self.groups else self.base).array(path)

  def slot(self, path: Path, index: tuple[int, ...]) -> np.ndarray:
    """One slot; the product of an adapter is added in float32."""
    if path[0] in self.groups:
      return self.own.slot(path, index)
    weight = self.base.slot(path, index)
    if path[:2] != LAYERS or path[2] not in self.lora.targets:
      return weight
    matrix = MATRICES[path[2]]
    a, b = (self.own.slot((ADAPTERS, 'layers', path[2], n), index).astype(np.float32) for n in 'ab')
    product = np.einsum(f'{matrix.inner}r,r{matrix.outer}->{matrix.letters}', a, b, optimize=True)
    return (weight.astype(np.float32) + np.float32(self.lora.scale) * product).astype(weight.dtype)


def reader_of(path: str | pathlib.Path) -> StepReader | MergingReader:
  """Reads DIR or DIR/STEP, whose parameters are compared with their checksums, those of a base too; CheckpointError if damaged."""
  directory, step = checkpoint.locate(path)
  info, step_dir = checkpoint.read_info(path), directory / str(step)
  checkpoint.check_integrity(step_dir, 'params')
  own = StepReader(step_dir)
  if info.lora is None:
    return own
  checkpoint.check_base(info, path)
  groups = {name.split('/')[0] for name in checkpoint.stored_params(path)}
  return MergingReader(reader_of(info.base), own, groups, info.lora)


def adapter_plan(info: CheckpointInfo, reader: StepReader | MergingReader, dtype: np.dtype | None) -> list[Out]:
  """Every tensor of PEFT's format; the names are those of the authors' LLaVA.

  Raises:
    ConversionError: the checkpoint holds a whole model.
  """
  if not isinstance(reader, MergingReader):
    raise ConversionError('--export=peft: the checkpoint holds a whole model and no adapters; export it as llava-hf or llava')
  plan, own = [], reader.own
  kept = lambda path: dtype or np.dtype(own.array(path).dtype.numpy_dtype)
  for key, (rule, index, leaf) in slots_by_key(info).items():
    if rule.path[0] in reader.groups:
      read = lambda rule=rule, index=index: rule.transform.invert(own.slot(rule.path, index))
      shape = rule.transform.torch_shape(leaf.slot_shape)
      plan.append(Out('', PREFIX + key, shape, kept(rule.path), read, TRAINED_WHOLE_FILE))
    elif rule.path[:2] == LAYERS and rule.path[2] in info.lora.targets:
      outputs, inputs = rule.transform.torch_shape(leaf.slot_shape)
      for name, shape in (('a', (info.lora.rank, inputs)), ('b', (outputs, info.lora.rank))):
        path = (ADAPTERS, 'layers', rule.path[2], name)
        of_torch = lambda x, name=name: x.reshape(-1, x.shape[-1]).T if name == 'a' else x.reshape(x.shape[0], -1).T
        read = lambda path=path, index=index, of_torch=of_torch: of_torch(own.slot(path, index))
        torch_key = f'{PREFIX}{key.removesuffix(".weight")}.lora_{name.upper()}.weight'
        plan.append(Out('', torch_key, shape, kept(path), read, ADAPTER_FILE))
  return plan


def adapter_config(info: CheckpointInfo) -> dict[str, Any]:
  """`adapter_config.json`. The modules are a pattern: their bare names would also mean those of the vision tower."""
  modules = '|'.join(
    f'{"mlp" if t in ("gate", "up", "down") else "self_attn"}\\.{t}_proj' for t in MATRICES if t in info.lora.targets
  )
  return {
    'base_model_name_or_path': info.base,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'init_lora_weights': True,
    'lora_alpha': int(info.lora.alpha) if info.lora.alpha == int(info.lora.alpha) else info.lora.alpha,
    'lora_dropout': info.lora.dropout,
    'modules_to_save': None,
    'peft_type': 'LORA',
    'r': info.lora.rank,
    'target_modules': rf'model\.layers\.\d+\.({modules})',
    'task_type': 'CAUSAL_LM',
  }


def adapter_files(info: CheckpointInfo) -> dict[str, bytes]:
  """What lies beside the tensors, by name."""
  return {'adapter_config.json': (json.dumps(adapter_config(info), indent=1) + '\n').encode()}
