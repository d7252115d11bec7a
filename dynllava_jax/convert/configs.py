"""`config.json` of each layout -> our description of the model; what cannot be honoured is refused."""

import dataclasses
import pathlib
from typing import Any

from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import (
  CLIP_MEAN,
  CLIP_STD,
  DENSE,
  ClipTextConfig,
  ConfigError,
  ModelConfig,
  Piece,
  PredictorConfig,
  SparsityConfig,
  Stage,
  TokenPackerConfig,
  VisionConfig,
  check_stages,
  from_config_dict,
  to_dict,
)
from dynllava_jax.convert import brought
from dynllava_jax.convert.beside import check_images, image_settings
from dynllava_jax.convert.export_configs import LEGACY_END, PACKER_HEADS, PACKER_LEVELS, UNPADDED
from dynllava_jax.convert.inputs import ConversionError, nested
from dynllava_jax.convert.layouts import Layout
from dynllava_jax.convert.mixture_of_depths import MOD_LAYERS, routers_and_stages
from dynllava_jax.convert.moe_llava import experts_of

# Hugging Face leaves out of `text_config` and `vision_config` what equals the defaults of transformers' LlamaConfig and
# CLIPVisionConfig. These are they.
LLAMA_DEFAULTS = dict(
  vocab_size=32000,
  hidden_size=4096,
  intermediate_size=11008,
  num_hidden_layers=32,
  num_attention_heads=32,
  rms_norm_eps=1e-6,
)
CLIP_DEFAULTS = dict(
  hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=32
)
# The same of CLIPTextConfig, and of CLIPConfig's projection.
CLIP_TEXT_DEFAULTS = dict(
  vocab_size=49408,
  hidden_size=512,
  intermediate_size=2048,
  num_hidden_layers=12,
  num_attention_heads=8,
  max_position_embeddings=77,
  eos_token_id=49407,
  projection_dim=512,
)
# What of a decoder its tensors do not tell, or not all of it.
ARITHMETIC = (
  'hidden_size',
  'num_hidden_layers',
  'num_attention_heads',
  'num_key_value_heads',
  'head_dim',
  'hidden_act',
  'rms_norm_eps',
  'rope_theta',
  'rope_scaling',
  'rope_parameters',
  'tie_word_embeddings',
)
ROPE_NEEDS = {
  'linear': ('factor',),
  'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
}
PACKER_HEAD_DIM = 128  # of TokenPacker's attention
LLAVA_TOWER = dict(
  hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
)
# Towers that LLaVA's configs name by their place on the hub; used if only their weights are at hand.
PUBLISHED_TOWERS = {
  'openai/clip-vit-large-patch14-336': VisionConfig(),
  'openai/clip-vit-large-patch14': VisionConfig(image_size=224),
}


