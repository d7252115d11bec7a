"""Recomputes what was recorded of the TokenPacker projector below Dynamic-LLaVA: tower states, image tokens, prefill and decoding.

The record brings a tower and projectors of its own, one per scale factor; decoder and predictors are those of its base.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import TokenPackerConfig, VisionConfig, from_config_dict
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import EXACT, LOGITS, Quantity, compare, load_case, prompt_from_ids, token_ids
from dynllava_jax.convert.records.bases import Record, with_weights
from dynllava_jax.convert.records.described import NAME, NUMBER, WHOLE, WHOLES
from dynllava_jax.convert.records.dynamic_runs import DynamicRunner, row_of
from dynllava_jax.convert.records.runs import tail

METHOD = 'tokenpacker projector below dynamic-llava'
TOWER = {
  'hidden_size': 'hidden_size',
  'intermediate_size': 'mlp_dim',
  'num_hidden_layers': 'num_layers',
  'num_attention_heads': 'num_heads',
  'image_size': 'image_size',
  'patch_size': 'patch_size',
  'layer_norm_eps': 'layer_norm_eps',
}
GROUP = re.compile(r'scale(\d+)/(\w+)/tokens')
CHOICES = ('kept_image_index', 'position_ids', 'tokens', 'text_keep', 'position', 'cache_len_dense', 'cache_len_sparse')
NUMBERS = ('image_predictor_logits', 'logits', 'text_predictor_logits')


def verify(record: Record) -> Iterator[Quantity]:
  """Every quantity of the record; each prompt alone, and all in a batch with a text-only row and a longer one."""
  prompts: dict[int, list[str]] = {}
  for found in filter(None, map(GROUP.fullmatch, record.case)):
    prompts.setdefault(int(found[1]), []).append(found[2])
  if not prompts:
    raise ConversionError(f'{record.at}: no group scaleN/PROMPT/tokens; expected a record of {METHOD}')
  base = record.base_case()
  for i, (scale, names) in enumerate(sorted(prompts.items())):
    runner = DynamicRunner(*model(record, scale))
    size = runner.info.model.vision.image_size
    pixels = jnp.asarray(record.given('pixel_values', (None, 3, size, size))).transpose(0, 2, 3, 1)
    states, projected = jax.jit(functools.partial(image_tokens, runner))(pixels)
    if i == 0:
      yield compare('features_multi', states, record.array('features_multi'), LOGITS)
    yield compare(f'scale{scale}/projected', projected, record.array(f'scale{scale}/projected'), LOGITS)
    yield from decoded(record, runner, scale, names, pixels, base)


def model(record: Record, scale: int) -> tuple[CheckpointInfo, dict]:
  """The base with the record's tower and its projector of this scale factor."""
  weights = load_case(record.folder / 'weights.npz')
  at = f'scale{scale}/'
  own = {k.removeprefix('clip/'): v for k, v in weights.items() if k.startswith('clip/')}
  own |= {f'model.{k.removeprefix(at)}': v for k, v in weights.items() if k.startswith(at)}
  fields = {
    ours: record.setting('vision_config', theirs, kind=NUMBER if theirs == 'layer_norm_eps' else WHOLE)
    for theirs, ours in TOWER.items()
  }
  told = functools.partial(record.setting, 'projector')
  fields['select_layer'] = told('select_layer', kind=WHOLE)
  packer = {'levels': told('multi_levels', kind=WHOLES), 'num_heads': told('num_heads', kind=WHOLE), 'scale_factor': scale}

  def describe(info: CheckpointInfo) -> CheckpointInfo:
    vision = from_config_dict(VisionConfig, fields, f'{record.folder}/meta.json: vision_config')
    packed = from_config_dict(TokenPackerConfig, packer, f'{record.folder}/meta.json: projector')
    rate = record.setting('vision_keep_rate', kind=NUMBER)
    stages = tuple(dataclasses.replace(s, image_keep_rate=rate) if s.selector == 'dynamic' else s for s in info.stages)
    described = dataclasses.replace(info.model, vision=vision, projector='tokenpacker', packer=packed)
    return dataclasses.replace(info, model=described, stages=stages, unused_vision_layers=True)

  return with_weights(record, record.setting('base_model', kind=NAME), own, describe)


