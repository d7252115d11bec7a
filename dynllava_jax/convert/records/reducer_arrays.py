"""What each reducer was recorded to look at and to choose: arrays by their names in the record, by the method's own functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import DENSE, Piece, Stage
from dynllava_jax.convert.records.bases import Base, Record, Sample
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
    hyper: the settings.
  """

  record: Record
  base: Base
  group: str
  prompt: Sample
  hyper: Mapping[str, Any]

  @property
  def variant(self) -> str:
    return self.group.rpartition('/')[0]

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
    runs: what a group is run with; none for a group that nothing here can equal. KeyError for a setting that is missing.
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
  seen = {'text_embeds': tower.text_embeds, 'image_embeds': tower.patch_embeds, 'relevance': relevant, 'kernel': kernel}
  return seen | {'projected': projected, 'selection_order': dpp.greedy(kernel, options.tokens)[0]}


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
  hyper = asked.hyper
  options = {'tokens': hyper['visual_token_num'], 'window': hyper['window'], 'shallow': hyper['shallow']}
  lists = zip(hyper.get('layer_list', ()), hyper.get('image_token_list', ()), strict=True)
  cuts = (Stage(start=layer, selector='pyramiddrop', image_tokens=kept) for layer, kept in lists)
  return (Run(Piece('vscan', options), (Stage(), *cuts)),)


def prumerge_runs(asked: Asking) -> tuple[Run, ...]:
  """Centres by a fixed ratio, or as many as the picture has outliers; none where the authors' code takes a patch twice."""
  record, patches, near = asked.record, asked.patches, asked.hyper['neighbours']
  plus, fixed = 'plus' in asked.variant, asked.variant.endswith('fixed')
  recorded = record.case.get(f'{asked.group}/centre_index', np.zeros(0))
  if len(set(recorded.tolist())) < len(recorded):
    return ()
  if fixed:
    ratio = asked.hyper['fixed_ratio']
    count, stride = int(patches * ratio), int(1 / ratio)
    steps = {'strided': count, 'stride': stride, 'first': stride // 2}
  else:
    attention = prumerge.class_attention(asked.tower(Piece('prumerge', {'centres': 1, 'neighbours': near})))
    count = int(prumerge.outliers(attention)[0])
    stride = int(int(patches / count) / 3)
    taken = prumerge.centres(attention, prumerge.Options(centres=count))[0].tolist()
    steps = {'strided': len(set(range(0, patches - 1, stride)).difference(taken)), 'stride': stride}
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
  blocks, meta = asked.base.info.model.vision.layers_run, asked.record.meta
  named = asked.hyper.get('rs') or meta.get({'fixed': 'rs', 'cap': 'cap_rs'}.get(asked.variant))
  if named:
    counts = tuple(named[:blocks])
  else:
    counts = ()
    for threshold in asked.record.array(f'{asked.variant}/thresholds')[:blocks]:
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
  'cdpruner': Recorded(
    runs=one('cdpruner', lambda asked: {'tokens': asked.hyper['visual_token_num']}),
    arrays=cdpruner_arrays,
  ),
  'divprune': Recorded(
    runs=one('divprune', lambda asked: {'tokens': round(asked.hyper['SUBSET_RATIO'] * asked.patches)}), arrays=divprune_arrays
  ),
  'dymu': Recorded(runs=dymu_runs, arrays=dymu_arrays, answered=dymu_answered),
  'fastervlm': Recorded(runs=one('fastervlm', lambda asked: {'tokens': asked.hyper['visual_token_num']}), arrays=fastervlm_arrays),
  'prumerge': Recorded(runs=prumerge_runs, arrays=prumerge_arrays),
  'visionzip': Recorded(
    runs=one('visionzip', lambda asked: {k: asked.hyper[k] for k in ('dominant', 'contextual')}), arrays=visionzip_arrays
  ),
  'vispruner': Recorded(
    runs=one(
      'vispruner',
      lambda asked: {'tokens': asked.hyper['visual_token_num'], 'important_ratio': float(asked.hyper['important_ratio'])},
    ),
    arrays=vispruner_arrays,
  ),
  'vscan': Recorded(runs=vscan_runs, arrays=vscan_arrays, answered=vscan_answered),
}
