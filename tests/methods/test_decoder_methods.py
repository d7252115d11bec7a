"""Methods inside the decoder: equal to their authors' code in any batch, and to the definition with grouped heads; wrong builds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from plain_decoder import layer

from dynllava_jax import cache, methods, presets
from dynllava_jax.config import ConfigError, Piece, Stage
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records import selectors
from dynllava_jax.convert.records.bases import Record, open_record
from dynllava_jax.convert.records.runs import Asked, Runner
from dynllava_jax.convert.verify import OF_METHODS
from dynllava_jax.methods import Chosen, fastv, look_m, pyramiddrop, redundancylens, sparsevlm
from dynllava_jax.models import reduction
from dynllava_jax.models.layer_types import Queries
from dynllava_jax.ops import attention, layout
from dynllava_jax.ops.selection import top_indices

RECORDS = {name: GOLDEN / 'methods' / name for name in ('fastv', 'pyramiddrop', 'sparsevlm', 'look_m', 'redundancylens')}
# A config of each method for every day, in a batch; the others and single rows are `slow`.
EVERYDAY = {
  'fastv': 'public_b/k2_r50',
  'pyramiddrop': 'public_b/three',
  'sparsevlm': 'public_b/two',
  'look_m': 'public_b/weighted_h20_r20',
  'redundancylens': 'public_b/both',
}


@pytest.fixture(scope='module')
def base():
  """The base that most configs were recorded with."""
  return open_record(RECORDS['fastv'], GOLDEN).base('public_b')


@pytest.fixture
def records(base, monkeypatch):
  """Records whose base is loaded once."""
  monkeypatch.setattr(Record, 'base', lambda self, named: base)
  return {name: open_record(folder, GOLDEN) for name, folder in RECORDS.items()}


@pytest.mark.parametrize('name', RECORDS)
def test_recorded_rows_in_a_batch(records, name):
  record, config = records[name], EVERYDAY[name]
  found = list(OF_METHODS[record.method](record, alone=False, only=[config]))
  assert [str(q) for q in found if not q.ok] == []
  compared = {q.name.removeprefix('in a batch: ') for q in found}
  assert [k for k in record.case if k.startswith(config) and k not in compared and 'reprune' not in k] == []


@pytest.mark.slow
@pytest.mark.parametrize('name', RECORDS)
def test_every_recorded_quantity_agrees(name):
  """What `--verify` does: all configs of both bases, alone and in a batch, with a cache and without. Training is not among it."""
  pytest.importorskip('torch', reason='reading the recorded .bin checkpoint needs torch')
  record = open_record(RECORDS[name], GOLDEN)
  found = list(OF_METHODS[record.method](record))
  assert [str(q) for q in found if not q.ok] == []
  compared = {q.name.rpartition(': ')[2] for q in found}
  assert [k for k in record.case if k not in compared and '/train/' not in k] == []


def over_text(embeddings, rows, options):
  """Every text row alike, instead of the last."""
  text = rows.is_real(embeddings.shape[1]) & ~rows.is_image(embeddings.shape[1])
  return text / text.sum(-1, keepdims=True)


def by(score):
  """A FastV that ranks by another number of the attention float32[B, N, P]."""
  return lambda inputs, budget, options: Chosen(index=top_indices(score(inputs.attention), budget))


def changed(piece, **fields):
  return lambda patch, table: patch.setitem(
    table, next(k for k, v in table.items() if v is piece), dataclasses.replace(piece, **fields)
  )


def patched(place, name, value):
  return lambda patch, table: patch.setattr(place, name, value)


def relative_ratios(patch, table):
  """Shares of what reaches a cut, instead of all image tokens."""
  original = selectors.stages_of

  def stages_of(record, group, base):
    stages, share, made = original(record, group, base), 1.0, []
    for stage in stages:
      share *= stage.image_keep_rate
      made.append(dataclasses.replace(stage, image_keep_rate=share))
    return tuple(made)

  patch.setattr(selectors, 'stages_of', stages_of)


def own_similarity(seen, options):
  """Values merged where values are most alike, instead of keys."""
  kept = look_m.compress(seen, options)
  return dataclasses.replace(kept, v=look_m.compress(dataclasses.replace(seen, k=seen.v), options).v)


def means_in_front(inputs, budget, options):
  """The same rows in another order."""
  chosen = sparsevlm.select(inputs, budget, options)
  rows = jnp.concatenate([chosen.more, layout.gather_rows(inputs.image_hidden, chosen.index)], 1)
  return dataclasses.replace(chosen, vectors=rows[:, :budget], more=rows[:, budget:])


def sums(inputs, budget, options):
  """Clusters added up."""
  chosen = sparsevlm.select(inputs, budget, options)
  sizes = (chosen.details['assign'][:, None] == jnp.arange(chosen.more.shape[1])[:, None]).sum(-1, keepdims=True)
  return dataclasses.replace(chosen, more=chosen.more * sizes)


def raters_of_the_stream(state, image_start, prompt_length, weight):
  """Chosen by hidden states, instead of once by what enters the decoder."""
  reached = state.image_index.shape[1]
  weight = sparsevlm.rater_weights(state.x, state.rows(image_start), None)
  text = layout.text_places(image_start, reached, state.x.shape[1] - reached)
  return Queries(text, layout.gather_rows(weight, text))


def a_layer_early(patch, table):
  """The layer's own attention, but the layer itself no longer sees what is cut."""
  original = selectors.stages_of
  early = lambda stage: dataclasses.replace(stage, start=max(stage.start - 1, 0))
  patch.setattr(selectors, 'stages_of', lambda *a: tuple(map(early, original(*a))))
  patch.setitem(table, 'sparsevlm', dataclasses.replace(sparsevlm.SELECTOR, attention='entering'))


