"""Recomputes what was recorded of methods that act between vision tower and language model.

Per prompt: what the method looked at and chose (its row of `RECORDED`), the image tokens, the logits of the prefill, and the
tokens decoded after it with their logits. Each prompt runs alone, and then in one batch with the others, a text-only row and a
longer row whose image stands elsewhere.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import methods
from dynllava_jax.config import DENSE, IMAGE_ID, Piece
from dynllava_jax.convert.records.base import EXACT, LOGITS, Quantity, compare
from dynllava_jax.convert.records.bases import Base, Record, Sample, groups, samples
from dynllava_jax.convert.records.runs import Asked, Runner
from dynllava_jax.methods import visionzip
from dynllava_jax.methods.base import TowerOutput

SCORE, KEY = 5e-6, 1e-5
# Of arrays by the last part of their name; whole numbers are compared exactly, everything else as logits are.
TOLERANCES = {'cls_attention': SCORE, 'key_metric': KEY}


@dataclasses.dataclass(frozen=True)
class Recorded:
  """How a method was recorded.

  Attributes:
    options: `hyper` of `meta.json` -> our options.
    arrays: (tower, options) -> the method's own arrays, [B, ...], by their names in the record.
  """

  options: Callable[[Mapping[str, Any]], dict[str, Any]]
  arrays: Callable[[TowerOutput, Any], dict[str, jax.Array]]


def fastervlm_arrays(tower: TowerOutput, options: Any) -> dict[str, jax.Array]:
  """The head mean that it ranks by."""
  del options
  (attention,) = tower.class_attention.values()
  return {'cls_attention': attention.mean(1)}


def visionzip_arrays(tower: TowerOutput, options: Any) -> dict[str, jax.Array]:
  """Attention, keys and choice; the record counts rows of the tower, whose first is the class token."""
  (attention,) = tower.class_attention.values()
  choice = visionzip.choose(tower, options)
  own = 1 - attention.sum(-1, keepdims=True)
  arrays = {
    'cls_attention': jnp.concatenate([own, attention], -1),
    'dominant_index': jnp.pad(choice.dominant + 1, [(0, 0), (1, 0)]),
    'features': visionzip.condense(tower, choice),
  }
  if options.contextual:
    (keys,) = tower.key_mean.values()
    merging = {'target_index': choice.target + 1, 'merged_index': choice.merged + 1, 'assigned_target': choice.assigned}
    arrays |= {'key_metric': keys} | merging
  return arrays


RECORDED = {
  'fastervlm': Recorded(lambda hyper: {'tokens': hyper['visual_token_num']}, fastervlm_arrays),
  'visionzip': Recorded(lambda hyper: {k: hyper[k] for k in ('dominant', 'contextual')}, visionzip_arrays),
}


def verify(record: Record) -> Iterator[Quantity]:
  """Every quantity of a record of one of these methods."""
  base, described = record.described_base()
  prompts = samples(record, base, described)
  variants: dict[str, list[str]] = {}
  for group in groups(record, prompts):
    variants.setdefault(group.rpartition('/')[0], []).append(group)
  for variant, members in variants.items():
    run = Reduction(base, Piece(record.method, settings(record, variant)), RECORDED[record.method].arrays)
    inputs = [prompts[group.rpartition('/')[2]] for group in members]
    steps = [len(record.case.get(f'{group}/tokens', [0])) for group in members]
    for group, prompt, count in zip(members, inputs, steps):
      yield from _compare(record, group, '', run([prompt], [count])[0])
    for group, found in zip(members, run([*inputs, *neighbours(inputs[0])], steps)):
      yield from _compare(record, group, 'in a batch: ', found)


def settings(record: Record, variant: str) -> dict[str, Any]:
  """Our options for `hyper` of `meta.json`, with what `configs` says about a variant; ConversionError if one is missing."""
  hyper = record.setting('hyper') | record.meta.get('configs', {}).get(variant, {})
  try:
    return RECORDED[record.method].options(hyper)
  except KeyError as e:
    raise record.missing(f'hyper/{e.args[0]}') from None


def neighbours(sample: Sample) -> list[Sample]:
  """Other rows for a batch: one without image, and a longer one that starts with its image."""
  text = sample.ids[sample.ids != IMAGE_ID]
  upside_down = None if sample.pixels is None else sample.pixels[::-1]
  return [Sample(text[: len(text) // 2 + 1], None), Sample(np.concatenate([[IMAGE_ID], text, text]), upside_down)]


def _compare(record: Record, group: str, where: str, found: Mapping[str, np.ndarray]) -> Iterator[Quantity]:
  for name, ours in found.items():
    recorded = record.case.get(f'{group}/{name}')
    if recorded is None:
      continue
    if name == 'logits':
      ours = ours[len(ours) - len(recorded) :]  # some records hold the last row alone
    tolerance = EXACT if np.issubdtype(recorded.dtype, np.integer) else TOLERANCES.get(name, LOGITS)
    yield compare(f'{where}{group}/{name}', ours, recorded, tolerance)


class Reduction:
  """One model and reducer, run on recorded prompts."""

  def __init__(self, base: Base, reducer: Piece, arrays: Callable[[TowerOutput, Any], dict[str, jax.Array]]):
    """Cuts the base's parameters; ConfigError if the base cannot be run so."""
    methods.check_run(base.info.model, DENSE, reducer)
    self.decoder = Runner(base.info.model, base.params, DENSE, reducer)
    options = methods.options_of(reducer, 'reducer')

    def look(pixels):
      apply = lambda method: self.decoder.model.apply({'params': self.decoder.params}, pixels, method=method)
      reduced = apply('reduce_images')
      made = {'kept_image_index': reduced.index, 'projected': reduced.tokens}
      return made | arrays(apply(lambda model, x: model.vision(x)), options)

    self.look = jax.jit(look)

  def __call__(self, prompts: list[Sample], steps: list[int]) -> list[dict[str, np.ndarray]]:
    """What the reducer saw and made of each prompt, and `steps` tokens after it; one entry per number of steps."""
    blank = np.zeros((self.decoder.model.cfg.vision.image_size,) * 2 + (3,), np.float32)
    seen = jax.device_get(self.look(jnp.asarray(np.stack([blank if p.pixels is None else p.pixels for p in prompts]))))
    asked = [Asked(p.ids, image) for p, image in zip(prompts, seen['projected'])]
    rows = []
    for i, (answer, count) in enumerate(zip(self.decoder.answer(asked, max(steps)), steps)):
      after = {'logits': answer.prefill_logits, 'tokens': answer.tokens[:count], 'decode_logits': answer.logits[:count]}
      rows.append({name: array[i] for name, array in seen.items()} | after)
    return rows