def image_tokens(runner: DynamicRunner, pixels) -> tuple[jax.Array, jax.Array]:
  """(the tower's states side by side float[B, P, L C], the projector's tokens float[B, M, D]) of normalised pixels."""
  states = runner.apply(pixels, method=lambda m, x: m.vision(x)).states
  return jnp.concatenate(list(states.values()), -1), runner.apply(pixels, method='encode_images')


def decoded(
  record: Record,
  runner: DynamicRunner,
  scale: int,
  names: list[str],
  pixels: jax.Array,
  base: tuple[pathlib.Path, dict[str, np.ndarray]],
) -> Iterator[Quantity]:
  """Prefill and decoding of the prompts `names`."""
  ids, images, vocab = [], [], runner.info.model.llama.vocab_size
  for name in names:
    own = next((at for at in (f'scale{scale}/{name}', name) if f'{at}/input_ids' in record.case), None)
    where = (record.at, record.case, f'{own}/input_ids') if own else (*base, f'{name}/input_ids')
    ids.append(token_ids(*where, vocab))
    images.append(picture(record, scale, name, len(pixels)))
  text = ids[0][ids[0] >= 0]
  rows = [*ids, text, np.concatenate([text[:1], ids[0][ids[0] < 0], text, text])]
  longest = max(map(len, rows)) + 1
  steps = max(record.steps(f'scale{scale}/{name}/tokens', 1) for name in names)

  def run(chosen: list[int]) -> dict[str, np.ndarray]:
    padded = np.stack([np.pad(rows[i], (0, longest - len(rows[i]))) for i in chosen])
    valid = np.stack([np.arange(longest) < len(rows[i]) for i in chosen])
    prompt = prompt_from_ids(padded, runner.num_image, valid)
    which = [images[i] if i < len(images) else 0 for i in chosen]
    return runner.greedy(prompt, pixels[jnp.asarray(which)], steps)[0]

  together = run([*range(len(rows))])
  for row, name in enumerate(names):
    at = f'scale{scale}/{name}/'
    for where, result in (('', run([row])), ('in a batch: ', row_of(together, row))):
      yield from compare_prompt(record, at, where, result)


def compare_prompt(record: Record, at: str, where: str, result: dict[str, np.ndarray]) -> Iterator[Quantity]:
  """One row next to the arrays of its group; its padding is cut off."""
  real = int(result['rows'][0])
  steps = record.steps(f'{at}tokens', 1)
  for name in (*CHOICES, *NUMBERS):
    recorded = record.array(at + name)
    ours = result[name][:, :real] if name == 'position_ids' else result[name]
    if name in ('tokens', 'logits', 'text_keep', 'text_predictor_logits', 'position'):
      ours = ours[:, : steps if name in ('tokens', 'logits') else steps - 1]
    elif name.startswith('cache_len'):
      ours = ours[:steps].reshape(-1)
    yield compare(f'{where}{at}{name}', ours, recorded, EXACT if name in CHOICES else LOGITS)
  recorded = record.array(f'{at}prefill_logits')
  ours = result['prefill_logits'][:, :real]
  if recorded.shape[:1] == (1,):
    ours = tail(ours[0], recorded[0])[None]
  yield compare(f'{where}{at}prefill_logits', ours, recorded, LOGITS)


def picture(record: Record, scale: int, name: str, images: int) -> int:
  """Which of `pixel_values` a prompt has: an array says so, or `meta.json`, as 'b1 (picture 0)'; else the first."""
  for at in (f'scale{scale}/{name}/', f'{name}/'):
    if f'{at}image_index' in record.case:
      return record.number(f'{at}image_index', 0, images)
  told = re.search(rf'\b{re.escape(name)} \(picture (\d+)\)', str(record.meta))
  number = int(told[1]) if told else 0
  if number >= images:
    raise ConversionError(f'{record.described}: gives picture {number} to prompt {name}, and pixel_values has {images}')
  return number
