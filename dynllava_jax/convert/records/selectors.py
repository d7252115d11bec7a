"""Recomputes what was recorded of methods that rank image tokens by attention inside the decoder: FastV, PyramidDrop and SparseVLM.

Per cut: scores, the set, positions and the stream behind it; per decoded token: positions, cache lengths and logits of every layer.
A group with labels is a training step (`cut_training.py`).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dynllava_jax import methods
from dynllava_jax.config import DENSE, Stage
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import EXACT, LOGITS, Quantity, compare, in_range
from dynllava_jax.convert.records.bases import Base, Record
from dynllava_jax.convert.records.cut_training import training_groups, verify_training
from dynllava_jax.convert.records.decoded import Asked, Group, asked, decoded_groups, with_bases
from dynllava_jax.convert.records.described import NUMBER, NUMBERS, WHOLE, WHOLES
from dynllava_jax.convert.records.runs import Answer, Own, Runner, compare_run, compare_uncached, per_layer
from dynllava_jax.methods import sparsevlm

SCORE = 1e-6
BEFORE = {'fastv': 0, 'pyramiddrop': 0, 'sparsevlm': 1}  # how far in front of a cut is the layer by which a record calls it
NEEDED = {  # of every cut config: arrays, and arrays of each cut, NAME_LAYER
  'fastv': (('head_attention', 'scores', 'kept_image_index', 'position_ids', 'hidden_at_prune', 'position', 'cache_len'), ()),
  'pyramiddrop': (('position', 'cache_len'), ('scores', 'kept_image_index', 'hidden', 'position_ids')),
  'sparsevlm': (('rater_scores', 'raters', 'cache_len'), ('scores', 'kept', 'hidden')),
}
FASTV = re.compile(r'k(\d+)_r(\d+(?:\.\d+)?)$')  # layers that see everything, per cent of the image tokens that are dropped


def verify(record: Record, alone: bool = True, only: Sequence[str] = ()) -> Iterator[Quantity]:
  """Every quantity of a record of one of these methods; `only` some of its configs, `BASE/CONFIG`."""
  trained = [[group] for group in training_groups(record)]
  for base, (group,) in with_bases(record, trained, only):
    yield from verify_training(record, group, base, stages_of(record, group, base), alone)
  for base, groups in with_bases(record, decoded_groups(record, needed=not trained).values(), only):
    stages = stages_of(record, groups[0], base)
    runner = Runner(base.info.model, base.params, stages)
    yield from compare_run(record, groups, runner, base, arrays_of(record, stages), alone, needed(record, stages))
    if alone and stages != DENSE:
      yield from compare_uncached(record, groups, runner, base)
    for group in groups if alone else ():
      if f'{group.at}reprune/tokens' in record.case:
        yield from rechosen(record, group, runner, asked(record, base, group))


def stages_of(record: Record, group: Group, base: Base) -> tuple[Stage, ...]:
  """How a config of the record is run here; ConversionError if the record does not say."""
  image_tokens = methods.num_image_tokens(base.info.model)
  if group.config == 'dense':
    return DENSE
  if record.method == 'fastv':
    layer, dropped = fastv_setting(record, group)
    return Stage(), Stage(start=layer, selector='fastv', image_tokens=round(image_tokens * (1 - dropped)))
  if record.method == 'sparsevlm':
    return recycling_stages(record, group, image_tokens)
  pairs = record.pairs(('configs', group.setting), ('layer_list', WHOLES), ('image_token_ratio_list', NUMBERS))
  cuts = [Stage(start=layer, selector='pyramiddrop', image_keep_rate=ratio) for layer, ratio in pairs]
  return tuple(cuts) if cuts and cuts[0].start == 0 else (Stage(), *cuts)


def fastv_setting(record: Record, group: Group) -> tuple[int, float]:
  """(layers that see everything, share of the image tokens that is dropped) of a FastV config, by `meta.json` or by its name."""
  told = lambda name, kind: record.setting('configs', group.setting, name, kind=kind, default=None)
  layer, dropped, named = told('K', WHOLE), told('R', NUMBER), FASTV.match(group.config)
  if layer is None or dropped is None:
    if not named:
      raise ConversionError(f'{record.at}: config {group.config!r} of a FastV record, expected a name such as k2_r75')
    layer, dropped = int(named[1]), float(named[2]) / 100
  return layer, dropped


def recycling_stages(record: Record, group: Group, image_tokens: int) -> tuple[Stage, ...]:
  """A SparseVLM config, whose layers are those whose output is cut; of what is there, its authors always drop one at least."""
  stages, reached = [Stage()], image_tokens
  for layer, budget in record.pairs(('configs', group.setting), ('pruning_loc', WHOLES), ('budgets', WHOLES)):
    stages.append(Stage(start=layer + 1, selector='sparsevlm', image_tokens=min(budget, reached - 1)))
    reached = methods.stage_image_tokens(tuple(stages), image_tokens)[-1]
  return tuple(stages)


def needed(record: Record, stages: Sequence[Stage]) -> list[str]:
  """The arrays that a config of these stages has whatever its settings are."""
  once, of_cut = NEEDED[record.method]
  cuts = [stage.start - BEFORE[record.method] for stage in stages if stage.selector != 'all']
  return [*(once if cuts else ()), *(f'{name}_{layer}' for layer in cuts for name in of_cut)]


def arrays_of(record: Record, stages: Sequence[Stage]) -> Own:
  """The arrays of a cut by name; `NAME_LAYER` is about the stage that starts there, `NAME` about the last one.

  SparseVLM's layers are those before the cut.
  """
  by_layer = {str(s.start - BEFORE[record.method]): i for i, s in enumerate(stages)}

  def own(name: str, recorded: np.ndarray, answer: Answer) -> tuple[Any, float] | None:
    if name == 'position':
      return per_layer(answer.position, recorded), EXACT
    if name == 'cache_len':  # of every step, or of the prefill alone
      return per_layer(answer.cache_len, recorded) if recorded.ndim == 2 else answer.cache_len[0], EXACT
    if name in ('rater_scores', 'raters'):
      return raters(name, answer)
    trace, (first, _, layer) = answer.traces[-1], name.rpartition('_')
    if layer in by_layer:
      name, trace = first, answer.traces[by_layer[layer]]
    real = int(trace.length)
    if name == 'kept_image_index':
      return trace.kept_image, EXACT
    if name == 'position_ids':
      return trace.rotary[:real], EXACT
    if name in ('hidden', 'hidden_at_prune'):
      return trace.stream[:real][None] if recorded.ndim == 3 else trace.stream[:real], LOGITS
    if name in ('scores', 'head_attention') and trace.attention is None:
      raise ConversionError(f'{record.at}: array {name!r} of a group that is run without a cut')
    if name == 'scores':
      return trace.attention.mean(0), SCORE
    if name == 'head_attention':
      return trace.attention if recorded.ndim == 2 else trace.attention[0], SCORE
    if name in trace.of_selector:
      return trace.of_selector[name], LOGITS if name == 'merged' else EXACT
    return None

  return own


def raters(name: str, answer: Answer) -> tuple[Any, float]:
  """SparseVLM's scores of the text behind the image, or who rates, from the embeddings that the row began with."""
  first = answer.traces[0]
  rows = methods.Rows(jnp.asarray(first.length)[None], jnp.array([answer.image_start]), jnp.asarray(first.kept_image)[None])
  behind = slice(answer.image_start + rows.num_image, int(first.length))
  if name == 'rater_scores':
    return sparsevlm.rater_scores(first.entry[None], rows)[0, behind], SCORE
  return np.flatnonzero(sparsevlm.rater_weights(first.entry[None], rows, None)[0, behind]), EXACT


def rechosen(record: Record, group: Group, runner: Runner, prompt: Asked) -> Iterator[Quantity]:
  """FastV without a cache as its authors run it, choosing anew with every token, by the newest: here a prompt for each length."""
  at = f'{group.at}reprune/'
  tokens = record.given(f'{at}tokens', (None,), whole=True)
  in_range(record.at, f'{at}tokens', tokens, 0, runner.model.cfg.llama.vocab_size)
  growing = [Asked(np.concatenate([prompt.ids, tokens[:t]]), prompt.image) for t in range(len(tokens))]
  answers = runner.answer(growing, 1)
  yield compare(f'{at}tokens', [a.tokens[0] for a in answers], tokens, EXACT)
  yield compare(f'{at}kept_image_index', [a.traces[-1].kept_image for a in answers], record.array(f'{at}kept_image_index'), EXACT)
  yield compare(f'{at}logits', [a.logits[0] for a in answers], record.array(f'{at}logits'), LOGITS)
