"""Compressors that keep the best-scored keys: equal to kvpress in any batch, and with grouped heads to the definitions."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import kv_reference
import numpy as np
import pytest
from conftest import GOLDEN, ROOT

from dynllava_jax import cache, methods, presets
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import ConfigError, Piece, Stage
from dynllava_jax.convert import verify
from dynllava_jax.convert.records import kv
from dynllava_jax.convert.records.base import compare
from dynllava_jax.convert.records.bases import open_record
from dynllava_jax.convert.records.runs import Runner, asked, neighbours
from dynllava_jax.methods import Compressed, Compressor, Depth, Observed, Rotation, Rows, expected_attention, lagkv, pyramidkv
from dynllava_jax.methods.kv_scores import group_mean, last_ones, looked_at, share
from dynllava_jax.ops.rope import apply_rope, rope_angles

RECORDS = sorted(p.name for p in (GOLDEN / 'methods').glob('kv_*'))
WHOLE = ROOT.parent / 'shared' / 'golden' / 'methods'
TEXT_SLOTS = 27


@pytest.fixture(scope='module')
def base():
  return open_record(GOLDEN / 'methods' / RECORDS[0], GOLDEN).base('public_b')


def unchanged(seen, options):
  shown = {'q': seen.q, 'unrotated': seen.unrotated, 'k': seen.k, 'v': seen.v}
  return Compressed(k=seen.k, v=seen.v, length=seen.rows.length, details=shown)


@pytest.fixture(scope='module')
def observed(base):
  """What layers show of a record's prompts, a text-only row and a longer one: record -> (prompts, arrays [L, B, ...], `Rows`)."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.COMPRESSORS, 'unchanged', Compressor(compress=unchanged, slots=lambda text, image, *_: text + image))
    runner = Runner(base.info.model, base.params, (Stage(compressor=Piece('unchanged')),))

    def look(record):
      prompts = {case.prompt: asked(record, base, case) for case in kv.cases(record)}
      everyone = [*prompts.values(), *neighbours(list(prompts.values()))]
      everyone += everyone[:1] * (5 - len(everyone))
      prompt, image = runner.lay_out(everyone, TEXT_SLOTS)
      _, _, (trace,), _ = runner._prefill(prompt, image, CacheSpec(max_new_tokens=1), None)
      index = jnp.broadcast_to(jnp.arange(runner.num_image), (len(everyone), runner.num_image))
      return list(prompts), trace.of_layers[0], Rows(prompt.length, prompt.image_start, index)

    known = {}
    yield lambda record: known.get(record.method) or known.setdefault(record.method, look(record))


def as_it_is(seen):
  return seen


def compress_all(piece, arrays, rows, llama, change=as_it_is, build=''):
  """The compressor at every layer: `Compressed`, stacked [L, ...]. `build` names one that was changed."""
  return jax.device_get(compressed(piece, arrays, rows, llama.head_dim, llama.rope_theta, change, build))


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5, 6))
def compressed(piece, arrays, rows, head_dim, theta, change, build):
  compressor, options = methods.bound(piece, 'compressor')
  size, layers = arrays['k'].shape[2], arrays['k'].shape[0]
  positions = jnp.broadcast_to(jnp.arange(size), (len(rows.length), size))
  rotation = Rotation(positions, rows.length, lambda p: rope_angles(p, head_dim, theta))

  def at(layer):
    seen = Observed(**layer[0], rows=rows, rotation=rotation, depth=Depth(layer[1], range(layers), layers))
    return compressor.compress(change(seen), options)

  return jax.lax.map(at, (arrays, jnp.arange(layers)))


def answer_of(left, row):
  """One row as records are compared."""
  length = int(left.length[0, row])
  first = np.zeros(len(left.k), int) if left.first is None else left.first[:, row]
  held = []
  for x in (left.k, left.v):
    moved = np.zeros_like(x[:, row, : length - first.min()])
    for layer, start in enumerate(first):
      moved[layer, : length - start] = x[layer, row, start:length]
    held.append((moved,))
  details = {name: x[:, row] for name, x in left.details.items()}
  return details, held


