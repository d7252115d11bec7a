"""The layouts that LLaVA checkpoints come in: how each is recognised, and its names for the tensors.

Inside the converter every tensor has one name, the authors' (`model.layers.0...`, `model.mm_projector.0.weight`,
`model.image_score_predictor...`), and for the tower CLIP's (`vision_model...`).
"""

import enum
import pathlib
import re
from typing import Any

from dynllava_jax.convert import moe_llava
from dynllava_jax.convert.inputs import ConversionError, nested, read_json


class Layout(enum.Enum):
  """What a directory of PyTorch weights is; the value is what people call it."""

  LLAVA = 'LLaVA (the authors)'
  DYNAMIC_LLAVA = 'Dynamic-LLaVA (the authors)'
  LLAVA_HF = 'LlavaForConditionalGeneration (Hugging Face)'
  MOE_LLAVA = 'MoE-LLaVA (the authors)'
  LORA = 'LoRA adapter'
  LLAMA = 'LLaMA, text only'
  CLIP = 'CLIP'


P_MOD = 'pmod_llava_llama'  # model_type
ADAPTER_CONFIG = 'adapter_config.json'
ROTARY = '.rotary_emb.inv_freq'  # a buffer that transformers before 4.32 saved
POSITION_IDS = '.embeddings.position_ids'  # another one
TOWER_COPY = 'model.vision_tower.vision_tower.'
CLIP_TEXT = ('text_model.', 'text_projection.', 'visual_projection.')
ROUTED = '.decoder_layer.'  # p-MoD's layers with a router hold the layer itself by this name
SCALE = 'logit_scale'  # of CLIP's loss
TOWER_PARTS = ('embeddings.', 'pre_layrnorm.', 'encoder.', 'post_layernorm.')

# Hugging Face's names, as transformers 4.36 to 5.x wrote them, to the authors'. `model.` stands in front of the first
# three since 4.52 in memory and in some files; `vision_model.` went away in 5.0.
_HF = [
  (re.compile(r'(?:model\.)?vision_tower\.(?:vision_model\.)?(.*)'), r'vision_model.\1'),
  (re.compile(r'(?:model\.)?multi_modal_projector\.linear_1\.(.*)'), r'model.mm_projector.0.\1'),
  (re.compile(r'(?:model\.)?multi_modal_projector\.linear_2\.(.*)'), r'model.mm_projector.2.\1'),
  (re.compile(r'language_model\.(lm_head\..*)'), r'\1'),
  (re.compile(r'(?:model\.)?language_model\.(?:model\.)?(.*)'), r'model.\1'),
]
# The other way, in the spelling that every version of transformers reads.
_TO_HF = [
  (re.compile(r'vision_model\.(.*)'), r'vision_tower.vision_model.\1'),
  (re.compile(r'model\.mm_projector\.0\.(.*)'), r'multi_modal_projector.linear_1.\1'),
  (re.compile(r'model\.mm_projector\.2\.(.*)'), r'multi_modal_projector.linear_2.\1'),
  (re.compile(r'(model\..*|lm_head\..*)'), r'language_model.\1'),
]
_REFUSED = {
  'llava_next': 'LLaVA-NeXT (any-resolution images)',
  'llava_onevision': 'LLaVA-OneVision (any-resolution images)',
  'llava_next_video': 'LLaVA-NeXT-Video',
  'llava_mpt': 'LLaVA on MPT',
  'llava_mistral': 'LLaVA on Mistral',
  'llava_mixtral': 'LLaVA on Mixtral',
  'llava_qwen': 'LLaVA on Qwen',
  'llava_gemma': 'LLaVA on Gemma',
  'moe_llava_phi': 'MoE-LLaVA on Phi',
  'moe_llava_qwen': 'MoE-LLaVA on Qwen',
  'moe_llava_stablelm': 'MoE-LLaVA on StableLM',
  'moe_llava_mistral': 'MoE-LLaVA on Mistral',
  'moe_llava_minicpm': 'MoE-LLaVA on MiniCPM',
  'vipllava': 'ViP-LLaVA',
  'video_llava': 'Video-LLaVA',
}


