"""What lies beside the weights - image processor, tokenizer - against the model that the config describes."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from dynllava_jax.config import VisionConfig
from dynllava_jax.convert.inputs import ConversionError, nested, read_json

IMAGES, PROCESSOR = 'preprocessor_config.json', 'processor_config.json'
# What CLIP's image processor does, and this project: scale the shorter side, cut out the middle, 1/255, normalise.
STEPS = ('do_resize', 'do_center_crop', 'do_rescale', 'do_normalize')
BICUBIC = 3
KINDS = ('CLIP', 'Llava')  # beginnings of processors' names
# Settings that decide about pixels; two descriptions of one processor must agree on them.
DECISIVE = (*STEPS, 'size', 'crop_size', 'resample', 'rescale_factor', 'image_mean', 'image_std')


def image_settings(directory: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
  """(file, settings of the image processor, {} if there are none): a file to transformers 4, a group of the processor's since 5.

  Raises:
    ConversionError: both are there and say different things.
  """
  file, group = directory / IMAGES, directory / PROCESSOR
  alone = read_json(file) if file.exists() else {}
  inside = nested(group, read_json(group), 'image_processor') if group.exists() else {}
  for key in DECISIVE:
    if key in alone and key in inside and alone[key] != inside[key]:
      raise ConversionError(
        f'{file}: {key} is {alone[key]!r}, but {inside[key]!r} in the image_processor of {group}; remove the one that is not meant'
      )
  return (group, inside) if inside else (file, alone)  # as transformers 5


def check_images(images: pathlib.Path, settings: dict[str, Any], file: pathlib.Path, vision: VisionConfig) -> None:
  """ConversionError if the image processor described in `images` makes something else than the tower of `file` takes."""

  def refuse(key: str, value: Any, reason: str) -> None:
    raise ConversionError(f'{images}: {key} is {value!r}, but {reason}')

  for key in ('size', 'crop_size'):
    value = settings.get(key)
    sides = list(value.values()) if isinstance(value, dict) else [] if value is None else [value]
    if any(s != vision.image_size for s in sides if s is not None):
      refuse(key, value, f'image_size is {vision.image_size} in {file}; is it the processor of another tower?')
  for key in STEPS:
    if settings.get(key) is False:
      refuse(key, False, 'images are always resized, cut, rescaled and normalised here')
  if settings.get('resample', BICUBIC) not in (BICUBIC, None):
    refuse('resample', settings['resample'], f'images are scaled bicubically here ({BICUBIC})')
  factor = settings.get('rescale_factor')
  if factor is not None and not (isinstance(factor, (int, float)) and math.isclose(factor, 1 / 255, rel_tol=1e-4)):
    refuse('rescale_factor', factor, 'the normalisation here is that of values from 0 to 1 (1/255)')
  if not all(isinstance(x, float) and math.isfinite(x) for x in vision.image_mean + vision.image_std) or min(vision.image_std) <= 0:
    refuse('image_std', list(vision.image_std), 'means must be numbers, deviations positive ones')
  kind = settings.get('image_processor_type') or settings.get('feature_extractor_type') or KINDS[0]
  if not str(kind).startswith(KINDS):
    refuse('image_processor_type', kind, f'{file} describes a CLIP tower')
  processor = images.with_name(PROCESSOR)
  stated = read_json(processor).get('patch_size') if processor.exists() else None
  if stated not in (None, vision.patch_size):
    raise ConversionError(f'{processor}: patch_size is {stated!r}, but {vision.patch_size} in {file}')


def check_tokenizer(files: Mapping[str, bytes], directory: pathlib.Path, file: pathlib.Path, rows: int) -> None:
  """ConversionError if a tokenizer's file names an id that the embedding, of `rows` rows by the config `file`, does not have."""
  for name, content in files.items():
    try:
      last = _last_id(name, content)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as e:
      raise ConversionError(f'{directory / name}: unreadable ({e}); copy it again') from None
    if last >= rows:
      raise ConversionError(
        f'{directory / name}: holds token id {last}, but the embedding of {file} has only {rows} rows (vocab_size); take '
        'the tokenizer that the model was trained with'
      )


def _last_id(name: str, content: bytes) -> int:
  """The largest token id in one of a tokenizer's files, -1 if it names none."""
  if name == 'tokenizer.model':
    proto = sentencepiece_model_pb2.ModelProto()
    try:
      proto.ParseFromString(content)
    except Exception as e:  # protobuf's DecodeError is not public
      raise ValueError(f'not a SentencePiece model: {e}') from None
    return len(proto.pieces) - 1
  if name == 'merges.txt':
    return -1
  table = json.loads(content.decode('utf-8-sig'))
  ids = [int(i) for i in table.get('added_tokens_decoder', {})] if name == 'tokenizer_config.json' else []
  if name in ('vocab.json', 'added_tokens.json'):
    ids = list(table.values())
  if name == 'tokenizer.json':
    vocabulary = table['model'].get('vocab', {})  # a table of ids, or a list of (piece, score)
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [t['id'] for t in table.get('added_tokens') or []]
  return max((int(i) for i in ids), default=-1)