@pytest.mark.parametrize('name', RECORDS)
def test_recorded_scores_and_sets_in_a_batch(name, base, observed):
  record = open_record(GOLDEN / 'methods' / name, GOLDEN)
  prompts, arrays, rows = observed(record)
  done = set()
  for case in kv.cases(record):
    piece = kv.piece(record, case)
    left = compress_all(piece, arrays, rows, base.info.model.llama)
    row = prompts.index(case.prompt)
    details, (k, v) = answer_of(left, row)
    trace = types.SimpleNamespace(of_layers=(details,), length=rows.length[row])
    array = kv.own(piece)
    for part in ('scores', 'kept', 'kept_count', 'k', 'v', 'partition_scores'):
      recorded = record.case.get(case.at + part)
      if recorded is not None:
        ours, tolerance = array(part, recorded, types.SimpleNamespace(traces=[trace], k=k, v=v))
        assert compare(case.at + part, ours, recorded, tolerance).ok, case.at + part
        done.add(part)
  assert {'scores', 'kept', 'k', 'v'} <= done


EVERYDAY = {'kv_snapkv_image': ['r50'], 'kv_pyramidkv': ['r75'], 'kv_rerotation': ['streaming_r75']}


@pytest.mark.parametrize('name', EVERYDAY)
def test_recorded_rows_decode_in_a_batch(name, base, monkeypatch):
  record = open_record(GOLDEN / 'methods' / name, GOLDEN)
  monkeypatch.setattr(kv, 'base_of', lambda record, name: base)
  found = list(kv.verify(record, alone=False, only=EVERYDAY[name]))
  assert [str(q) for q in found if not q.ok] == []
  assert sum(q.name.endswith(('/tokens', '/logits', '/position')) for q in found) >= 3


@pytest.mark.slow
@pytest.mark.parametrize('name', RECORDS)
def test_every_recorded_quantity_agrees(name):
  """What `--verify` does, on the whole records: alone and in a batch, nothing passed over."""
  if not WHOLE.is_dir():
    pytest.skip('the whole records are not beside this checkout (../shared/golden/methods)')
  record = open_record(WHOLE / name, GOLDEN)
  found = list(verify.verify_method(record))
  assert [str(q) for q in found if not q.ok] == []
  compared = {q.name.rpartition(': ')[2] for q in found}
  assert [k for k in record.case if k not in compared and not k.endswith(('/ratio', '/input_ids'))] == []


# Wrong builds: (record, options that they change, scores that they compute, what they look at, wrong places per head of p0 at 0.5).
def window_pooled_in(part, options):
  window = jnp.minimum(options.window, part.count)[:, None]
  columns = group_mean(looked_at(part.seen, window[:, 0], options.window), part.seen.k.shape[2])
  sums = jax.lax.reduce_window(columns, 0.0, jax.lax.add, (1, 1, options.kernel), (1, 1, 1), 'SAME')
  return last_ones(part, (part.place >= part.count[:, None] - window)[:, None], sums), {}


def pooled_before_the_cut(part, options):
  after = jnp.clip(part.seen.rows.length - part.start - part.size, 1, options.window)
  columns = group_mean(looked_at(part.seen, after, options.window), part.seen.k.shape[2])
  return part.columns(jax.lax.reduce_window(columns, 0.0, jax.lax.add, (1, 1, options.kernel), (1, 1, 1), 'SAME')), {}


def of_each_head(part, options):
  last = (part.place == part.count[:, None] - 1)[:, None]
  return last_ones(part, last, group_mean(looked_at(part.seen, 1, 1), part.seen.k.shape[2])), {}


def raw_anchor(part, options):
  k = part.heads(part.seen.k)
  anchor = jnp.where(part.real[..., None], k, 0.0).sum(2, keepdims=True)
  return -(k * anchor).sum(-1) / jnp.linalg.norm(k, axis=-1) / jnp.linalg.norm(anchor, axis=-1), {}


def plain_sum(part, options):
  scores, details = methods.observed_attention.score(part, options)
  return scores * (part.count[:, None, None] - part.place), details


def keys_unrotated(seen):
  return dataclasses.replace(seen, k=apply_rope(seen.k, *seen.rotation.angles(-seen.rotation.positions)))