def model_info(file: pathlib.Path, layout: Layout, config: dict[str, Any], vision: VisionConfig | None) -> CheckpointInfo:
  """Model, stage list and objective.

  Args:
    file: the config's path, for messages; layout, config: from `layouts.detect`.
    vision: the tower, if it is not part of `config`.

  Raises:
    ConversionError: a missing key, or something this model does not have.
  """
  hf = layout is Layout.LLAVA_HF
  try:
    text = text_config(file, layout, config)
    sparse = nested(file, config, 'sparse_config')
    _refuse(file, layout, config, text, sparse)
    llama = dict(
      vocab_size=_own_rows(file, config, text['vocab_size']),
      hidden_size=text['hidden_size'],
      mlp_dim=text['intermediate_size'],
      num_layers=text['num_hidden_layers'],
      num_heads=text['num_attention_heads'],
      num_kv_heads=text['num_attention_heads'] if text.get('num_key_value_heads') is None else text['num_key_value_heads'],
      rms_norm_eps=text['rms_norm_eps'],
      **_rope(file, text),
      tie_embeddings=tied(file, config),
      experts=experts_of(file, config) if layout is Layout.MOE_LLAVA else None,
    )
    projector = 'mlp2x_gelu' if hf else config.get('mm_projector_type', 'linear')
    model = dict(vision=to_dict(vision), llama=llama, projector=projector)
    if projector == 'tokenpacker':
      model['packer'] = _packer(config, vision)
    whole = dict(image_aspect=_aspect(file, layout, config), unused_vision_layers=True)
    model |= brought.described(config)
    if MOD_LAYERS in config:
      model['routers'], whole['stages'] = routers_and_stages(file, config, llama['num_layers'])
    if 'pruning' in model:
      whole['stages'] = (Stage(layers=Piece('dynamic_context_pruning')),)
    if not sparse:
      return CheckpointInfo(model=from_config_dict(ModelConfig, model, 'model'), **whole)
    width = sparse['d_model']
    predictor = dict(
      d_model=width,
      num_heads=sparse['nhead'],
      num_layers=sparse['num_layers'],
      mlp_dim=sparse['dim_feedforward'],
      instruct=bool(sparse.get('use_instruct_predictor')),
    )
    from_config_dict(PredictorConfig, predictor, 'sparse_config')
    model['predictor'] = predictor | {'mlp_dim': int(width * (predictor['mlp_dim'] / width))}  # the authors' rounding
    sparsity = dict(
      image_keep_rate=sparse['vision_keep_rate'],
      text_keep_rate=sparse['output_text_keep_rate'],
      mask_loss_weight=sparse['mask_loss_weight'],
      min_answer_len=sparse['output_text_len_for_training'],
    )
    of_instructions = {'instruct_keep_rate': 'instruct_keep_rate', 'instruct_len_for_training': 'min_instruct_len'}
    sparsity |= {ours: sparse[theirs] for theirs, ours in of_instructions.items() if theirs in sparse}
    sparsity = from_config_dict(SparsityConfig, sparsity, 'sparse_config')
    model = from_config_dict(ModelConfig, model, 'model')
    stages = dynamic_stages(model, sparse['sparse_layer'], sparsity.image_keep_rate, model.predictor.instruct)
    return CheckpointInfo(model=model, stages=stages, sparsity=sparsity, **whole)
  except KeyError as e:
    raise ConversionError(f'{file}: key {e} is missing') from None
  except (TypeError, ValueError) as e:  # ConfigError is a ValueError
    raise ConversionError(f'{file}: {e}') from None


def text_config(file: pathlib.Path, layout: Layout, config: dict[str, Any]) -> dict[str, Any]:
  """The entries that describe the language model."""
  _require_group(file, config, 'text_config')
  return LLAMA_DEFAULTS | nested(file, config, 'text_config') if layout is Layout.LLAVA_HF else config


def _require_group(file: pathlib.Path, config: dict[str, Any], key: str) -> None:
  """ConversionError for a group that is null; what is not in it has defaults, which are never meant by that."""
  if key in config and config[key] is None:
    raise ConversionError(f'{file}: {key} is null, expected an object with named entries')


def tied(file: pathlib.Path, config: dict[str, Any]) -> bool:
  """Whether the output head is the embedding."""
  return bool(config.get('tie_word_embeddings') or nested(file, config, 'text_config').get('tie_word_embeddings'))