def all_rows(num_image, probes):
  return [i // 2 for i in redundancylens_probes(num_image, probes)]


redundancylens_probes, rater_scores = redundancylens.probe_places, sparsevlm.rater_scores
top, slow = 'kept_image_index', pytest.mark.slow
# Wrong builds: what they change, and an array that must notice it.
WRONG = {
  'fastv: the layer behind the cut': ('fastv', changed(fastv.SELECTOR, attention='entering'), top),
  'fastv: mean over queries': ('fastv', changed(fastv.SELECTOR, query_weight=over_text), top),
  'fastv: over the image alone': (
    'fastv',
    changed(fastv.SELECTOR, select=by(lambda a: (a / a.sum(-1, keepdims=True)).mean(1))),
    top,
  ),
  'fastv: largest head': ('fastv', changed(fastv.SELECTOR, select=by(lambda a: a.max(1))), top),
  'pyramiddrop: the layer before': ('pyramiddrop', changed(pyramiddrop.SELECTOR, attention='previous'), 'kept_image_index_1'),
  'pyramiddrop: positions kept': ('pyramiddrop', changed(pyramiddrop.SELECTOR, renumbers=lambda options: False), 'position_ids_1'),
  'pyramiddrop: relative ratios': ('pyramiddrop', relative_ratios, 'kept_image_index_2'),
  'sparsevlm: the layer behind the cut': ('sparsevlm', changed(sparsevlm.SELECTOR, attention='entering'), 'scores_1'),
  'sparsevlm: cut before the layer': ('sparsevlm', a_layer_early, 'hidden_1'),
  'sparsevlm: raters of hidden states': ('sparsevlm', patched(reduction, 'ranking_queries', raters_of_the_stream), 'scores_2'),
  'sparsevlm: all text rates': ('sparsevlm', changed(sparsevlm.SELECTOR, query_weight=over_text), 'scores_1'),
  'sparsevlm: text before the image rates': (
    'sparsevlm',
    patched(sparsevlm, 'behind_image', lambda rows, size: rows.is_real(size) & ~rows.is_image(size)),
    'scores_1',
  ),
  'sparsevlm: raters by sums over the image': (
    'sparsevlm',
    patched(sparsevlm, 'rater_scores', lambda x, rows: rater_scores(x, rows) * rows.num_image),
    'rater_scores',
  ),
  'sparsevlm: sums of clusters': ('sparsevlm', changed(sparsevlm.SELECTOR, select=sums), 'hidden_1'),
  'sparsevlm: means in front': ('sparsevlm', changed(sparsevlm.SELECTOR, select=means_in_front), 'hidden_1'),
  'sparsevlm: positions kept': ('sparsevlm', changed(sparsevlm.SELECTOR, renumbers=lambda options: False), 'hidden_2'),
  'look_m: values by their own similarity': ('look_m', changed(look_m.COMPRESSOR, compress=own_similarity), 'v'),
  'look_m: text ranked with images': ('look_m', patched(methods.Rows, 'is_image', methods.Rows.is_real), 'keep'),
  'redundancylens: window one wider': (
    'redundancylens',
    patched(redundancylens, 'hollow_attention', lambda *a: attention.hollow_attention(*a[:-1], a[-1] + 1)),
    'attention_output_1',
  ),
  'redundancylens: other probes': ('redundancylens', patched(redundancylens, 'probe_places', all_rows), 'channels_2'),
  'redundancylens: signed activations': ('redundancylens', patched(redundancylens.jnp, 'abs', lambda x: x), 'channels_2'),
}
EVERY_DAY = (
  'fastv: mean over queries',
  'pyramiddrop: positions kept',
  'sparsevlm: means in front',
  'look_m: values by',
  'redundancylens: window',
)


def first_tokens(record, config, count):
  """The arrays of a config, of so many decoded tokens; `cache_len` is of each token in some records, of each layer in others."""
  left = {}
  for key, array in record.case.items():
    at, _, name = key.rpartition('/')
    if key.startswith(config):
      steps = len(record.case[f'{at}/tokens'])
      cut = name in ('tokens', 'logits', 'position') or (name == 'cache_len' and len(array) == steps)
      left[key] = array[: count - (name == 'position')] if cut else array
  return left


@pytest.mark.parametrize('wrong', [pytest.param(w, marks=() if w.startswith(EVERY_DAY) else slow) for w in WRONG])
def test_a_wrong_build_fails(records, monkeypatch, wrong):
  name, change, array = WRONG[wrong]
  config = EVERYDAY[name]
  table = {'look_m': methods.COMPRESSORS, 'redundancylens': methods.LAYER_KINDS}.get(name, methods.SELECTORS)
  change(monkeypatch, table)
  record = records[name]
  prefill = first_tokens(record, config, 1)
  record = dataclasses.replace(record, case=prefill)
  try:
    found = {q.name: q.ok for q in OF_METHODS[record.method](record, alone=False, only=[config])}
  except ConversionError as e:  # another number of tokens, or arrays of another layer than the recorded ones
    assert 'has shape' in str(e) or ('before the layer' in wrong and "scores_0' is missing" in str(e))
    return
  assert not all(
    found[f'in a batch: {config}/{prompt}/{array}'] for prompt in ('b1', 'b1s') if f'{config}/{prompt}/{array}' in prefill
  )


def test_decoding_at_the_conversations_position_fails(records, monkeypatch):
  """The token fed after a renumbering cut stands right behind the stage's cache, not at its place in the conversation."""
  monkeypatch.setattr(cache, 'rotary_positions', lambda stage, position: position)
  record = records['pyramiddrop']
  config = EVERYDAY['pyramiddrop']
  record = dataclasses.replace(record, case=first_tokens(record, config, 3))
  found = {q.name: q.ok for q in OF_METHODS[record.method](record, alone=False, only=[config])}
  assert not found[f'in a batch: {config}/b1/logits']


# Grouped queries, which no recorded base has: against the plain decoder, on the tiny preset with 4 query and 2 kv heads.
CFG = presets.TINY.llama
P = presets.TINY.vision.num_patches


@pytest.fixture(scope='module')
def grouped(tiny_params):
  rng = np.random.default_rng(4)
  ids = np.array([1, 5, 9, -200, 11, 3, 2, 40, 17, 23, 31, 8])
  image = rng.normal(0, 1, (P, CFG.hidden_size)).astype(np.float32)
  embedding = np.asarray(tiny_params['llama']['embedding'], np.float64)
  x = np.concatenate([embedding[ids[:3]], image, embedding[ids[4:]]])
  return Asked(ids, image), Asked(np.array([1, 7, 4, 30]), None), x


def test_grouped_queries_fastv_and_pyramiddrop(tiny_params, grouped):
  prompt, text_only, x = grouped
  stages = (Stage(), Stage(start=1, selector='fastv', image_tokens=9), Stage(start=2, selector='pyramiddrop', image_tokens=5))
  (_, answer) = Runner(presets.TINY, tiny_params, stages).answer([text_only, prompt], 1)
  llama, positions = tiny_params['llama'], np.arange(len(x))
  x, weights, _, _ = layer(x, llama, 0, CFG, positions)
  scores = weights[:, -1, 3 : 3 + P].mean(0)
  first, second = answer.traces[1:]
  np.testing.assert_allclose(first.attention.mean(0), scores, atol=1e-6)
  kept = np.sort(np.argsort(-scores, kind='stable')[:9])
  np.testing.assert_array_equal(first.kept_image, kept)
  rest = np.r_[0:3, 3 + kept, 3 + P : len(x)]
  x, _, _, _ = layer(x[rest], llama, 1, CFG, rest)
  scores = layer(x, llama, 2, CFG, rest)[1][:, -1, 3:12].mean(0)
  np.testing.assert_allclose(second.attention.mean(0), scores, atol=1e-6)
  again = np.sort(np.argsort(-scores, kind='stable')[:5])
  np.testing.assert_array_equal(second.kept_image, kept[again])
  x = x[np.r_[0:3, 3 + again, 12 : len(x)]]
  for index in (2, 3):
    x, _, _, _ = layer(x, llama, index, CFG, np.arange(len(x)))
  np.testing.assert_allclose(answer.hidden, x, atol=1e-4)


def test_grouped_queries_look_m(tiny_params, grouped):
  """Pivot merges of every layer, with the scores of a group added, from the definition one entry after the other."""
  prompt, text_only, x = grouped
  piece = Piece('look_m', {'hh_ratio': 0.6, 'recent_ratio': 0.2})
  (_, answer) = Runner(presets.TINY, tiny_params, (Stage(compressor=piece),)).answer([text_only, prompt], 1)
  size, group = len(x), CFG.num_heads // CFG.num_kv_heads
  important, recent = int(size * 0.6), int(size * 0.2)
  for index in range(CFG.num_layers):
    x, weights, k, v = layer(x, tiny_params['llama'], index, CFG, np.arange(size))
    scores = weights.sum(1).reshape(-1, group, size).sum(1)
    for head in range(CFG.num_kv_heads):
      keep = np.ones(size, bool)
      window = np.arange(size) >= size - recent
      candidates = [j for j in range(3, 3 + P) if not window[j]]
      quota = important - (~window).sum() + len(candidates)
      keep[sorted(candidates, key=lambda j: -scores[head, j])[quota:]] = False
      kept = np.flatnonzero(keep)
      unit = k[head] / np.linalg.norm(k[head], axis=-1, keepdims=True)
      to = {j: kept[np.argmax(unit[kept] @ unit[j])] for j in np.flatnonzero(~keep)}
      for ours, full in ((answer.k[0], k[head]), (answer.v[0], v[head])):
        sources = {p: [(full[j] + full[p]) / 2 for j in to if to[j] == p] for p in kept}
        merged = [(full[p] + sum(sources[p])) / (1 + len(sources[p])) for p in kept]
        np.testing.assert_allclose(ours[index, :, head], merged, atol=1e-5)


def compressed(arrays, rows, options):
  return jax.jit(lambda *arrays: look_m.compress(methods.Observed(*arrays, rows), options))(*arrays)


@pytest.mark.parametrize('merge', look_m.MERGES)
def test_look_m_keeps_what_is_nobodys_pivot_bitwise_and_everything_if_there_is_room(tiny_params, merge):
  rng = np.random.default_rng(1)
  make = lambda heads: jnp.asarray(rng.normal(0, 1, (2, 20, heads, 8)), jnp.bfloat16)
  rows = methods.Rows(jnp.array([20, 6]), jnp.array([2, -1]), jnp.broadcast_to(jnp.arange(12), (2, 12)))
  q, k, v = make(4), make(2), make(2)
  options = lambda hh, recent: look_m.Options(hh_ratio=hh, recent_ratio=recent, merge=merge)
  left = compressed((q, q, k, v), rows, options(0.5, 0.2))
  assert left.length.tolist() == [14, 6]
  np.testing.assert_array_equal(left.k[1, :6], k[1, :6])
  for head in range(2):
    keep, pivot = np.asarray(left.details['keep'][0, head]), np.asarray(left.details['pivot'][0, head])
    free = np.setdiff1d(np.arange(keep.sum()), pivot[~keep])
    assert len(free) > 0
    np.testing.assert_array_equal(left.k[0, free, head], k[0, np.flatnonzero(keep)[free], head])
  whole = compressed((q, q, k, v), rows, options(0.9, 0.1))
  np.testing.assert_array_equal(whole.k[0], k[0])


def test_look_m_ranks_in_float32_whatever_the_dtype(tiny_params):
  """The authors' offset makes all image scores equal in bfloat16; the set is that of float32 sums of the same queries and keys."""
  rng = np.random.default_rng(2)
  make = lambda heads: jnp.asarray(rng.normal(0, 0.1, (1, 120, heads, 8)), jnp.bfloat16)
  rows = methods.Rows(jnp.array([120]), jnp.array([4]), jnp.arange(100)[None])
  q, k = make(2), make(2)
  options = look_m.Options(hh_ratio=0.5, recent_ratio=0.1)
  low = compressed((q, q, k, k), rows, options)
  wide = compressed([x.astype(jnp.float32) for x in (q, q, k, k)], rows, options)
  np.testing.assert_array_equal(low.details['keep'], wide.details['keep'])


def test_a_window_and_channels_wide_enough_change_nothing(tiny_params, grouped):
  prompt, text_only, _ = grouped
  every = tuple(range(CFG.num_layers))
  piece = Piece('redundancylens', {'attention_layers': every, 'attention_range': P, 'ffn_layers': every, 'channel_ratio': 1.0})
  run = lambda stages: Runner(presets.TINY, tiny_params, stages).answer([text_only, prompt], 1)
  for plain, reduced in zip(run((Stage(),)), run((Stage(layers=piece),))):
    np.testing.assert_allclose(reduced.hidden, plain.hidden, atol=1e-5)
    np.testing.assert_allclose(reduced.k[0], plain.k[0], atol=1e-5)


@pytest.mark.parametrize(
  'stages, message',
  [
    ((Stage(selector='fastv', image_keep_rate=0.5),), 'stage at layer 0: fastv ranks by the attention of the layer before'),
    ((Stage(), Stage(start=1, selector='pyramiddrop', image_keep_rate=0.5, options={'renumbr': False})), "did you mean 'renumber'"),
    ((Stage(compressor=Piece('look_m', {'hh_ratio': 1.5})),), 'hh_ratio is 1.5, expected a share from 0 to 1'),
    ((Stage(compressor=Piece('look_m', {'merge': 'mean'})),), "merge 'mean' is unknown; expected one of pivot, weighted, average"),
    ((Stage(layers=Piece('redundancylens', {'ffn_layers': (4,)})),), 'ffn_layers name layer 4, the decoder has 4, 0 to 3'),
    (
      (
        Stage(layers=Piece('redundancylens', {'attention_layers': (0, 3)})),
        Stage(start=2, selector='uniform', image_keep_rate=0.5),
      ),
      r'redundancylens names attention layers \[3\], the stage has 0 to 1',
    ),
    ((Stage(layers=Piece('redundancylens', {'attention_range': 0})),), 'attention_range is 0, expected at least 1'),
  ],
)
def test_what_cannot_be_run_is_refused_in_one_line(stages, message):
  with pytest.raises(ConfigError, match=message) as e:
    methods.check_run(presets.TINY, stages)
  assert '\n' not in str(e.value)