def with_sinks(q, counts):
  return STATISTICS(q, counts | (jnp.arange(counts.shape[-1]) < 4))


def not_turned(rotation, count):
  return lambda x: x


def by_its_own_range(x, sinks, lag):
  doubled = x[:, :, sinks : sinks + (x.shape[2] - sinks) // lag * lag]
  doubled = jnp.repeat(doubled.reshape(*x.shape[:2], -1, lag, x.shape[3]), 2, 2).reshape(*x.shape[:2], -1, x.shape[3])
  own = STANDING_OUT(doubled, 0, lag)[:, :, ::2]
  return own[:, :, :-1]


STATISTICS, STANDING_OUT = expected_attention.statistics, lagkv.standing_out
WRONG = {
  'snapkv: no pooling': ('kv_snapkv', dict(options={'kernel': 1}), 12.2),
  'snapkv: window pooled in': ('kv_snapkv', dict(score=window_pooled_in), 0.75),
  'snapkv over the image: pooled before the cut': ('kv_snapkv_image', dict(score=pooled_before_the_cut), 1.9),
  'tova: each head its own': ('kv_tova', dict(score=of_each_head), 15),
  'observed attention: a plain sum': ('kv_observed_attention', dict(score=plain_sum), 7.0),
  'keydiff: mean of raw keys': ('kv_keydiff', dict(score=raw_anchor), 1.2),
  'keydiff: unrotated keys': ('kv_keydiff', dict(change=keys_unrotated), 8.9),
  'expected attention: rotated queries': (
    'kv_expected_attention',
    dict(
      change=lambda seen: dataclasses.replace(seen, unrotated=seen.q), patch=(expected_attention, 'average_rotation', not_turned)
    ),
    11.1,
  ),
  'expected attention: no covariance': ('kv_expected_attention', dict(options={'covariance': False}), 2.6),
  'expected attention: sinks in the statistics': (
    'kv_expected_attention',
    dict(patch=(expected_attention, 'statistics', with_sinks)),
    0.8,
  ),
  'lagkv: its own partition': ('kv_lagkv', dict(patch=(lagkv, 'standing_out', by_its_own_range)), 11),
}


EVERY_DAY = ('snapkv', 'tova', 'keydiff: mean', 'expected attention: rotated', 'lagkv')


@pytest.mark.parametrize('wrong', [pytest.param(w, marks=() if w.startswith(EVERY_DAY) else pytest.mark.slow) for w in WRONG])
def test_a_wrong_build_keeps_others(wrong, base, observed, monkeypatch):
  """As many places of a head are wrong as an independent program found."""
  name, changed, expected = WRONG[wrong]
  record = open_record(GOLDEN / 'methods' / name, GOLDEN)
  prompts, arrays, rows = observed(record)
  case = next(c for c in kv.cases(record) if c.prompt == 'p0')
  piece = kv.piece(record, case)
  piece = Piece(piece.name, dict(piece.options) | changed.get('options', {}))
  if 'score' in changed:
    options = methods.COMPRESSORS[piece.name].options
    made = methods.kv_scores.compressor(changed['score'], options=options)
    monkeypatch.setitem(methods.COMPRESSORS, piece.name, made)
  if 'patch' in changed:
    monkeypatch.setattr(*changed['patch'])
  left = compress_all(piece, arrays, rows, base.info.model.llama, changed.get('change', as_it_is), wrong)
  keep = left.details['keep'][:, prompts.index('p0'), :, : int(rows.length[prompts.index('p0')])]
  right = np.zeros_like(keep)
  np.put_along_axis(right, record.case[case.at + 'kept'], True, -1)
  assert (keep & ~right).sum(-1).mean() == pytest.approx(expected, abs=0.5 if expected > 10 else 0.1)


@pytest.mark.parametrize(
  'name, only, position',
  [
    pytest.param('kv_streaming_llm', ['r75'], lambda stage, position: stage.length[:, None], marks=pytest.mark.slow, id='n + t'),
    pytest.param('kv_rerotation', ['streaming_r75'], lambda stage, position: position, id='P + t behind new positions'),
  ],
)
def test_decoding_at_other_positions_fails(name, only, position, base, monkeypatch):
  monkeypatch.setattr(kv, 'base_of', lambda record, name: base)
  monkeypatch.setattr(cache, 'rotary_positions', position)
  found = {q.name: q for q in kv.verify(open_record(GOLDEN / 'methods' / name, GOLDEN), alone=False, only=only)}
  assert found[f'in a batch: p0/{only[0]}/logits'].error > 0.5


# Grouped heads, which no recorded base has: 6 query heads of 2 kv heads, rows of every kind side by side, padding of any content.
SIZE, IMAGE_TOKENS = 44, 20
LENGTHS, STARTS = (44, 35, 13), (3, 6, -1)
SMALL = {'window': 6, 'kernel': 3, 'n_sink': 2, 'lag': 5, 'n_future': 9}


def arrays_of(seed, padding=0, dtype=jnp.float32):
  rng, rest = np.random.default_rng(seed), np.random.default_rng(padding)
  real = np.arange(SIZE) < np.array(LENGTHS)[:, None]

  def make(heads):
    x = rng.normal(0, 1, (1, 3, SIZE, heads, 8))
    return jnp.asarray(np.where(real[None, :, :, None, None], x, rest.normal(0, 9, x.shape)), dtype)

  return {'q': make(6), 'unrotated': make(6), 'k': make(2), 'v': make(2)}


GROUPED = Rows(jnp.array(LENGTHS), jnp.array(STARTS), jnp.broadcast_to(jnp.arange(IMAGE_TOKENS), (3, IMAGE_TOKENS)))
LLAMA = types.SimpleNamespace(head_dim=8, rope_theta=100.0)


def piece_of(name, **options):
  known = {f.name for f in dataclasses.fields(methods.COMPRESSORS[name].options)}
  return Piece(name, {k: v for k, v in (SMALL | options).items() if k in known})


@pytest.mark.parametrize('over', ['image', 'prompt'])
@pytest.mark.parametrize('name', kv.SCORES)
def test_grouped_heads_keep_what_the_definition_says(name, over):
  """Beside others, the padding not zero. Other padding changes nothing; bfloat16 keeps what float32 scores of the same keys say."""
  piece = piece_of(name, ratio=0.4, over=over)
  known = dict(piece.options)
  arrays = arrays_of(1)
  left = compress_all(piece, arrays, GROUPED, LLAMA)
  settings = {k: v for k, v in known.items() if k in SMALL}
  for row, (length, start) in enumerate(zip(LENGTHS, STARTS)):
    q, u, k, v = (np.asarray(arrays[x][0, row, :length], np.float64) for x in ('q', 'unrotated', 'k', 'v'))
    keep = left.details['keep'][0, row]
    if over == 'image' and start < 0:
      expected = [list(range(length))] * 2
    else:
      count = IMAGE_TOKENS if over == 'image' else length
      image = (start, start + IMAGE_TOKENS) if over == 'image' else None
      options = methods.options_of(piece, 'compressor')
      n = pyramidkv.budget(count, 0, 1, options) if name == 'pyramidkv' else int(count * 0.6)
      expected = kv_reference.kept(name, q, u, k, v, image, n, LLAMA.rope_theta, **settings)
    assert [np.flatnonzero(head).tolist() for head in keep] == expected
    for head, places in enumerate(expected):
      np.testing.assert_array_equal(left.k[0, row, : len(places), head], arrays['k'][0, row, np.array(places), head])
      np.testing.assert_array_equal(left.v[0, row, : len(places), head], arrays['v'][0, row, np.array(places), head])
  again = compress_all(piece, arrays_of(1, padding=7), GROUPED, LLAMA)
  np.testing.assert_array_equal(again.details['keep'], left.details['keep'])
  if over == 'image':  # the scores are the same ones
    return
  low = arrays_of(1, dtype=jnp.bfloat16)
  wide = {k: v.astype(jnp.float32) for k, v in low.items()}
  half, full = (compress_all(piece, x, GROUPED, LLAMA) for x in (low, wide))
  np.testing.assert_array_equal(half.details['keep'], full.details['keep'])
  assert half.k.dtype == jnp.bfloat16


@pytest.mark.parametrize('over', ['image', pytest.param('prompt', marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', kv.SCORES)
def test_ratio_0_leaves_every_bit(name, over):
  arrays = arrays_of(2)
  left = compress_all(piece_of(name, ratio=0.0, over=over, rerotate=name != 'pyramidkv'), arrays, GROUPED, LLAMA)
  assert left.first is None and left.length[0].tolist() == list(LENGTHS) and left.k.shape == arrays['k'].shape
  for row, length in enumerate(LENGTHS):
    for x in 'kv':
      np.testing.assert_array_equal(getattr(left, x)[0, row, :length], arrays[x][0, row, :length])


def test_more_that_stays_in_any_case_than_there_is_room_for():
  """Of a window that is too long the newest stay; of sinks the first; nothing is NaN in rows shorter than either."""
  run = lambda name, **options: compress_all(piece_of(name, over='prompt', **options), arrays_of(3), GROUPED, LLAMA)
  places = lambda left, row: [np.flatnonzero(head).tolist() for head in left.details['keep'][0, row]]
  window = run('snapkv', window=40, ratio=0.75)
  assert places(window, 0) == [list(range(33, 44))] * 2 and places(window, 2) == [list(range(10, 13))] * 2
  sinks = run('streaming_llm', n_sink=30, ratio=0.75)
  assert places(sinks, 0) == [list(range(11))] * 2 and places(sinks, 2) == [list(range(3))] * 2
  expected = run('expected_attention', n_sink=30, ratio=0.75)
  assert places(expected, 2) == [list(range(3))] * 2 and np.isfinite(expected.details['scores']).all()
  short = run('lagkv', lag=30, ratio=0.75)
  assert places(short, 0) == [[0, 1, *range(35, 44)]] * 2


def test_how_many_stay():
  count = lambda p, ratio, over='prompt': share(p, 0, 1, methods.kv_scores.Options(ratio=ratio, over=over))
  assert [count(640, r) for r in (0.7, 0.8, 0.9)] == [192, 127, 63]
  assert (count(100, 0.9), count(1, 0.9), count(0, 0.9), count(2, 0.9, 'image')) == (9, 1, 0, 0)
  options = lambda ratio, beta: pyramidkv.Options(ratio=ratio, beta=beta, window=8, over='prompt')
  budgets = lambda p, *settings: [pyramidkv.budget(p, layer, 4, options(*settings)) for layer in range(4)]
  assert budgets(83, 0.5, 20) == [75, 53, 30, 8] and budgets(83, 0.75, 2) == [31, 24, 17, 10]
  assert budgets(83, 0.95, 2) == [4] * 4 and budgets(83, 0.0, 2) == [83] * 4


@pytest.mark.parametrize(
  'compressor, message',
  [
    (Piece('snapvk'), "compressor 'snapvk' is unknown; expected one of .*snapkv"),
    (Piece('snapkv', {'windw': 3}), "compressor snapkv.windw: unknown key; did you mean 'window'"),
    (Piece('snapkv', {'window': 0}), 'window is 0, expected at least 1'),
    (Piece('pyramidkv', {'kernel': 4}), 'kernel is 4, expected an odd number'),
    (Piece('knorm', {'ratio': 1.0}), 'ratio is 1.0, expected the share that leaves, from 0 to less than 1'),
    (Piece('tova', {'over': 'text'}), "over 'text' is unknown; expected image or prompt"),
    (Piece('streaming_llm', {'n_sink': -1}), 'n_sink is -1, expected at least 0'),
    (Piece('lagkv', {'lag': 1}), 'lag is 1, expected at least 2'),
    (Piece('pyramidkv', {'beta': 0.5}), 'beta is 0.5, expected at least 1'),
    (Piece('pyramidkv', {'rerotate': True}), 'rerotate: layers keep different numbers of tokens'),
  ],
)
def test_what_cannot_be_run_is_refused_in_one_line(compressor, message):
  with pytest.raises(ConfigError, match=message) as e:
    methods.check_run(presets.TINY, (Stage(compressor=compressor),))
  assert '\n' not in str(e.value)
