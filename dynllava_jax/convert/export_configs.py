"""`config.json` and its companions for the way back to PyTorch."""

import dataclasses
import json
from typing import Any

from dynllava_jax import methods
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import ClipTextConfig, ExpertsTraining, LlamaConfig, ModelConfig, TokenPackerConfig, VisionConfig
from dynllava_jax.convert import brought, moe_llava
from dynllava_jax.data.tokenizer import load_tokenizer

IMAGE_TOKEN, PAD_TOKEN = '<image>', '<pad>'
VOCAB_MULTIPLE = 64  # transformers' conversion of LLaVA pads the embedding to this
UNPADDED = 'unpadded_vocab_size'  # our note in an exported config: rows from here on were added by the export
# Notes of ours for a TokenPacker that is not the one in the authors' code, which takes these from nowhere.
LEGACY_END = 2  # end token in OpenAI's CLIP configs, which is none of theirs; transformers then takes the largest id
PACKER_SCALE, PACKER_HEADS, PACKER_LEVELS = PACKER = 'scale_factor', 'tokenpacker_heads', 'tokenpacker_levels'
TOWER_TRAINED = 'unfreeze_mm_vision_tower'  # if true, LLaVA takes the tower from the checkpoint and not from mm_vision_tower
# What both layouts say of the language model and we do not know; in Hugging Face's it belongs to `text_config`.
SHARED = (
  'attention_dropout',
  'bos_token_id',
  'eos_token_id',
  'initializer_range',
  'max_position_embeddings',
  'pretraining_tp',
  'use_cache',
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The vocabulary in `LlavaForConditionalGeneration`, which embeds the image token.

  Attributes:
    own: rows of our embedding; rows: of theirs.
    image: id of the image token.
    added: the export adds it, and `<pad>` after it; otherwise it is among our rows already.
  """

  own: int
  rows: int
  image: int
  added: bool

  @property
  def pad(self) -> int:
    return self.image + 1


def carried_config(info: CheckpointInfo, layout: str, source: dict[str, Any]) -> dict[str, Any]:
  """What the config of the checkpoint that this one came from says beyond our description, in the terms of `layout`."""
  theirs = 'text_config' in source
  if theirs == (layout == 'llava-hf'):
    return source
  if not theirs:
    return {'text_config': {k: source[k] for k in SHARED if k in source}}
  text = {'max_position_embeddings': 2048} | (source['text_config'] or {})  # the default of transformers' LlamaConfig
  pad = text.get('pad_token_id', source.get('pad_token_id'))
  kept = {'pad_token_id': pad} if type(pad) is int and pad < info.model.llama.vocab_size else {}
  return {k: text[k] for k in SHARED if k in text} | kept


def has_vocabulary(tokenizer: dict[str, bytes]) -> bool:
  """Whether the files hold a tokenizer and not only settings of one."""
  return not tokenizer.keys().isdisjoint(('tokenizer.model', 'tokenizer.json', 'vocab.json'))


def vocabulary(info: CheckpointInfo, base: dict[str, Any], tokenizer: dict[str, bytes]) -> Vocabulary:
  """Where `<image>` and `<pad>` go: behind the tokenizer's tokens, in rows to spare or in new ones.

  Raises:
    ConfigError: the tokenizer is unreadable.
  """
  own = info.model.llama.vocab_size
  image = next((base[k] for k in ('image_token_index', 'image_token_id') if type(base.get(k)) is int), None)
  if image is not None and 0 <= image < own:
    return Vocabulary(own, own, image, added=False)
  if image is None or image < 0:
    image = len(load_tokenizer(tokenizer)) if has_vocabulary(tokenizer) else own
  rows = own if image + 2 <= own else -(-(image + 2) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
  return Vocabulary(own, rows, image, added=True)


def _rope(llama: LlamaConfig) -> dict[str, Any]:
  scaling = llama.rope_scaling
  if scaling is None:
    return {'rope_theta': llama.rope_theta, 'rope_scaling': None}
  fields: dict[str, Any] = {'type': scaling.kind, 'rope_type': scaling.kind, 'factor': scaling.factor}
  if scaling.kind == 'llama3':
    fields |= {
      'low_freq_factor': scaling.low_freq_factor,
      'high_freq_factor': scaling.high_freq_factor,
      'original_max_position_embeddings': scaling.original_max_positions,
    }
  return {'rope_theta': llama.rope_theta, 'rope_scaling': fields}


def _llama(llama: LlamaConfig, base: dict[str, Any], dtype: str) -> dict[str, Any]:
  """transformers' LlamaConfig; `base` holds what we do not know (lengths, token ids)."""
  base = {k: v for k, v in base.items() if k not in ('rope_parameters', 'dtype')}
  defaults = {'max_position_embeddings': 4096, 'bos_token_id': 1, 'eos_token_id': 2, 'hidden_act': 'silu', 'attention_bias': False}
  return (
    defaults
    | base
    | {
      'vocab_size': llama.vocab_size,
      'hidden_size': llama.hidden_size,
      'intermediate_size': llama.mlp_dim,
      'num_hidden_layers': llama.num_layers,
      'num_attention_heads': llama.num_heads,
      'num_key_value_heads': llama.num_kv_heads,
      'rms_norm_eps': llama.rms_norm_eps,
      'tie_word_embeddings': llama.tie_embeddings,
      'torch_dtype': dtype,
    }
    | _rope(llama)
  )


def clip_config(vision: VisionConfig, dtype: str, text: ClipTextConfig | None = None) -> dict[str, Any]:
  """transformers' CLIPVisionConfig; CLIPConfig of both towers with `text`."""
  if text is not None:
    of_text = {
      'model_type': 'clip_text_model',
      'vocab_size': text.vocab_size,
      'hidden_size': text.hidden_size,
      'intermediate_size': text.mlp_dim,
      'num_hidden_layers': text.num_layers,
      'num_attention_heads': text.num_heads,
      'max_position_embeddings': text.num_positions,
      'hidden_act': 'quick_gelu',
      'layer_norm_eps': text.layer_norm_eps,
      'eos_token_id': LEGACY_END if text.end_id is None else text.end_id,
      'projection_dim': text.embed_dim,
    }
    both = {'vision_config': clip_config(vision, dtype) | {'projection_dim': text.embed_dim}, 'text_config': of_text}
    return {'architectures': ['CLIPModel'], 'model_type': 'clip', 'projection_dim': text.embed_dim, 'torch_dtype': dtype} | both
  return {
    'architectures': ['CLIPVisionModel'],
    'model_type': 'clip_vision_model',
    'hidden_act': 'quick_gelu',
    'hidden_size': vision.hidden_size,
    'image_size': vision.image_size,
    'intermediate_size': vision.mlp_dim,
    'layer_norm_eps': vision.layer_norm_eps,
    'num_attention_heads': vision.num_heads,
    'num_channels': 3,
    'num_hidden_layers': vision.num_layers,
    'patch_size': vision.patch_size,
    'projection_dim': 768,
    'torch_dtype': dtype,
  }


def preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
  """transformers' CLIPImageProcessor, as published with CLIP ViT-L/14-336."""
  size = vision.image_size
  return {
    'image_processor_type': 'CLIPImageProcessor',
    'crop_size': {'height': size, 'width': size},
    'do_center_crop': True,
    'do_convert_rgb': True,
    'do_normalize': True,
    'do_rescale': True,
    'do_resize': True,
    'image_mean': list(vision.image_mean),
    'image_std': list(vision.image_std),
    'resample': 3,
    'rescale_factor': 1 / 255,
    'size': {'shortest_edge': size},
  }


def processor_config(vision: VisionConfig) -> dict[str, Any]:
  """transformers' LlavaProcessor, which counts CLIP's class token in and takes it off again."""
  return {
    'processor_class': 'LlavaProcessor',
    'image_token': IMAGE_TOKEN,
    'num_additional_image_tokens': 1,
    'patch_size': vision.patch_size,
    'vision_feature_select_strategy': 'default',
  }


def llava_hf_config(info: CheckpointInfo, base: dict[str, Any], dtype: str, vocab: Vocabulary) -> dict[str, Any]:
  """transformers' LlavaConfig; `base` as `carried_config` gives it."""
  model = info.model
  ids = {'image_token_index': vocab.image} | ({'pad_token_id': vocab.pad} if vocab.added else {})
  text = _llama(model.llama, base.get('text_config') or {}, dtype) | {'model_type': 'llama', 'vocab_size': vocab.rows}
  base = {k: v for k, v in base.items() if k not in ('dtype', 'image_token_id', UNPADDED)}
  return (
    {'ignore_index': -100, 'projector_hidden_act': 'gelu', 'vision_feature_select_strategy': 'default'}
    | base
    | ids
    | {
      'architectures': ['LlavaForConditionalGeneration'],
      'model_type': 'llava',
      'image_aspect_ratio': info.image_aspect,  # not one of transformers' entries; read back here
      'image_seq_length': methods.num_image_tokens(model),
      'tie_word_embeddings': model.llama.tie_embeddings,
      'torch_dtype': dtype,
      'vision_feature_layer': model.vision.select_layer,
      'text_config': text,
      'vision_config': clip_config(model.vision, dtype),
    }
    | ({UNPADDED: vocab.own} if vocab.rows > vocab.own else {})
  )


def llava_config(info: CheckpointInfo, base: dict[str, Any], dtype: str, tower: str) -> dict[str, Any]:
  """The authors' config of LLaVA or, if the model has predictors, Dynamic-LLaVA.

  Args:
    info: the model.
    base: as `carried_config` gives it.
    dtype: of the stored weights.
    tower: where the CLIP directory is.
  """
  model = info.model
  kinds = ('llava', 'llava_llama') if model.predictor is None else ('llava_llama', 'dynamic_llava_llama')
  config = (
    {
      'mm_patch_merge_type': 'flat',
      'mm_use_im_patch_token': False,
      'mm_use_im_start_end': False,
      'mm_vision_select_feature': 'patch',
      'pad_token_id': 0,
      'use_mm_proj': True,
    }
    | {k: v for k, v in base.items() if k not in ('sparse_config', 'architectures', *PACKER, *brought.KEYS.values())}
    | {
      'image_aspect_ratio': info.image_aspect,
      'model_type': base['model_type'] if base.get('model_type') in kinds else 'llava_llama',  # Vicuna's is another
      'mm_hidden_size': model.vision.hidden_size,
      'mm_projector_type': model.projector,
      'mm_vision_select_layer': model.vision.select_layer,
      'mm_vision_tower': tower,
      TOWER_TRAINED: False,  # the tower is not among the main weights
    }
  )
  config = _llama(model.llama, config | _packer(model) | brought.written(model), dtype)
  if model.llama.experts is not None:
    learned = ExpertsTraining()
    return moe_llava.config_of(model, config, learned.balance_weight, learned.capacity_factor)
  if model.predictor is None:
    return config | {'architectures': ['LlavaLlamaForCausalLM']}
  sparse = base.get('sparse_config') or {}
  stage = next(s for s in info.stages if s.selector == 'dynamic')
  return config | {
    'architectures': ['DynamicLlavaLlamaForCausalLM'],
    'sparse_config': sparse
    | {
      'd_model': model.predictor.d_model,
      'dim_feedforward': model.predictor.mlp_dim,
      'instruct_keep_rate': info.sparsity.instruct_keep_rate,
      'instruct_len_for_training': info.sparsity.min_instruct_len,
      'mask_loss_weight': info.sparsity.mask_loss_weight,
      'nhead': model.predictor.num_heads,
      'num_layers': model.predictor.num_layers,
      'output_text_keep_rate': info.sparsity.text_keep_rate,
      'output_text_len_for_training': info.sparsity.min_answer_len,
      'sparse_layer': stage.start,
      'use_instruct_predictor': model.predictor.instruct,
      'use_output_text_predictor': True,
      'use_text_predictor': True,
      'use_vision_predictor': True,
      'vision_keep_rate': stage.image_keep_rate,
    },
  }


def _packer(model: ModelConfig) -> dict[str, Any]:
  """What the authors' config says of a TokenPacker, and our notes where it differs from theirs."""
  packer, published = model.packer, TokenPackerConfig()
  if packer is None:
    return {}
  notes = {PACKER_LEVELS: list(packer.levels)} if packer.levels != published.levels else {}
  if packer.num_heads * VisionConfig().hidden_size != published.num_heads * model.vision.hidden_size:
    notes[PACKER_HEADS] = packer.num_heads
  return {PACKER_SCALE: packer.scale_factor} | notes


def tokenizer_files(vocab: Vocabulary, assets: dict[str, bytes]) -> dict[str, bytes]:
  """The tokenizer's JSON files with `<image>` and `<pad>` added."""
  added = {IMAGE_TOKEN: vocab.image, PAD_TOKEN: vocab.pad}
  config = json.loads(assets.get('tokenizer_config.json', b'{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}'))
  plain = {'lstrip': False, 'normalized': False, 'rstrip': False, 'single_word': False, 'special': True}
  decoder = config.get('added_tokens_decoder', {}) | {str(i): plain | {'content': t} for t, i in added.items()}
  config |= {'added_tokens_decoder': decoder, 'pad_token': PAD_TOKEN}
  known = json.loads(assets.get('added_tokens.json', b'{}'))
  return {
    'tokenizer_config.json': json.dumps(config, indent=1).encode(),
    'added_tokens.json': json.dumps(known | added, indent=1).encode(),
  }