def _packer(config: dict[str, Any], vision: VisionConfig) -> dict[str, Any]:
  """Fields of `TokenPackerConfig`. The authors' configs say the scale alone; the rest is fixed in their code, for ViT-L/14."""
  heads = config.get(PACKER_HEADS, vision.hidden_size // PACKER_HEAD_DIM)
  if PACKER_HEADS not in config and vision.hidden_size % PACKER_HEAD_DIM:
    raise ValueError(
      f'tokenpacker: its attention has heads of {PACKER_HEAD_DIM} numbers, of which the tower has {vision.hidden_size}; '
      f'say in {PACKER_HEADS} how many heads there are'
    )
  return dict(scale_factor=config['scale_factor'], levels=config.get(PACKER_LEVELS, TokenPackerConfig().levels), num_heads=heads)


def check_same_arithmetic(base_file: pathlib.Path, base: dict[str, Any], file: pathlib.Path, config: dict[str, Any]) -> None:
  """ConversionError if the config beside an adapter or projector and that of its base describe two decoders."""
  for key in ARITHMETIC:
    if key in base and key in config and base[key] != config[key]:
      raise ConversionError(f'{file}: {key} is {config[key]!r}, but {base[key]!r} in {base_file}; is it the base of this adapter?')


def _aspect(file: pathlib.Path, layout: Layout, config: dict[str, Any]) -> str:
  """How pictures are made square; LLaVA leaves it to CLIP's processor, which cuts the middle out, unless the config says `pad`."""
  # Hugging Face's layout and a bare LLaMA have no such entry; LLaVA-1.5 saw padded pictures.
  stated = config.get('image_aspect_ratio', 'pad' if layout in (Layout.LLAVA_HF, Layout.LLAMA) else None)
  if stated not in ('pad', 'square', None):
    raise ConversionError(f'{file}: image_aspect_ratio is {stated!r}, expected pad or square')
  return stated or 'square'


def _own_rows(file: pathlib.Path, config: dict[str, Any], rows: int) -> int:
  """How many of the vocabulary's `rows` are the model's own: an export may have added some."""
  own = config.get(UNPADDED, rows)
  if own != rows and not (type(own) is type(rows) is int and 0 < own < rows):
    raise ConversionError(f'{file}: {UNPADDED} is {own!r}, expected a whole number from 1 to vocab_size ({rows!r})')
  return own


def dynamic_stages(model: ModelConfig, start: int, image_keep_rate: float, instruct: bool = False) -> tuple[Stage, ...]:
  """Dense layers up to `start`, dynamic ones from there; whether they judge instructions."""
  fields = dict(start=start, selector='dynamic', image_keep_rate=image_keep_rate, options={'instruct': True} if instruct else {})
  cut = from_config_dict(Stage, fields, 'sparse_layer')
  stages = (*(DENSE if start else ()), cut)
  check_stages(stages, model)
  return stages


def _rope(file: pathlib.Path, text: dict[str, Any]) -> dict[str, Any]:
  """Fields of `LlamaConfig`: `rope_theta` and `rope_scaling` to transformers 4, `rope_parameters` since 5."""
  told: dict[str, tuple[str, Any]] = {}
  for group in ('', 'rope_scaling', 'rope_parameters'):
    entries = nested(file, text, group) if group else {k: text.get(k) for k in ('rope_theta', 'partial_rotary_factor')}
    for name, value in entries.items():
      name, where = 'rope_type' if name == 'type' else name, f'{group}.{name}'.lstrip('.')
      if value is None:
        continue
      if name in told and told[name][1] != value:
        raise ValueError(f'{told[name][0]} is {told[name][1]!r}, but {where} {value!r}; remove the one that is not meant')
      told[name] = where, value
  rope = {name: value for name, (_, value) in told.items()}
  theta, kind = rope.get('rope_theta', 10000.0), rope.get('rope_type', 'default')
  if rope.get('partial_rotary_factor', 1) != 1:
    raise ValueError(f'not supported: partial_rotary_factor {rope["partial_rotary_factor"]!r}, only whole heads are rotated')
  if kind == 'default':
    return dict(rope_theta=theta)
  if kind in ROPE_NEEDS and (absent := [name for name in ROPE_NEEDS[kind] if name not in rope]):
    raise ValueError(f'rope_scaling of type {kind!r} lacks {", ".join(absent)}, and no number is meant by that; get the file again')
  if kind == 'linear':
    return dict(rope_theta=theta, rope_scaling=dict(kind=kind, factor=rope['factor']))
  if kind == 'llama3':
    scaling = dict(
      kind=kind,
      factor=rope['factor'],
      low_freq_factor=rope['low_freq_factor'],
      high_freq_factor=rope['high_freq_factor'],
      original_max_positions=rope['original_max_position_embeddings'],
    )
    return dict(rope_theta=theta, rope_scaling=scaling)
  hint = '; its frequencies change with the length of each sequence, so cached keys go stale' if kind == 'dynamic' else ''
  raise ValueError(f'not supported: rope_scaling of type {kind!r}{hint}; default, linear and llama3 are')


def _refuse(file: pathlib.Path, layout: Layout, config: dict[str, Any], text: dict[str, Any], sparse: dict[str, Any]) -> None:
  """ConversionError for what would silently be computed wrong."""
  heads, width, head = (text.get(k) for k in ('num_attention_heads', 'hidden_size', 'head_dim'))
  problems = {
    f'hidden_act {text.get("hidden_act")!r} (only silu)': text.get('hidden_act', 'silu') != 'silu',
    'attention_bias': bool(text.get('attention_bias')),
    'mlp_bias': bool(text.get('mlp_bias')),
    'head_dim other than hidden_size / heads': head is not None and head * heads != width,
    'any-resolution images': str(config.get('image_aspect_ratio')).startswith('anyres') or bool(config.get('image_grid_pinpoints')),
    'a quantization_config': bool(config.get('quantization_config')) and layout is not Layout.LORA,
    "feature select 'cls_patch'": config.get('mm_vision_select_feature', 'patch') != 'patch',
    "vision_feature_select_strategy other than 'default'": config.get('vision_feature_select_strategy', 'default') != 'default',
    'projector_hidden_act other than gelu': config.get('projector_hidden_act', 'gelu') != 'gelu',
    'a projector without bias': not config.get('multimodal_projector_bias', True),
    'the image marks <im_start> and <im_end>': bool(config.get('mm_use_im_start_end')),
    'a sparse config without vision predictor': bool(sparse) and not sparse.get('use_vision_predictor', True),
    'a sparse config without output text predictor': bool(sparse) and not sparse.get('use_output_text_predictor', True),
  }
  found = [name for name, present in problems.items() if present]
  if found:
    raise ConversionError(f'{file}: not supported: {", ".join(found)}')


def select_layer(file: pathlib.Path, layout: Layout, config: dict[str, Any], vision: VisionConfig) -> VisionConfig:
  """The tower with the layer whose features LLaVA's own config, `file`, asks for."""
  key = 'vision_feature_layer' if layout is Layout.LLAVA_HF else 'mm_vision_select_layer'
  layer = config.get(key, vision.select_layer)
  if layout is Layout.LLAVA_HF and isinstance(layer, list) and len(layer) == 1:  # transformers joins the features of all it lists
    layer = layer[0]
  if type(layer) is not int:
    raise ConversionError(f'{file}: {key} is {layer!r}, expected one whole number')
  try:
    return dataclasses.replace(vision, select_layer=layer)
  except ConfigError as e:
    raise ConversionError(f'{file}: {key}: {e}') from None


def clip_text_config(file: pathlib.Path, config: dict[str, Any]) -> ClipTextConfig:
  """The text tower that the config of a whole CLIP model, `file`, describes; ConversionError if it is none that can be run."""
  _require_group(file, config, 'text_config')
  text = CLIP_TEXT_DEFAULTS | nested(file, config, 'text_config')
  if text.get('hidden_act', 'quick_gelu') != 'quick_gelu':
    raise ConversionError(f'{file}: text_config.hidden_act {text["hidden_act"]!r} is not supported, only quick_gelu')
  fields = dict(
    vocab_size=text['vocab_size'],
    hidden_size=text['hidden_size'],
    mlp_dim=text['intermediate_size'],
    num_layers=text['num_hidden_layers'],
    num_heads=text['num_attention_heads'],
    num_positions=text['max_position_embeddings'],
    embed_dim=config.get('projection_dim', CLIP_TEXT_DEFAULTS['projection_dim']),
    end_id=None if text['eos_token_id'] == LEGACY_END else text['eos_token_id'],
    layer_norm_eps=text.get('layer_norm_eps', 1e-5),
  )
  try:
    return from_config_dict(ClipTextConfig, fields, 'clip_text')
  except ConfigError as e:
    raise ConversionError(f'{file}: text_config: {e}') from None


def vision_config(file: pathlib.Path, config: dict[str, Any]) -> VisionConfig:
  """The tower that a CLIP config (or the `vision_config` inside a larger one) describes.

  Args:
    file: the config's path, for messages and for the image processor's settings beside it; config: its content.
  """
  _require_group(file, config, 'vision_config')
  if 'vision_config' in config:
    config = CLIP_DEFAULTS | nested(file, config, 'vision_config')
  kind = config.get('model_type', 'clip_vision_model')
  if kind not in ('clip_vision_model', 'clip'):
    raise ConversionError(f'{file}: vision tower {kind!r} is not supported, only CLIP')
  if config.get('hidden_act', 'quick_gelu') != 'quick_gelu':
    raise ConversionError(f'{file}: hidden_act {config["hidden_act"]!r} is not supported, only quick_gelu')
  images, norm = image_settings(file.parent)
  for key in ('image_mean', 'image_std'):
    given = norm.get(key)
    if given is not None and not (isinstance(given, list) and len(given) == 3 and all(type(x) in (int, float) for x in given)):
      raise ConversionError(f'{images}: {key} is {given!r}, expected three numbers')
  try:
    fields = dict(
      image_size=config['image_size'],
      patch_size=config['patch_size'],
      hidden_size=config['hidden_size'],
      mlp_dim=config['intermediate_size'],
      num_layers=config['num_hidden_layers'],
      num_heads=config['num_attention_heads'],
      layer_norm_eps=config.get('layer_norm_eps', 1e-5),
      image_mean=norm.get('image_mean') or CLIP_MEAN,
      image_std=norm.get('image_std') or CLIP_STD,
    )
    vision = from_config_dict(VisionConfig, fields, 'vision')
  except KeyError as e:
    raise ConversionError(f'{file}: key {e} is missing') from None
  except ConfigError as e:
    raise ConversionError(f'{file}: {e}') from None
  check_images(images, norm, file, vision)
  return vision
