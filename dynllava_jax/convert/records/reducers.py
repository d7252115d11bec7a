"""Recomputes what was recorded of methods that act between vision tower and language model.

Per prompt: what the method looked at and chose (its row of `RECORDED`), the image tokens, the logits of the prefill, and the
tokens decoded after it with their logits. Each prompt runs alone, and then in one batch with the others, a text-only row and a
longer row whose image stands elsewhere.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import methods
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import DENSE, IMAGE_ID, Piece, Stage
from dynllava_jax.convert.records.base import EXACT, LOGITS, Quantity, compare, prompt_from_ids
from dynllava_jax.convert.records.bases import Base, Record, Sample, groups, samples
from dynllava_jax.methods import visionzip
from dynllava_jax.methods.base import TowerOutput
from dynllava_jax.models.dynllava import DynLlava
from dynllava_jax.models.params import cut_params

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
    runner = Runner(base, Piece(record.method, settings(record, variant)), RECORDED[record.method].arrays)
    inputs = [prompts[group.rpartition('/')[2]] for group in members]
    tokens = [record.case.get(f'{group}/tokens', np.zeros(1, np.int32)) for group in members]
    for group, prompt, own in zip(members, inputs, tokens):
      yield from _compare(record, group, '', runner([prompt], [own])[0])
    for group, found in zip(members, runner([*inputs, *neighbours(inputs[0])], tokens)):
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
  return [Sample(text[: len(text) // 2 + 1], None), Sample(np.concatenate([[IMAGE_ID], text, text]), sample.pixels[::-1])]


def _compare(record: Record, group: str, where: str, found: Mapping[str, np.ndarray]) -> Iterator[Quantity]:
  for name, ours in found.items():
    recorded = record.case.get(f'{group}/{name}')
    if recorded is None:
      continue
    if name == 'logits':
      ours = ours[len(ours) - len(recorded) :]  # some records hold the last row alone
    tolerance = EXACT if np.issubdtype(recorded.dtype, np.integer) else TOLERANCES.get(name, LOGITS)
    yield compare(f'{where}{group}/{name}', ours, recorded, tolerance)


class Runner:
  """One model and reducer, run on recorded prompts."""

  def __init__(
    self, base: Base, reducer: Piece, arrays: Callable[[TowerOutput, Any], dict[str, jax.Array]], stages: tuple[Stage, ...] = DENSE
  ):
    """Cuts the base's parameters; ConfigError if the base cannot be run so."""
    methods.check_run(base.info.model, stages, reducer)
    self.model = DynLlava(base.info.model, stages, reducer=reducer)
    self.params = cut_params(base.params, stages)
    self.arrays, self.options = arrays, methods.options_of(reducer, 'reducer')
    self._apply = functools.partial(jax.jit(self._run), self.params)

  def __call__(self, prompts: list[Sample], tokens: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """What the reducer saw and made of each prompt, and what comes after it, fed the recorded tokens; one entry per `tokens`."""
    width, steps = max(len(p.ids) for p in prompts), max(map(len, tokens))
    ids = np.stack([np.pad(p.ids, (0, width - len(p.ids))) for p in prompts])
    valid = np.stack([np.arange(width) < len(p.ids) for p in prompts])
    prompt = prompt_from_ids(ids, self.model.num_image, valid)
    blank = next(np.zeros_like(p.pixels) for p in prompts if p.pixels is not None)
    pixels = jnp.asarray(np.stack([blank if p.pixels is None else p.pixels for p in prompts]))
    forced = np.zeros((len(prompts), steps), np.int32)
    for row, own in zip(forced, tokens):
      row[: len(own)] = own
    out = jax.device_get(self._apply(prompt, pixels, jnp.asarray(forced)))
    rows = []
    for i, own in enumerate(tokens):
      row = {k: v[i] for k, v in out.items()}
      row['logits'] = row['logits'][: int(prompt.length[i])]
      row['decode_logits'] = row['decode_logits'][: len(own)]
      rows.append(row | {'tokens': row['decode_logits'].argmax(-1)})
    return rows

  def _run(self, params, prompt, pixels, forced):
    apply = lambda *args, method: self.model.apply({'params': params}, *args, method=method)
    tower = apply(pixels, method=lambda model, x: model.vision(x))
    reduced = apply(pixels, method='reduce_images')
    hidden, traces, cache = apply(prompt, reduced.tokens, CacheSpec(max_new_tokens=forced.shape[1]), method='prefill')
    logits = apply(hidden, method='logits')
    last = jnp.take_along_axis(logits, (traces[-1].length - 1)[:, None, None], 1)[:, 0]

    def feed(state, token):
      cache, logits = state
      hidden, cache, _ = apply(token[:, None], jnp.ones_like(token), cache, True, method='extend')
      return (cache, apply(hidden, method='logits')[:, 0]), logits

    _, decoded = jax.lax.scan(feed, (cache, last), forced.T)
    found = {'kept_image_index': reduced.index, 'projected': reduced.tokens, 'logits': logits}
    return found | {'decode_logits': decoded.swapaxes(0, 1)} | self.arrays(tower, self.options)
