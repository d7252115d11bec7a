"""Recomputes what was recorded of mixture of depths: VideoLLM-MoD and p-MoD.

Per layer with a router: scores, choices, the image rows behind it and its cache; then logits and tokens, with a cache and without,
and of p-MoD a later turn and its schedule.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import Piece, RoutersConfig
from dynllava_jax.convert.mixture_of_depths import options_of
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import EXACT, LOGITS, Quantity, compare, given, load_case, token_ids
from dynllava_jax.convert.records.bases import Base, Record
from dynllava_jax.convert.records.decoded import Group, asked, decoded_groups, with_bases
from dynllava_jax.convert.records.depth_training import steps_of, verify_training
from dynllava_jax.convert.records.described import GROUP, NUMBER, WHOLE, WHOLES
from dynllava_jax.convert.records.runs import Answer, Runner, compare_run, compare_uncached
from dynllava_jax.methods import pmod
from dynllava_jax.models.stacks import routed_stages

VIDEOLLM, PMOD = 'videollm-mod', 'p-MoD'
METHODS = {VIDEOLLM: 'videollm_mod', PMOD: 'pmod'}
SCORE = {VIDEOLLM: 1e-5, PMOD: 1e-4}
OF_LAYER = re.compile(r'(router|kept_image_index|image_hidden|cache_position|k|v)_(\d+)')
PUBLISHED = 32, 576  # layers and image tokens of the published schedule
PADDED = 2  # layers of a stage where each lets other numbers pass


def verify(record: Record, alone: bool = True, only: Sequence[str] = ()) -> Iterator[Quantity]:
  """Every quantity of the record; `only` some of its configs, `BASE/CONFIG`."""
  if record.method == PMOD:
    yield from schedule(record)
  for base, groups in with_bases(record, groups_of(record), only):
    base = with_routers(record, base, groups[0])
    piece = piece_of(record, groups[0], base)
    runner = Runner(base.info.model, base.params, routed_stages(piece, base.info.model.llama.num_layers, PADDED))
    own = lambda name, recorded, answer, runner=runner: of_layer(record, runner, name, answer)
    yield from compare_run(record, groups, runner, base, own, alone)
    if alone:
      yield from compare_uncached(record, groups, runner, base)
      yield from compare_chunks(record, groups, runner, base)
      for at, step in steps_of(record, groups, base):
        yield from verify_training(record, at, step, base, runner.model.stages, alone)


def groups_of(record: Record) -> list[list[Group]]:
  """The groups with decoded tokens of each config; those of p-MoD have neither base nor config in their names."""
  if record.method == VIDEOLLM:
    return list(decoded_groups(record).values())
  prompts = [key.removesuffix('/logits') for key in record.case if re.fullmatch(r'\w+/logits', key)]
  if not prompts:
    raise ConversionError(f'{record.at}: no group PROMPT/logits; expected a record of {record.method}')
  for prompt in prompts:
    record.given(f'{prompt}/logits', (record.steps(f'{prompt}/tokens'), None))
  return [[Group('', '', prompt) for prompt in prompts]]


def with_routers(record: Record, base: Base, group: Group) -> Base:
  """The base with the routers of the record."""
  file, llama = record.folder / 'weights.npz', base.info.model.llama
  weights, at = load_case(file), f'{group.base}/' if group.base else ''
  found: dict[str, dict[int, np.ndarray]] = {'weight': {}, 'bias': {}}
  for key in weights:
    if named := re.fullmatch(rf'{re.escape(at)}(?:model\.)?layers\.(\d+)\.(?:router\.)+(weight|bias)', key):
      width = llama.hidden_size if named[2] == 'weight' else 1
      shape = (width,) if weights[key].ndim == 1 else (1, width)
      layer = int(named[1])
      if layer >= llama.num_layers:
        raise ConversionError(f'{file}: {key} is of a layer that the base does not have, 0 to {llama.num_layers - 1}')
      found[named[2]][layer] = given(file, weights, key, shape).reshape(-1)
  if not found['weight'] or (found['bias'] and found['bias'].keys() != found['weight'].keys()):
    raise ConversionError(f'{file}: expected {at}layers.N.router.weight of some layers, with bias in all of these or none')
  kernel, bias = np.zeros((llama.num_layers, llama.hidden_size), np.float32), np.zeros(llama.num_layers, np.float32)
  for layer, value in found['weight'].items():
    kernel[layer] = value
  for layer, value in found['bias'].items():
    bias[layer] = value[0]
  layers = {'kernel': jnp.asarray(kernel)} | ({'bias': jnp.asarray(bias)} if found['bias'] else {})
  described = RoutersConfig(method=METHODS[record.method], bias=bool(found['bias']), layers=tuple(sorted(found['weight'])))
  info = dataclasses.replace(base.info, model=dataclasses.replace(base.info.model, routers=described))
  return dataclasses.replace(base, info=info, params=base.params | {'routers': {'layers': layers}})


def piece_of(record: Record, group: Group, base: Base) -> Piece:
  """The layer kind of a config."""
  if record.method == PMOD:
    return Piece('pmod', pmod_options(record, base.info.model.llama.num_layers))
  told = functools.partial(record.setting, 'configs', group.setting)
  layers, keep, frames = told('mod_layers', kind=WHOLES), told('vision_keep', kind=NUMBER), told('frames', kind=WHOLE)
  return Piece('videollm_mod', dict(layers=layers, keep=keep, frames=frames))


def pmod_options(record: Record, layers: int) -> dict[str, Any]:
  """Our options of a record's settings, which are the authors'."""
  return options_of(record.described, record.setting('config', kind=GROUP), layers)


def of_layer(record: Record, runner: Runner, name: str, answer: Answer) -> tuple[Any, float] | None:
  """The arrays of a layer by name, and the slots in use of all layers."""
  if name == 'cache_len':
    return answer.cache_len[0], EXACT
  found = OF_LAYER.fullmatch(name)
  if not found or int(found[2]) >= len(answer.cache_len[0]):
    return None
  kind, layer = found[1], int(found[2])
  number = next(i for i, stack in enumerate(runner.stacks) if layer in stack.layers)
  stack = runner.stacks[number]
  entry, turn = stack.layers.index(layer), number - next(i for i, s in enumerate(runner.stacks) if s.stage == stack.stage)
  if kind in ('k', 'v'):
    return getattr(answer, kind)[number][entry].swapaxes(0, 1)[:, : answer.cache_len[0, layer]], LOGITS
  trace = answer.traces[stack.stage]
  seen = {key: value[entry] for key, value in trace.of_layers[turn].items()}
  if 'passes' not in seen:  # an ordinary layer
    return None
  if kind == 'router':
    return seen['router'], SCORE[record.method]
  if kind == 'image_hidden':
    return seen['image_hidden'], LOGITS
  kept = np.flatnonzero(seen['passes'])
  if kind == 'kept_image_index':
    return kept, EXACT
  places = trace.positions[: trace.length] - answer.image_start
  return trace.positions[: trace.length][(places < 0) | (places >= len(seen['passes'])) | np.isin(places, kept)], EXACT


def compare_chunks(record: Record, groups: Sequence[Group], runner: Runner, base: Base) -> Iterator[Quantity]:
  """Tokens that arrive together on top of what was decoded."""
  for group in groups:
    if f'{group.at}chunk_ids' in record.case:
      vocab = base.info.model.llama.vocab_size
      ids = lambda name, at=group.at, vocab=vocab: token_ids(record.at, record.case, f'{at}{name}', vocab)
      chunk, fed = ids('chunk_ids'), ids('tokens')[:-1]
      logits, slots = runner.later([asked(record, base, group)], [fed[None], chunk[None]])
      yield compare(f'{group.at}chunk_logits', logits[0], record.array(f'{group.at}chunk_logits'), LOGITS)
      yield compare(f'{group.at}chunk_cache_len', slots[0], record.array(f'{group.at}chunk_cache_len'), EXACT)


def schedule(record: Record) -> Iterator[Quantity]:
  """Shares and numbers of image tokens by depth."""
  layers, image = PUBLISHED
  options = pmod.Options(**pmod_options(record, layers))
  ratios = [1.0 if (r := pmod.ratio(layer, layers, options)) is None else r for layer in range(layers)]
  kept = [pmod.quota(layer, layers, image, options) if ratios[layer] < 1 else image for layer in range(layers)]
  yield compare('schedule32/layer_ratio', ratios, record.array('schedule32/layer_ratio'), 1e-6)
  yield compare('schedule32/kept_of_576', kept, record.array('schedule32/kept_of_576'), EXACT)
