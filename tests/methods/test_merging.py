"""Reducers that merge by what the tower does, PruMerge and DyMU: equal to their authors' code, and what they must not be."""

import contextlib
import dataclasses
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tower_records import RECORDS, base, case, towers

from dynllava_jax import costs, methods, presets
from dynllava_jax.config import DENSE, IMAGE_ID, ConfigError, Piece, Stage
from dynllava_jax.convert.records.bases import open_record
from dynllava_jax.convert.records.runs import Asked, Runner
from dynllava_jax.generate import Generator
from dynllava_jax.methods import __main__ as program
from dynllava_jax.methods import divprune, dymu, pool, prumerge, vispruner, vscan
from dynllava_jax.methods.base import KeptPatches, MergedTokens, TowerOutput
from dynllava_jax.models import clip, reduction
from dynllava_jax.models.clip import VisionTower
from dynllava_jax.models.dynllava import Prompt
from dynllava_jax.ops import layout

FIXED = prumerge.Options(centres=8)
PLUS = prumerge.PlusOptions(centres=8, strided=8, stride=8, first=4)

# What no run here can equal: a patch that the authors' code takes twice, a block that is not run, how thresholds were found;
# and the stream behind one layer, which is seen in the logits.
LEFT = {
  'prumerge': r'prumerge_plus_fixed/s0/\w+',
  'dymu': r'\w+/\w+/(group|size|hidden)/5|\w+/\w+/tokens_per_block|\w+/\w+/vtu/hidden_after_layer_0|find/\w+|threshold/thresholds',
}


@pytest.mark.slow
@pytest.mark.parametrize('name', LEFT)
def test_every_recorded_quantity_agrees(name):
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    assert program.verify(str(RECORDS / name), None)
  *lines, total = printed.getvalue().splitlines()
  reasons = [line for line in lines if line.startswith('not compared: ')]
  lines = lines[: -len(reasons)]
  left = [key for line in reasons for key in line.removeprefix('not compared: ').partition(' (')[0].split(', ')]
  assert all(re.fullmatch(LEFT[name], key) for key in left) and 'nothing here knows' not in str(reasons)
  compared = {line.split()[0] for line in lines if not line.startswith('in a batch')}
  assert compared | set(left) == {*open_record(RECORDS / name, None).case}
  assert total == f'verify: {2 * len(compared)} of {2 * len(compared)} passed'


@pytest.fixture(scope='module')
def above() -> TowerOutput:
  """Features of both recorded images, with query and keys of the block above."""
  seen = towers()
  params = jax.tree.map(lambda w: w[0], base().params['vision_tail']['layers'])
  query, keys = clip.next_block(params, jnp.concatenate([seen.class_feature[:, None], seen.features], 1), base().info.model.vision)
  return dataclasses.replace(seen, next_query=query, next_keys=keys)


def block_below(tower):
  """Query and keys of block L-2, of what it sees: here of its output's, which is as wrong."""
  params = jax.tree.map(lambda w: w[-1], base().params['vision']['layers'])
  x = jnp.concatenate([tower.class_feature[:, None], tower.features], 1)
  query, keys = clip.next_block(params, x, base().info.model.vision)
  return dataclasses.replace(tower, next_query=query, next_keys=keys)


def merged(tower, attention=None, options=FIXED, change=None, only_rest=False):
  """Features as PruMerge makes them, but for what is asked to be wrong."""
  attention = prumerge.class_attention(tower) if attention is None else attention
  centre = prumerge.centres(attention, options)
  centre = jnp.sort(centre, axis=1) if change == 'sorted' else centre
  keys = tower.next_keys[:, 1:]
  if only_rest:  # centres cannot be neighbours
    rows = jnp.arange(2)[:, None]
    alike = prumerge.cosines(keys[rows, centre], keys).at[rows[..., None], jnp.arange(8)[None, :, None], centre[:, None]].set(-2.0)
    near = jnp.sort(jax.lax.top_k(alike, 32)[1], axis=-1)
  else:
    near = prumerge.neighbours(keys, centre, 32)
  features = prumerge.condense(tower, attention, centre, near)
  if change == 'normalised':
    weights = jnp.take_along_axis(attention[:, None], near, 2).sum(-1, keepdims=True)
    own = jnp.take_along_axis(tower.features, centre[..., None], 1)
    features = features.at[:, :-1].set(own + (features[:, :-1] - own) / weights)
  return features.at[:, -1].set(features[:, 0]) if change == 'no summary' else features


