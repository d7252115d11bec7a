"""MoE-LLaVA checkpoints on LLaMA (PKU-YuanGroup/MoE-LLaVA 24bcef9): what their config says otherwise than LLaVA's, and their names.

Gating of their code samples the second expert in use too, and drops tokens by the load of a batch; here neither happens, see
docs/methods.md.
"""

import pathlib
from typing import Any

from dynllava_jax.config import ExpertsConfig, ModelConfig
from dynllava_jax.convert.inputs import ConversionError, nested

MODEL_TYPE = 'moe_llava_llama'
# Their names of LLaVA's settings.
SETTINGS = {'mm_image_tower': 'mm_vision_tower', 'image_projector_type': 'mm_projector_type'}
# Their names of LLaVA's tensors.
TENSORS = {
  'model.image_tower.image_tower.': 'model.vision_tower.vision_tower.',
  'model.mm_projector.image_spatial_proj.': 'model.mm_projector.',
}


def as_llava(key: str) -> str:
  """LLaVA's name of one of their tensors."""
  theirs = next((name for name in TENSORS if key.startswith(name)), None)
  return key if theirs is None else TENSORS[theirs] + key.removeprefix(theirs)


def from_llava(key: str) -> str:
  """Their name of one of LLaVA's tensors."""
  theirs = next((name for name, ours in TENSORS.items() if key.startswith(ours)), None)
  return key if theirs is None else theirs + key.removeprefix(TENSORS[theirs])


def as_llava_config(file: pathlib.Path, config: dict[str, Any]) -> dict[str, Any]:
  """The config with LLaVA's names; ConversionError if it has a tower for films."""
  if config.get('mm_video_tower'):
    raise ConversionError(f'{file}: not supported: mm_video_tower {config["mm_video_tower"]!r}, only pictures are')
  return {SETTINGS.get(name, name): value for name, value in config.items()}


def experts_of(file: pathlib.Path, config: dict[str, Any]) -> dict[str, Any] | None:
  """Fields of `ExpertsConfig`; None for a config without experts.

  Raises:
    ConversionError: layers with different numbers of experts, or a dense MLP beside them.
  """
  moe = nested(file, config, 'moe')
  if not moe or not moe.get('moe_enable', True):
    return None
  for name in ('moe_layers_idx', 'num_experts'):
    if not isinstance(moe.get(name), list) or not all(type(n) is int for n in moe[name]):
      raise ConversionError(f'{file}: moe.{name} is {moe.get(name)!r}, expected a list of whole numbers')
  layers, counts = moe['moe_layers_idx'], sorted(set(moe['num_experts']))
  if len(counts) != 1:
    raise ConversionError(f'{file}: moe.num_experts is {moe["num_experts"]}, expected the same number in all layers')
  if moe.get('use_residual'):
    raise ConversionError(f'{file}: not supported: moe.use_residual, a dense MLP beside the experts')
  return dict(layers=tuple(sorted(layers)), count=counts[0], top_k=moe.get('top_k_experts', 2))


def config_of(model: ModelConfig, config: dict[str, Any], balance_weight: float, factor: float) -> dict[str, Any]:
  """LLaVA's `config` as theirs for a model with experts.

  Args:
    model, config: what is exported.
    balance_weight, factor: of the objective, see `ExpertsTraining`.
  """
  cfg: ExpertsConfig = model.llama.experts
  back = {ours: theirs for theirs, ours in SETTINGS.items()}
  moe = {
    'moe_enable': True,
    'moe_mode': 'custom',
    'moe_layers_idx': list(cfg.layers),
    'ep_size': 1,
    'num_experts': [cfg.count] * len(cfg.layers),
    'top_k_experts': cfg.top_k,
    'capacity_factor': factor,
    'eval_capacity_factor': cfg.count / cfg.top_k,  # at which nothing is dropped
    'min_capacity': 0,
    'use_residual': False,
    'router_aux_loss_coef': balance_weight,
    'train_modules': [],
  }
  whole = {back.get(name, name): value for name, value in config.items()}
  return whole | {'architectures': ['EvalMoELLaVALlamaForCausalLM'], 'model_type': MODEL_TYPE, 'mm_video_tower': None, 'moe': moe}
