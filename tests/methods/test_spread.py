"""Reducers that choose for difference (DivPrune, VisPruner, VScan) and pooling: against plain loops, and what they must not be."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tower_records import RECORDS, base, case, towers

from dynllava_jax import costs, methods, presets
from dynllava_jax.config import DENSE, ConfigError, Piece, Stage
from dynllava_jax.convert.records.bases import Record, open_record, samples
from dynllava_jax.convert.records.reducer_arrays import RECORDED, Asking
from dynllava_jax.convert.records.reduction import Reduction
from dynllava_jax.methods import divprune, dpp, pool, vispruner, vscan
from dynllava_jax.methods.base import KeptPatches, TowerOutput

ROWS = ('s0', 's1')


def cosines(x, y):
  unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
  return unit(np.asarray(x, np.float64)) @ unit(np.asarray(y, np.float64)).T


def max_min(distance, count, start='lonely', last_only=False):
  """DivPrune's loop; or with another first token, or with the distance to the last chosen token alone."""
  first = {'lonely': np.sort(distance, 0)[1].argmax(), 'zero': 0, 'mean': distance.mean(0).argmax()}[start]
  chosen = [int(first)]
  while len(chosen) < count:
    nearest = distance[chosen[-1:] if last_only else chosen].min(0)
    nearest[chosen] = -np.inf
    chosen.append(int(nearest.argmax()))
  return chosen


WRONG_SPREADS = {
  None: lambda row: max_min(1 - cosines(*[case('divprune')[f'{row}/projected']] * 2), 16),
  'first is token 0': lambda row: max_min(1 - cosines(*[case('divprune')[f'{row}/projected']] * 2), 16, 'zero'),
  'last one alone': lambda row: max_min(1 - cosines(*[case('divprune')[f'{row}/projected']] * 2), 16, last_only=True),
  'tower features': lambda row: max_min(1 - cosines(*[towers().features[ROWS.index(row)]] * 2), 16),
}


@pytest.mark.parametrize('wrong', WRONG_SPREADS)
def test_divprune_spreads_as_recorded(wrong):
  same = [WRONG_SPREADS[wrong](row) == case('divprune')[f'{row}/selection_order'].tolist() for row in ROWS]
  assert same == ([True, True] if wrong is None else [False, False])


def test_divprune_among_equal_tokens_and_rows_of_other_kinds():
  """Equal tokens give different indices, zeros (no image) numbers, and scores never rise behind the first."""
  tokens = np.random.default_rng(0).normal(size=(4, 12, 8)).astype(np.float32)
  tokens[1], tokens[2], tokens[3, 6:] = tokens[1, :1], 0, tokens[3, :6]
  order, score = jax.jit(lambda x: divprune.spread(divprune.distances(x), 12))(tokens)
  assert all(sorted(row) == list(range(12)) for row in order.tolist())
  assert np.isfinite(score).all() and (np.diff(score[:, 1:]) <= 1e-6).all()
  alone = 1 - cosines(tokens[0], tokens[0])
  assert order[0].tolist() == max_min(alone, 12) != max_min(alone, 12, 'mean')  # in both recorded images they start alike
  assert sorted(order[3, :6] % 6) == list(range(6))


@pytest.mark.parametrize('wrong', [None, 'plus sign', 'tower features', 'no question'])
def test_dpp_chooses_as_recorded_for_kernels_with_a_question(wrong):
  """CDPruner's kernel is likeness scaled on both sides by relevance; what it is made of matters."""
  same = []
  for i, row in enumerate(ROWS):
    recorded = {k: case('cdpruner')[f'{row}/{k}'] for k in ('projected', 'relevance', 'kernel', 'selection_order')}
    relevance = recorded['relevance']
    relevance = {'plus sign': relevance.max() + 1e-3 - relevance, 'no question': np.ones(64)}.get(wrong, relevance)
    alike = cosines(*[towers().features[i] if wrong == 'tower features' else recorded['projected']] * 2)
    kernel = (relevance[:, None] * alike * relevance).astype(np.float32)
    if wrong is None:
      np.testing.assert_allclose(kernel, recorded['kernel'], atol=1e-5)
    order, gain = jax.jit(dpp.greedy, static_argnums=1)(kernel[None], 14)
    assert (np.diff(gain) <= 1e-6).all()
    same.append(order[0].tolist() == recorded['selection_order'].tolist())
  assert all(same) if wrong is None else not any(same)