def heads_mean(tower):
  split = lambda x: x.reshape(*x.shape[:-1], 4, 8)
  scores = jnp.einsum('bnh,btnh->bnt', split(tower.next_query), split(tower.next_keys)) * 8**-0.5
  return jax.nn.softmax(scores, -1).mean(1)[:, 1:]


WRONG_MERGES = {
  None: lambda t: merged(t),
  'mean over heads': lambda t: merged(t, heads_mean(t)),
  'scaled by the head': lambda t: merged(dataclasses.replace(t, next_query=t.next_query * 2)),
  'block L-2': lambda t: merged(block_below(t)),
  'normalised weights': lambda t: merged(t, change='normalised'),
  'neighbours are no centres': lambda t: merged(t, only_rest=True),
  'centres in their places': lambda t: merged(t, change='sorted'),
  'no summary': lambda t: merged(t, change='no summary'),
}


@pytest.mark.parametrize('wrong', WRONG_MERGES)
def test_prumerge_merges_as_recorded(wrong, above):
  off = [np.abs(WRONG_MERGES[wrong](above)[i] - case('prumerge')[f'prumerge_fixed/s{i}/features']).max() for i in range(2)]
  assert max(off) < 1e-4 if wrong is None else min(off) > 1e-3


def test_prumerge_counts_outliers_of_each_row_and_takes_no_patch_twice(above):
  attention = prumerge.class_attention(above)
  assert prumerge.outliers(attention).tolist() == [10, 8]
  recorded = case('prumerge')['prumerge_plus_fixed/s0/centre_index'].tolist()  # patch 12 is in it twice
  assert prumerge.centres(attention, PLUS)[0].tolist() == [*recorded[:9], 13, *recorded[10:]]
  every = prumerge.PlusOptions(centres=40, strided=24, stride=8)
  assert sorted(prumerge.centres(attention, every)[1].tolist()) == list(range(64))


def test_prumerge_with_all_others_as_neighbours(above):
  """Each centre is itself and the weighted sum of all others."""
  attention = prumerge.class_attention(above)
  reduced = prumerge.reduce(above, lambda x: x, prumerge.Options(centres=3, neighbours=63))
  total = jnp.einsum('bp,bpc->bc', attention, above.features)
  for i, centre in enumerate(reduced.index[:, :3].T):
    rows = jnp.arange(2)
    expected = total + (1 - attention[rows, centre])[:, None] * above.features[rows, centre]
    np.testing.assert_allclose(reduced.tokens[:, i], expected, atol=1e-4)
  assert reduced.index[:, 3].tolist() == [-1, -1]


def spatial(x, keys, tokens, count):
  """The next block pairs by place."""
  x, tokens = dymu.merge(x, keys, tokens, count)
  order = jnp.argsort(tokens.patch, axis=1)
  take = lambda a: jnp.take_along_axis(a, order.reshape(order.shape + (1,) * (a.ndim - 2)), 1)
  group = jnp.take_along_axis(jnp.argsort(order, axis=1), tokens.group, 1)
  return take(x), MergedTokens(take(tokens.size), group, take(tokens.patch))


def unweighted(x, keys, tokens, count):
  _, right = dymu.merge(x, keys, tokens, count)
  return dymu.merge(x, keys, dataclasses.replace(tokens, size=jnp.ones_like(tokens.size)), count)[0], right


def sizeless(x, keys, tokens, count):
  """The attention knows no sizes; x is made as if it did."""
  size = 1 + 0 * tokens.size
  x, tokens = dymu.merge(x, keys, tokens, count)
  return x, dataclasses.replace(tokens, size=size[:, : tokens.size.shape[1]])