def _translate(key: str, table: list[tuple[re.Pattern, str]]) -> str:
  for pattern, name in table:
    if found := pattern.fullmatch(key):
      return found.expand(name)
  return key


def canonical(layout: Layout, key: str) -> str | None:
  """The converter's name for `key`; None for what is passed over (buffers)."""
  if key.endswith((ROTARY, POSITION_IDS)):
    return None
  match layout:
    case Layout.LLAVA_HF:
      return _translate(key, _HF)
    case Layout.CLIP:
      if key == SCALE:
        return None
      return f'vision_model.{key}' if key.startswith(TOWER_PARTS) else key
    case Layout.LORA:
      key = peft_name(key)
      key = key if key.startswith(TOWER_COPY) else _translate(key, _HF)
  key = key.replace(ROUTED, '.')
  if layout is Layout.MOE_LLAVA:
    key = moe_llava.as_llava(key)
  if key.startswith(TOWER_COPY):
    tower = key.removeprefix(TOWER_COPY)
    return f'vision_model.{tower}' if tower.startswith(TOWER_PARTS) else tower
  return key


def peft_name(key: str) -> str:
  """The name that a tensor of an adapter, or of `non_lora_trainables.bin`, has in the model that was trained."""
  key = key.removeprefix('base_model.model.').removeprefix('base_model.')
  return (
    key.removeprefix('model.') if key.startswith(('model.model.', 'model.lm_head.')) else key
  )  # as LLaVA's training leaves some


def spellings(layout: Layout, key: str) -> tuple[str, ...]:
  """What a model of a layout has called the tensor that is `key` to the converter, the newest name first."""
  if layout is not Layout.LLAVA_HF:
    tower = key.removeprefix('vision_model.')
    return (key,) if tower == key else (f'{TOWER_COPY}{key}', f'{TOWER_COPY}{tower}')
  old = to_llava_hf(key)
  new = (
    old.removeprefix('language_model.') if 'lm_head' in key else f'model.{old.replace("language_model.model.", "language_model.")}'
  )
  return tuple(dict.fromkeys((new.replace('vision_tower.vision_model.', 'vision_tower.'), new, old)))


def to_llava_hf(key: str) -> str:
  """Hugging Face's name of one of our tensors."""
  return _translate(key, _TO_HF)


def detect(directory: pathlib.Path) -> tuple[Layout, dict[str, Any]]:
  """(layout, config.json) of a directory.

  Raises:
    ConversionError: not a checkpoint, or one of a model that this project does not have.
  """
  if not directory.is_dir():
    raise ConversionError(f'{directory}: {"not a directory" if directory.exists() else "missing"}; expected a checkpoint directory')
  if (directory / ADAPTER_CONFIG).exists():
    config = read_json(directory / 'config.json') if (directory / 'config.json').exists() else {}
    return Layout.LORA, config
  file = directory / 'config.json'
  config = read_json(file)
  kind = str(config.get('model_type', ''))
  text = str(nested(file, config, 'text_config').get('model_type', 'llama'))
  if kind in _REFUSED:
    raise ConversionError(f'{file}: model_type {kind!r}, {_REFUSED[kind]}, is not supported; only LLaVA-1.5 on LLaMA is')
  if kind in ('clip', 'clip_vision_model'):
    return Layout.CLIP, config
  if 'text_config' in config and kind == 'llava':
    if text != 'llama':
      raise ConversionError(f'{file}: text_config.model_type {text!r} is not supported; only LLaVA-1.5 on LLaMA is')
    return Layout.LLAVA_HF, config
  if kind in ('llava', 'llava_llama', 'dynamic_llava_llama', P_MOD):
    return (Layout.DYNAMIC_LLAVA if config.get('sparse_config') else Layout.LLAVA), config
  if kind == moe_llava.MODEL_TYPE:
    return Layout.MOE_LLAVA, moe_llava.as_llava_config(file, config)
  if kind == 'llama':
    return Layout.LLAMA, config
  raise ConversionError(f'{file}: model_type {kind!r} is not supported; only LLaVA-1.5 on LLaMA, LLaMA and CLIP are')