def test_dpp_beyond_the_rank_and_among_orthogonal_tokens():
  draw = np.random.default_rng(0).normal(size=(2, 12, 3)).astype(np.float32)
  features = jnp.concatenate([draw, np.zeros((1, 12, 3)), np.eye(12, 3)[None]]).astype(jnp.float32)
  reduced = dpp.reduce(TowerOutput(features), lambda x: x, KeptPatches(tokens=9))
  assert np.isfinite(reduced.tokens).all() and (np.diff(reduced.index, axis=1) > 0).all()
  order, _ = dpp.greedy(jnp.eye(12)[None], 5)
  assert order[0].tolist() == [0, 1, 2, 3, 4]


def test_divprune_rounds_the_share_as_python_does():
  asking = lambda share: Asking(Record(Path(), None, {'hyper': {'SUBSET_RATIO': share}}, {}), base(), 's0', None)
  tokens = lambda share: dict(RECORDED['divprune'].runs(asking(share))[0].reducer.options)['tokens']
  assert [tokens(15.7 / 64), tokens(14.5 / 64), tokens(15.5 / 64)] == [16, 14, 16]


def rounds(similarity, order, wanted, survivors='falling', drop='most', first='survivors', leave=8):
  """VisPruner's loop over patches in falling order of attention; odd counts have one more in the first half."""
  residual = list(order)
  while wanted and len(residual) > wanted:
    m = min(leave, len(residual) - wanted, len(residual) // 2)
    a, b = residual[0::2], residual[1::2]
    alike = similarity[np.ix_(a, b)].max(1)
    falling = np.argsort(-alike, kind='stable')
    stay = falling[m:] if drop == 'most' else falling[: len(a) - m]
    stay = [a[i] for i in (np.sort(stay) if survivors == 'as before' else stay)]
    residual = b + stay if first == 'others' else stay + b
  return residual[:wanted]


WRONG_ROUNDS = {
  None: {},
  'order of places': {},
  'survivors as before': dict(survivors='as before'),
  'least similar dropped': dict(drop='least'),
  'others in front': dict(first='others'),
  '7 in a round': dict(leave=7),
  'projected tokens': {},
}


@pytest.mark.parametrize('wrong', WRONG_ROUNDS)
def test_vispruner_removes_duplicates_as_recorded(wrong):
  same = []
  for row in ROWS:
    recorded = {k: case('vispruner')[f'{row}/{k}'] for k in ('cls_attention', 'tower_features', 'diverse_index')}
    alike = case('divprune')[f'{row}/projected'] if wrong == 'projected tokens' else recorded['tower_features']
    order = np.argsort(-recorded['cls_attention'], kind='stable')[12:]
    order = np.sort(order) if wrong == 'order of places' else order
    same.append(sorted(rounds(cosines(alike, alike), order, 12, **WRONG_ROUNDS[wrong])) == recorded['diverse_index'].tolist())
  assert all(same) if wrong is None else not all(same)


@pytest.mark.parametrize(
  'patches, tokens, ratio', [(36, 17, 0.5), (25, 9, 0.3), (16, 3, 0.0), (16, 16, 0.5), (16, 5, 1.0), (9, 1, 0.9)]
)
def test_vispruner_with_odd_counts(patches, tokens, ratio):
  rng = np.random.default_rng(patches)
  features, attention = rng.normal(size=(2, patches, 6)).astype(np.float32), rng.random((2, 3, patches), np.float32)
  tower, options = (
    TowerOutput(jnp.asarray(features), class_attention={4: attention}),
    vispruner.Options(tokens=tokens, important_ratio=ratio),
  )
  important, diverse = jax.jit(vispruner.choose, static_argnums=1)(tower, options)
  for i in range(2):
    order = np.argsort(-attention[i].mean(0), kind='stable')
    assert important[i].tolist() == order[: int(tokens * ratio)].tolist()
    assert diverse[i].tolist() == rounds(
      cosines(features[i], features[i]), order[int(tokens * ratio) :], tokens - int(tokens * ratio)
    )
  kept = vispruner.reduce(tower, lambda x: x, options).index
  assert kept.shape == (2, tokens) and (np.diff(kept, axis=1) > 0).all()


def scan(row, shallow=1, windows='blocks', first='local', merge='projected', mean='with'):
  """VScan's first stage in a plain way, 24 of 8 x 8 patches, windows of 4 x 4: (local, global, tokens)."""
  i = ROWS.index(row)
  near, far = (np.asarray(towers().class_attention[b][i]).mean(0) for b in (shallow, 4))
  projected = case('divprune')[f'{row}/projected']
  places = np.arange(64).reshape(2, 4, 2, 4) if windows == 'blocks' else np.arange(64).reshape(4, 2, 4, 2).transpose(1, 0, 3, 2)
  places = places.transpose(0, 2, 1, 3).reshape(4, 16)
  if first == 'global':
    everywhere = np.argsort(-far, kind='stable')[:12]
    near = near.copy()
    near[everywhere] = 0
  local = np.concatenate([w[np.argsort(-near[w], kind='stable')[:3]] for w in places])
  if first == 'local':
    far = far.copy()
    far[local] = 0
    everywhere = np.argsort(-far, kind='stable')[:12]
  kept = np.sort(np.concatenate([local, everywhere]))
  alike = projected if merge == 'projected' else np.asarray(towers().features[i])
  rest = np.setdiff1d(np.arange(64), kept)
  into = cosines(alike[rest], alike[kept]).argmax(1)
  tokens = []
  for j, k in enumerate(kept):
    absorbed = projected[rest[into == j]]
    own = [projected[k]] if mean == 'with' or not len(absorbed) else []
    tokens.append(np.concatenate([own, absorbed] if own else [absorbed]).mean(0))
  return sorted(local), sorted(everywhere), np.stack(tokens)


WRONG_SCANS = {
  None: {},
  'deep in windows': dict(shallow=4),
  'windows of every other patch': dict(windows='strided'),
  'global before local': dict(first='global'),
  'merged by tower features': dict(merge='features'),
  'mean without the kept token': dict(mean='without'),
}


@pytest.mark.parametrize('wrong', WRONG_SCANS)
def test_vscan_chooses_and_merges_as_recorded(wrong):
  for row in ROWS:
    local, everywhere, tokens = scan(row, **WRONG_SCANS[wrong])
    recorded = {k: case('vscan')[f'{row}/{k}'] for k in ('local_index', 'global_index', 'projected')}
    same = local == sorted(recorded['local_index']) and everywhere == sorted(recorded['global_index'])
    assert (same and np.abs(tokens - recorded['projected']).max() < 1e-4) == (wrong is None)


def test_vscan_counts_what_the_windows_give_and_keeps_all_as_they_are():
  model = presets.LLAVA_1_5_7B
  count = lambda **options: methods.num_image_tokens(model, Piece('vscan', options))
  assert [count(tokens=100), count(tokens=96), count(tokens=576), count(tokens=1), count(tokens=31)] == [98, 96, 576, 1, 16]
  plain = lambda x: 2 * x
  for tokens, window in ((64, 4), (20, 8), (3, 4)):
    reduced = vscan.reduce(towers(), plain, vscan.Options(tokens=tokens, window=window, shallow=1))
    small = Piece('vscan', {'tokens': tokens, 'window': window, 'shallow': 1})
    assert reduced.tokens.shape[1] == methods.num_image_tokens(base().info.model, small)
    if tokens == 64:
      np.testing.assert_array_equal(reduced.tokens, plain(towers().features))
    if window == 8:  # one window: the best of the shallow row
      kept = np.argsort(-np.asarray(towers().class_attention[1]).mean(1), axis=1, kind='stable')[:, :10]
      assert all(set(a) <= set(b) for a, b in zip(kept.tolist(), reduced.index.tolist()))


@pytest.mark.slow
@pytest.mark.parametrize('renumber', [True, False])
def test_the_second_cut_of_vscan_renumbers(renumber):
  record = open_record(RECORDS / 'vscan', None)
  prompt = samples(record, base(), record.meta['base_model']['inputs'])['s0']
  stages = (Stage(), Stage(start=2, selector='pyramiddrop', image_tokens=8, options={'renumber': renumber}))
  run = Reduction(base(), Piece('vscan', {'tokens': 24, 'window': 4, 'shallow': 1}), stages=stages)
  off = np.abs(run([prompt], [1])[0].answer.prefill_logits - record.case['s0/logits']).max()
  assert off < 1e-4 if renumber else off > 0.1


@pytest.mark.slow
@pytest.mark.parametrize('reducer', [Piece('divprune', {'tokens': 64}), Piece('vscan', {'tokens': 64, 'window': 4, 'shallow': 1})])
def test_a_budget_of_all_patches_is_dense(reducer):
  model, pixels = base().info.model, jnp.asarray(base().case['pixel_values']).transpose(0, 2, 3, 1)[:2]
  run = Reduction(base(), reducer)
  reduced, _ = run.look(pixels)
  dense = run.decoder.model.clone(reducer=None).apply({'params': run.decoder.params}, pixels, method='encode_images')
  assert methods.num_image_tokens(model, reducer) == 64
  np.testing.assert_allclose(reduced.tokens, dense, atol=1e-5)


@pytest.mark.parametrize('side, window', [(4, 2), (5, 2), (3, 4), (5, 1)])
def test_pooling_of_grids_that_squares_do_not_divide(side, window):
  grid = np.random.default_rng(side).normal(size=(2, side, side, 3)).astype(np.float32)
  cells = range(0, side, window)
  means = [grid[:, y : y + window, x : x + window].mean((1, 2)) for y in cells for x in cells]
  reduced = pool.reduce(TowerOutput(jnp.asarray(grid.reshape(2, -1, 3))), lambda x: 2 * x, pool.Options(window=window))
  np.testing.assert_allclose(reduced.tokens, 2 * np.stack(means, 1), atol=1e-6)
  assert reduced.index[1].tolist() == [y * side + x for y in cells for x in cells]
  vision = dataclasses.replace(presets.TINY.vision, image_size=side * presets.TINY.vision.patch_size)
  model = dataclasses.replace(presets.TINY, vision=vision)
  assert methods.num_image_tokens(model, Piece('pool', {'window': window})) == len(means)


def test_costs_of_each():
  """Projectors behind the choice see what it leaves, those in front of it all patches."""
  model, every = presets.LLAVA_1_5_7B, costs.vision_flops(presets.LLAVA_1_5_7B)
  per_token = 2 * (1024 * 4096 + 4096**2)
  for name, options in (('divprune', {'tokens': 64}), ('dpp', {'tokens': 64}), ('vscan', {'tokens': 64})):
    assert costs.vision_flops(model, Piece(name, options)) == every
  for piece, left in ((Piece('vispruner', {'tokens': 64}), 64), (Piece('pool'), 144)):
    assert every - costs.vision_flops(model, piece) == pytest.approx((576 - left) * per_token)
    assert costs.paper_setting(model, DENSE, piece).tokens_per_layer == (left,) * 32


@pytest.mark.parametrize(
  'reducer, message',
  [
    (Piece('divprune', {'tokens': 17}), 'divprune: tokens is 17, the tower has 16 patches'),
    (Piece('dpp', {'tokens': 17}), 'dpp: tokens is 17, the tower has 16 patches'),
    (Piece('divprune', {'tokens': 0}), 'tokens is 0, expected a positive number'),
    (Piece('vispruner', {'tokens': 17}), 'vispruner: tokens is 17, the tower has 16 patches'),
    (Piece('vispruner', {'tokens': 4, 'important_ratio': 1.5}), 'important_ratio is 1.5, expected a share'),
    (Piece('vscan', {'tokens': 8}), 'vscan: window is 6, of which the 4 x 4 patches of the tower hold no whole number'),
    (Piece('vscan', {'tokens': 8, 'window': 2}), 'vscan: looks at block 5 of the vision tower'),
    (Piece('vscan', {'tokens': 8, 'window': 0}), 'window is 0, expected a positive number of patches'),
    (Piece('pool', {'window': 0}), 'window is 0, expected a positive number of patches'),
  ],
)
def test_what_cannot_run_is_refused_in_one_line(reducer, message):
  with pytest.raises(ConfigError, match=message) as error:
    methods.check_run(presets.TINY, DENSE, reducer)
  assert '\n' not in str(error.value)