WRONG_TOWERS = {None: dymu.merge, 'pairs by place': spatial, 'unweighted mean': unweighted, 'no size in attention': sizeless}


@pytest.mark.parametrize('wrong', WRONG_TOWERS)
def test_dymu_merges_as_recorded(wrong):
  """Three blocks; a wrong build is noticed in the second or third."""
  vision, params = dataclasses.replace(base().info.model.vision, select_layer=3), base().params['vision']
  params = params | {'layers': jax.tree.map(lambda w: w[:3], params['layers'])}
  needs = dataclasses.replace(dymu.needs(vision, dymu.Options(merges=(9,))), merge=WRONG_TOWERS[wrong])
  pixels = jnp.asarray(base().case['pixel_values']).transpose(0, 2, 3, 1)[:2]
  tower = jax.jit(VisionTower(vision, jnp.float32, needs).apply)({'params': params}, pixels)
  off = [np.abs(hidden[0] - case('dymu')[f'fixed/s0/hidden/{i}']).max() for i, (hidden, _) in enumerate(tower.merged)]
  assert max(off) < 1e-4 if wrong is None else max(off) > 1e-2


def test_dymu_keeps_the_class_token_alone_and_every_patch_in_one_group():
  """Even where the class token is the likest of all; sizes are those of the groups, and no merges change nothing."""
  rng = np.random.default_rng(0)
  x, keys = rng.normal(size=(2, 17, 6)).astype(np.float32), rng.normal(size=(2, 17, 4)).astype(np.float32)
  keys[:, 0] = keys[:, 1]
  every = jnp.broadcast_to(jnp.arange(17), (2, 17))
  start = MergedTokens(jnp.ones((2, 17)), every, every - 1)
  merged, tokens = dymu.merge(jnp.asarray(x), jnp.asarray(keys), start, 8)
  assert merged.shape == (2, 9, 6) and (tokens.group[:, 0] == 0).all() and (tokens.group[:, 1:] > 0).all()
  for row in range(2):
    assert np.bincount(tokens.group[row]).tolist() == tokens.size[row].tolist()
    for number in range(9):
      np.testing.assert_allclose(merged[row, number], x[row][tokens.group[row] == number].mean(0), atol=1e-5)
      assert tokens.group[row, tokens.patch[row, number] + 1] == number
  same, tokens = dymu.merge(jnp.asarray(x), jnp.asarray(keys), start, 0)
  np.testing.assert_allclose(same, np.concatenate([x[:, 0::2], x[:, 1::2]], 1), atol=1e-6)


UNMERGED_ROWS = layout.unmerged_rows
WAYS = {
  None: lambda start, group, size: UNMERGED_ROWS(start, group, 19, size),
  'not unmerged': lambda start, group, size: jnp.minimum(jnp.arange(size + 45), size - 1)[None],
  'mates by place': lambda start, group, size: UNMERGED_ROWS(start, jnp.sort(group, 1), 19, size),
}


@pytest.mark.slow
@pytest.mark.parametrize('wrong', WAYS)
def test_unmerging_places_rows_as_recorded(wrong, monkeypatch):
  recorded, ids = case('dymu'), base().case['b1/input_ids'].reshape(-1)
  start = jnp.asarray([int(np.flatnonzero(ids == IMAGE_ID)[0])])
  group = jnp.asarray(recorded['fixed/s0/group/4'][None, 1:] - 1)
  right = WAYS[wrong](start, group, 35)
  assert (right[0].tolist() == recorded['fixed/s0/vtu/mapping'].tolist()) == (wrong is None)
  monkeypatch.setattr(reduction.layout, 'unmerged_rows', lambda start, group, num, size: WAYS[wrong](start, group, size))
  runner = Runner(base().info.model, base().params, DENSE, Piece('dymu', {'merges': (9,)}))
  answer = runner.answer([Asked(ids, recorded['fixed/s0/projected'], np.asarray(group[0]))], 3)[0]
  off = np.abs(answer.prefill_logits - recorded['fixed/s0/vtu/logits']).max()
  assert off < 1e-4 if wrong is None else off > 0.1
  if wrong is None:  # without a cache the newest token stands at its place of the full sequence too
    prompt, image = runner.lay_out([Asked(ids, recorded['fixed/s0/projected'])])
    tokens = jnp.pad(prompt.tokens, [(0, 0), (0, 2)]).at[0, 35:37].set(answer.tokens[:2])
    now = dataclasses.replace(prompt, tokens=tokens, length=prompt.length + 2)
    hidden, _ = runner._apply(now, image, prompt.length, 18, group, method='recompute')
    np.testing.assert_allclose(runner._apply(hidden, method='logits')[0], recorded['fixed/s0/vtu/decode_logits'][2], atol=1e-4)


