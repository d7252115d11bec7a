"""What each reducer was recorded to look at and to choose: arrays by their names in the record, by the method's own functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import DENSE, Piece, Stage
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.bases import MISSING, QUESTION, Base, Record, Sample
from dynllava_jax.convert.records.described import NUMBER, WHOLE, WHOLES, Kind
from dynllava_jax.convert.records.reduction import Project, Reduction
from dynllava_jax.convert.records.runs import Answer, per_layer
from dynllava_jax.methods import cdpruner, divprune, dpp, dymu, prumerge, visionzip, vispruner, vscan
from dynllava_jax.methods.base import TowerOutput
from dynllava_jax.ops.layout import gather_rows

SCORE, KEY = 5e-6, 1e-5
# Of arrays by their name; whole numbers are compared exactly, everything else as logits are.
TOLERANCES = dict.fromkeys(('cls_attention', 'cls_attention_shallow', 'cls_attention_deep', 'stage2_score'), SCORE)
TOLERANCES |= dict.fromkeys(('key_metric', 'distance', 'step_score', 'text_embeds', 'image_embeds', 'relevance', 'kernel'), KEY)


@dataclasses.dataclass(frozen=True)
class Asking:
  """One group of arrays, `VARIANT/PROMPT` or `PROMPT`: what was asked of the authors' code.

  Attributes:
    record, base: what it belongs to.
    group: its name.
    prompt: its prompt.
  """

  record: Record
  base: Base
  group: str
  prompt: Sample

  @property
  def variant(self) -> str:
    return self.group.rpartition('/')[0]

  def setting(self, name: str, kind: Kind, default: Any = MISSING) -> Any:
    """A setting of the variant, in its entry of `configs` or for all of them in `hyper`."""
    own = self.record.setting('configs', self.variant, name, kind=kind, default=None) if self.variant else None
    return self.record.setting('hyper', name, kind=kind, default=default) if own is None else own

  @property
  def patches(self) -> int:
    return self.base.info.model.vision.num_patches

  def tower(self, reducer: Piece) -> TowerOutput:
    """What the tower gives to a reducer for this prompt alone, for settings that follow from the picture."""
    return Reduction(self.base, reducer).tower([self.prompt])


@dataclasses.dataclass(frozen=True)
class Run:
  """How a group is run here; `prefix` is in front of the names of what was recorded of the decoder."""

  reducer: Piece
  stages: tuple[Stage, ...] = DENSE
  prefix: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
  """How a method was recorded.

  Attributes:
    runs: what a group is run with; none for a group that nothing here can equal. ConversionError for a setting that is missing.
    arrays: (tower, projector, options) -> the method's own arrays, [B, ...], by their names in the record.
    answered: (what a row of the batch gave, the group's own recorded arrays) -> arrays about the decoder by their names.
  """

  runs: Callable[[Asking], tuple[Run, ...]]
  arrays: Callable[[TowerOutput, Project, Any], dict[str, jax.Array]]
  answered: Callable[[Answer, Mapping[str, np.ndarray]], dict[str, np.ndarray]] = lambda answer, recorded: {}


def fastervlm_arrays(tower: TowerOutput, project: Project, options: Any) -> dict[str, jax.Array]:
  """The head mean that it ranks by."""
  del project, options
  (attention,) = tower.class_attention.values()
  return {'cls_attention': attention.mean(1)}


def visionzip_arrays(tower: TowerOutput, project: Project, options: Any) -> dict[str, jax.Array]:
  """Attention, keys and choice; the record counts rows of the tower, whose first is the class token."""
  del project
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


def divprune_arrays(tower: TowerOutput, project: Project, options: Any) -> dict[str, jax.Array]:
  """All projected tokens, and the order in which they were chosen."""
  projected = project(tower.features)
  distance = divprune.distances(projected)
  order, score = divprune.spread(distance, options.tokens)
  return {'projected': projected, 'distance': distance, 'selection_order': order, 'step_score': score}


def cdpruner_arrays(tower: TowerOutput, project: Project, options: Any) -> dict[str, jax.Array]:
  """Both sides as CLIP compares them, the kernel and the order of choice."""
  projected, relevant = project(tower.features), cdpruner.relevance(tower)
  kernel = cdpruner.kernel(projected, relevant)
  of_text = {'text_embeds': tower.text_embeds, 'has_text': tower.has_text}
  seen = of_text | {'image_embeds': tower.patch_embeds, 'relevance': relevant, 'kernel': kernel}
  return seen | {'projected': projected, 'selection_order': dpp.greedy(kernel, options.tokens)[0]}


def cdpruner_runs(asked: Asking) -> tuple[Run, ...]:
  """ConversionError if nothing is asked of the prompt."""
  asked.record.array(f'{asked.group.rpartition("/")[2]}/{QUESTION}')
  return (Run(Piece('cdpruner', {'tokens': asked.setting('visual_token_num', WHOLE)})),)


def vispruner_arrays(tower: TowerOutput, project: Project, options: Any) -> dict[str, jax.Array]:
  """Both choices as sets."""
  del project
  (attention,) = tower.class_attention.values()
  important, diverse = (jnp.sort(x, axis=1) for x in vispruner.choose(tower, options))
  features = {'cls_attention': attention.mean(1), 'tower_features': tower.features}
  return features | {'important_index': important, 'diverse_index': diverse}


def vscan_arrays(tower: TowerOutput, project: Project, options: Any) -> dict[str, jax.Array]:
  """Both rows, both choices, and where the others go."""
  local, everywhere = vscan.choose(tower, options)
  kept = jnp.sort(jnp.concatenate([local, everywhere], 1), axis=1)
  into = vscan.destinations(project(tower.features), kept)
  batch, patches = into.shape
  taken = jnp.zeros((batch, patches), bool).at[jnp.arange(batch)[:, None], kept].set(True)
  merged = jnp.argsort(taken, axis=1, stable=True)[:, : patches - kept.shape[1]]
  shallow, deep = (tower.class_attention[block].mean(1) for block in (options.shallow, max(tower.class_attention)))
  return {
    'cls_attention_shallow': shallow,
    'cls_attention_deep': deep,
    'local_index': local,
    'global_index': everywhere,
    'merged_index': merged,
    'merged_into': gather_rows(kept, gather_rows(into, merged)),
  }


def vscan_answered(answer: Answer, recorded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The first cut, cache lengths after the prefill, and the position of every fed token."""
  found = {'cache_len': answer.cache_len[0]}
  if len(answer.traces) > 1:
    found |= {'stage2_score': answer.traces[1].attention.mean(0), 'stage2_kept': answer.traces[1].kept_image}
  if 'decode_positions' in recorded:
    found['decode_positions'] = per_layer(answer.position, recorded['decode_positions'])
  return found


def vscan_runs(asked: Asking) -> tuple[Run, ...]:
  """Both stages; a record without a layer list has the first alone."""
  names = {'tokens': 'visual_token_num', 'window': 'window', 'shallow': 'shallow'}
  options = {ours: asked.setting(theirs, WHOLE) for ours, theirs in names.items()}
  layers, kept = (asked.setting(name, WHOLES, ()) for name in ('layer_list', 'image_token_list'))
  if len(layers) != len(kept):
    raise ConversionError(
      f'{asked.record.described}: hyper: layer_list has {len(layers)} entries and image_token_list {len(kept)}, expected as many'
    )
  cuts = (Stage(start=layer, selector='pyramiddrop', image_tokens=count) for layer, count in zip(layers, kept))
  return (Run(Piece('vscan', options), (Stage(), *cuts)),)


def prumerge_runs(asked: Asking) -> tuple[Run, ...]:
  """Centres by a fixed ratio, or as many as the picture has outliers; none where the authors' code takes a patch twice."""
  patches, near = asked.patches, asked.setting('neighbours', WHOLE)
  plus, fixed = 'plus' in asked.variant, asked.variant.endswith('fixed')
  attention = prumerge.class_attention(asked.tower(Piece('prumerge', {'centres': 1, 'neighbours': near})))
  highest = lambda count: set(prumerge.centres(attention, prumerge.Options(centres=count))[0].tolist())
  if fixed:
    ratio = asked.setting('fixed_ratio', NUMBER)
    if not 1 / patches <= ratio <= 1:
      raise ConversionError(f'{asked.record.described}: hyper/fixed_ratio is {ratio}, expected from 1/{patches} to 1')
    count, stride = int(patches * ratio), int(1 / ratio)
    steps = {'strided': count, 'stride': stride, 'first': stride // 2}
    if plus and highest(count) & set(range(stride // 2, patches, stride)[:count]):
      return ()
  else:
    count = int(prumerge.outliers(attention)[0])
    stride = int(int(patches / count) / 3)
    steps = {'strided': len(set(range(0, patches - 1, stride)).difference(highest(count))), 'stride': stride}
  options = {'centres': count, 'neighbours': near}
  return (Run(Piece('prumerge_plus', options | steps) if plus else Piece('prumerge', options)),)


def prumerge_arrays(tower: TowerOutput, project: Project, options: Any) -> dict[str, jax.Array]:
  """The row and keys of the block above, the choice, and what was made of it."""
  del project
  attention = prumerge.class_attention(tower)
  centre = prumerge.centres(attention, options)
  near = prumerge.neighbours(tower.next_keys[:, 1:], centre, options.neighbours)
  features = prumerge.condense(tower, attention, centre, near)
  seen = {'cls_attention': attention, 'key': tower.next_keys}
  return seen | {'centre_index': centre, 'neighbours': near, 'features': features}


def dymu_runs(asked: Asking) -> tuple[Run, ...]:
  """The recorded numbers of merges, or as many as the recorded thresholds give for this picture; without and with unmerging."""
  blocks = asked.base.info.model.vision.layers_run
  named = asked.setting('rs', WHOLES, ())
  if not named and (key := {'fixed': 'rs', 'cap': 'cap_rs'}.get(asked.variant)):
    named = asked.record.setting(key, kind=WHOLES)
  if named:
    counts = named[:blocks]
  else:
    counts = ()
    thresholds = asked.record.given(f'{asked.variant}/thresholds', (None,))
    if len(thresholds) < blocks:
      raise ConversionError(f'{asked.record.at}: {asked.variant}/thresholds has {len(thresholds)}, the tower runs {blocks} blocks')
    for threshold in thresholds[:blocks]:
      tower = asked.tower(Piece('dymu', {'merges': (*counts, *(0,) * (blocks - len(counts)))}))
      counts += (int(dymu.above(tower.merged[len(counts)][1].best, threshold)[0]),)
  plain, *unmerged = (Run(Piece('dymu', {'merges': counts, 'unmerge': p == 'vtu/'}), prefix=p) for p in ('no_vtu/', 'vtu/'))
  return (plain, *unmerged) if any(k.startswith(f'{asked.group}/vtu/') for k in asked.record.case) else (plain,)


def dymu_answered(answer: Answer, recorded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Keys per layer after the prefill, and which row stood at each place."""
  del recorded
  (trace,), places = answer.traces, int(answer.cache_len[0, 0])
  if trace.unmerged is None:
    return {'no_vtu/cache_len': places}
  return {'vtu/cache_len': places, 'vtu/mapping': trace.unmerged[:places]}


def dymu_arrays(tower: TowerOutput, project: Project, options: Any) -> dict[str, jax.Array]:
  """Every block that is run; `group` and `hidden` alone are those of the last."""
  del project, options
  arrays = {}
  for i, (hidden, tokens) in enumerate(tower.merged):
    arrays |= {f'group/{i}': tokens.group, f'size/{i}': tokens.size, f'hidden/{i}': hidden}
  return arrays | {'group': tower.merged[-1][1].group, 'hidden': tower.merged[-1][0]}


def one(name: str, options: Callable[[Asking], dict[str, Any]]) -> Callable[[Asking], tuple[Run, ...]]:
  """Runs of a method that has one reducer and a plain decoder."""
  return lambda asked: (Run(Piece(name, options(asked))),)


RECORDED = {
  'cdpruner': Recorded(runs=cdpruner_runs, arrays=cdpruner_arrays),
  'divprune': Recorded(
    runs=one('divprune', lambda asked: {'tokens': round(asked.setting('SUBSET_RATIO', NUMBER) * asked.patches)}),
    arrays=divprune_arrays,
  ),
  'dymu': Recorded(runs=dymu_runs, arrays=dymu_arrays, answered=dymu_answered),
  'fastervlm': Recorded(
    runs=one('fastervlm', lambda asked: {'tokens': asked.setting('visual_token_num', WHOLE)}), arrays=fastervlm_arrays
  ),
  'prumerge': Recorded(runs=prumerge_runs, arrays=prumerge_arrays),
  'visionzip': Recorded(
    runs=one('visionzip', lambda asked: {name: asked.setting(name, WHOLE) for name in ('dominant', 'contextual')}),
    arrays=visionzip_arrays,
  ),
  'vispruner': Recorded(
    runs=one(
      'vispruner',
      lambda asked: {
        'tokens': asked.setting('visual_token_num', WHOLE),
        'important_ratio': float(asked.setting('important_ratio', NUMBER)),
      },
    ),
    arrays=vispruner_arrays,
  ),
  'vscan': Recorded(runs=vscan_runs, arrays=vscan_arrays, answered=vscan_answered),
}