def test_rows_without_image_stand_where_they_stood_and_means_undo_copies():
  rows = layout.unmerged_rows(jnp.asarray([2, -1]), jnp.asarray([[1, 0, 1, 0], [0, 0, 0, 0]]), 2, 7)
  assert rows.tolist() == [[0, 1, 3, 2, 3, 2, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 6, 6]]
  x = jax.random.normal(jax.random.key(0), (2, 7, 3))
  np.testing.assert_allclose(layout.mean_rows(layout.gather_rows(x, rows), rows, 7), x, atol=1e-6)


def test_unmerging_in_a_generator(tiny_params):
  """Rows do not depend on their neighbours, and decoding without a cache agrees."""
  cfg, rng = presets.TINY, np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(3, cfg.llama.vocab_size, (3, 18)), jnp.int32)
  pixels = jnp.asarray(rng.integers(0, 256, (3, cfg.vision.image_size, cfg.vision.image_size, 3)), jnp.uint8)
  reducer = Piece('dymu', {'merges': (3,)})
  short = methods.num_image_tokens(cfg, reducer)
  as_int = lambda *x: jnp.asarray(x, jnp.int32)
  prompt = Prompt(tokens, as_int(short + 6, 5, short + 4), as_int(2, -1, 0), jnp.arange(3, dtype=jnp.uint32))
  generator = Generator(cfg, DENSE, tiny_params, max_new_tokens=4, eos_id=None, reducer=reducer)
  together = generator(prompt, pixels)
  np.testing.assert_array_equal(generator.generate_uncached(prompt, pixels).tokens, together.tokens)
  turned = generator(jax.tree.map(lambda x: x[::-1], prompt), pixels[::-1])
  np.testing.assert_array_equal(turned.tokens, together.tokens[::-1])
  turn, _ = generator.start(prompt, pixels)
  assert turn.cache.stages[0].length.tolist() == [16 + 6, 5, 16 + 4]
  with pytest.raises(ConfigError, match='dymu: unmerging needs a dense decoder'):
    methods.check_run(cfg, (Stage(), Stage(start=1, selector='uniform', image_tokens=2)), reducer)


BEHIND = {
  'divprune': (divprune, KeptPatches(tokens=5)),
  'pool': (pool, pool.Options()),
  'prumerge': (prumerge, prumerge.Options(centres=4, neighbours=5)),
  'vispruner': (vispruner, vispruner.Options(tokens=5)),
  'vscan': (vscan, vscan.Options(tokens=6, window=2, shallow=3)),
}


@pytest.mark.parametrize('name', BEHIND)
def test_rows_without_image_give_numbers_and_gradients(name):
  """A row of zeros, which is what nobody looks at, must not poison the weights' gradients; and rows do not mix."""
  method, options = BEHIND[name]
  draw = np.random.default_rng(0).normal
  features = jnp.asarray(draw(size=(3, 16, 8)), jnp.float32).at[1].set(0)
  rows = {b: jax.nn.softmax(jnp.asarray(draw(size=(3, 2, 16)))) for b in (3, 4)}
  if name == 'vispruner':
    rows.pop(3)
  tower = TowerOutput(features, None, rows, next_query=draw(size=(3, 8)), next_keys=jnp.asarray(draw(size=(3, 17, 8))).at[1].set(0))

  def reduce(tower):
    reduced = method.reduce(tower, lambda x: 2 * x, options)
    return reduced.tokens.sum(), reduced

  gradient, reduced = jax.grad(lambda f: reduce(dataclasses.replace(tower, features=f)), has_aux=True)(features)
  assert np.isfinite(gradient).all() and np.isfinite(reduced.tokens).all() and np.abs(gradient[0]).max() > 0
  order = jnp.asarray([2, 0, 1])
  turned = reduce(jax.tree.map(lambda x: jnp.asarray(x)[order], tower))[1]
  np.testing.assert_array_equal(turned.index, reduced.index[order])
  np.testing.assert_allclose(turned.tokens, reduced.tokens[order], atol=1e-5)


def test_costs():
  """DyMU's tower and what is behind it shrink; PruMerge looks at one block's keys more."""
  model, plain = presets.LLAVA_1_5_7B, costs.vision_flops(presets.LLAVA_1_5_7B)
  per_token, piece = 2 * (1024 * 4096 + 4096**2), Piece('dymu', {'merges': (21,)})
  assert methods.num_image_tokens(model, piece) == 93
  assert costs.vision_flops(model, Piece('dymu', {'merges': (0,)})) == plain
  attention, mlp = lambda tokens: tokens * 8 * 1024**2 + 4 * tokens**2 * 1024, lambda tokens: tokens * 16 * 1024**2
  tower = attention(577) + mlp(377) + 22 * (attention(377) + mlp(377))
  whole = 23 * (attention(577) + mlp(577))
  shrunk = costs.vision_flops(model, Piece('dymu', {'merges': (200, *[0] * 22)}))
  assert shrunk == pytest.approx(plain - whole + tower - 200 * per_token)
  prumerge = costs.vision_flops(model, Piece('prumerge', {'centres': 63}))
  assert prumerge == pytest.approx(plain - 512 * per_token + 2 * 577 * 1024**2)


@pytest.mark.parametrize(
  'reducer, message',
  [
    (Piece('prumerge', {'centres': 17}), 'reducer prumerge: 17 centres, the tower has 16 patches'),
    (Piece('prumerge', {'centres': 8}), 'prumerge: neighbours is 32, a patch of the tower has 15 others'),
    (Piece('prumerge_plus', {'centres': 8, 'strided': 9, 'stride': 2}), 'reducer prumerge_plus: 17 centres, the tower has 16'),
    (Piece('prumerge_plus', {'centres': 4, 'strided': 4, 'stride': 4, 'first': 4}), 'first is 4, expected a patch of the first 4'),
    (Piece('dymu', {'merges': (1, 2, 3, 4, 5, 6, 7)}), 'dymu: merges has 7 numbers, expected one, or one for each'),
    (Piece('dymu', {'merges': (-1,)}), r'merges is \(-1,\), expected numbers of tokens'),
  ],
)
def test_what_cannot_run_is_refused_in_one_line(reducer, message):
  with pytest.raises(ConfigError, match=message) as error:
    methods.check_run(presets.TINY, DENSE, reducer)
  assert '\n' not in str(error.value)


def test_prumerge_needs_the_top_of_the_tower(tiny_params):
  reducer = Piece('prumerge', {'centres': 4, 'neighbours': 3})
  with pytest.raises(ConfigError, match='prumerge: looks at the block .* and the parameters have no `vision_tail`') as error:
    Generator(presets.TINY, DENSE, tiny_params, max_new_tokens=2, eos_id=None, reducer=reducer)
  assert '\n' not in str(error.value)
  whole = dataclasses.replace(presets.TINY.vision, select_layer=-1)
  with pytest.raises(ConfigError, match='prumerge: looks at the block above the features, expected select_layer -2, got -1'):
    methods.check_run(dataclasses.replace(presets.TINY, vision=whole), DENSE, reducer)
