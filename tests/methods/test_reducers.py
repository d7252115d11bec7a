"""Methods between tower and language model: equal to their authors' code, in any batch; what they must not be."""

import contextlib
import dataclasses
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tower_records
from conftest import GOLDEN
from tower_records import RECORDS, at_block

from dynllava_jax import methods, presets, sharding
from dynllava_jax.config import DENSE, IMAGE_ID, ConfigError, MeshConfig, Piece, Stage, VisionConfig
from dynllava_jax.convert import verify
from dynllava_jax.convert.records.bases import Record, open_record, samples
from dynllava_jax.convert.records.reducers import neighbours
from dynllava_jax.convert.records.reduction import Reduction
from dynllava_jax.generate import Generator
from dynllava_jax.methods import __main__ as program
from dynllava_jax.methods import fastervlm, visionzip
from dynllava_jax.methods.base import KeptPatches, TowerNeeds, TowerOutput
from dynllava_jax.models import clip
from dynllava_jax.models.batch import TrainInputs
from dynllava_jax.models.clip import VisionTower
from dynllava_jax.models.dynllava import DynLlava, Prompt
from dynllava_jax.models.params import cut_params
from dynllava_jax.ops.images import normalize

PIECES = {'fastervlm': Piece('fastervlm', {'tokens': 16}), 'visionzip': Piece('visionzip', {'dominant': 11, 'contextual': 6})}
# Arrays of a record: as many per prompt, alone and in a batch with the other prompt, a text-only row and a longer one.
ARRAYS = {'divprune': 8, 'fastervlm': 6, 'visionzip': 11, 'vispruner': 9, 'vscan': 15}


@pytest.fixture(scope='module')
def base():
  return tower_records.base()


@pytest.fixture(scope='module')
def towers() -> TowerOutput:
  return tower_records.towers()


@pytest.mark.parametrize('name', ARRAYS)
def test_every_recorded_quantity_agrees(name, monkeypatch):
  """What `python -m dynllava_jax.methods --verify` does, alone and in a batch; nothing of the record is passed over."""
  found, printed = [], io.StringIO()
  original = verify.verify_method
  monkeypatch.setattr(verify, 'verify_method', lambda record: (found.append(q) or q for q in original(record)))
  with contextlib.redirect_stdout(printed):
    well = program.verify(str(RECORDS / name), None)
  lines = printed.getvalue().splitlines()
  assert [str(q) for q in found if not q.ok] == [] and well
  assert lines == [*map(str, found), f'verify: {len(found)} of {len(found)} passed']
  case = open_record(RECORDS / name, None).case
  assert sorted(q.name for q in found) == sorted([*case, *(f'in a batch: {k}' for k in case)])
  assert len(case) == 2 * ARRAYS[name]


def test_a_record_may_bring_its_own_prompts_and_lie_elsewhere(tmp_path):
  """Prompts beside the recorded arrays, another folder of bases, and a changed number that is noticed."""
  old = open_record(RECORDS / 'fastervlm', None)
  base = old.base('public_b', '../clip_deep')
  prompt = {'mine/input_ids': base.case['b1/input_ids'][0], 'mine/pixel_values': base.case['pixel_values'][0]}
  case = {k.replace('s0', 'mine'): v for k, v in old.case.items() if k.startswith('s0')} | prompt
  case['mine/cls_attention'] = case['mine/cls_attention'] + 1e-4
  meta = old.meta | {'base_model': old.meta['base_model'] | {'inputs': 'beside'}}
  found = {q.name: q.ok for q in verify.verify_method(Record(tmp_path, GOLDEN, meta, case))}
  assert len(found) == 12 and [n for n, ok in found.items() if not ok] == ['mine/cls_attention', 'in a batch: mine/cls_attention']


# What a wrong build of each method would do, as (tower output, or None for another way to choose).
def shifted(attention):
  """The class token's own column kept, one patch lost at the end."""
  return jnp.concatenate([1 - attention.sum(-1, keepdims=True), attention], -1)[..., :-1]


WRONG_ROWS = {
  'block L-1': lambda t: at_block(t, attention=5),
  'block L-3': lambda t: at_block(t, attention=3),
  'mean of logits': lambda t: dataclasses.replace(at_block(t), class_attention={4: jnp.log(t.class_attention[4])}),
  'class column kept': lambda t: dataclasses.replace(at_block(t), class_attention={4: shifted(t.class_attention[4])}),
}


@pytest.mark.parametrize('wrong', [None, *WRONG_ROWS])
def test_fastervlm_needs_the_right_row(wrong, towers):
  case = open_record(RECORDS / 'fastervlm', None).case
  tower = WRONG_ROWS[wrong](towers) if wrong else at_block(towers)
  kept = np.asarray(fastervlm.reduce(tower, lambda x: x, KeptPatches(tokens=16)).index)
  equal = [(kept[i] == case[f's{i}/kept_image_index']).all() for i in range(2)]
  assert equal == ([False, False] if wrong else [True, True])


def merged_with_mean(tower, options):
  """Contextual tokens as the mean over target and absorbed patches."""
  choice = visionzip.choose(tower, options)
  ones = jax.nn.one_hot(choice.assigned, options.contextual).sum(1)[..., None]
  right = visionzip.condense(tower, choice)
  target = jnp.take_along_axis(tower.features, choice.target[..., None], 1)
  mean = (target + (right[:, options.dominant :] - target) * ones) / (1 + ones)
  return jnp.concatenate([right[:, : options.dominant], mean], 1)


def by_score(tower, options):
  """Dominant patches in the order of their scores."""
  right = visionzip.condense(tower, visionzip.choose(tower, options))
  order = jax.lax.top_k(tower.class_attention[4].sum(1), options.dominant - 1)[1]
  return right.at[:, 1 : options.dominant].set(jnp.take_along_axis(tower.features, order[..., None], 1))


def targets_of_all(tower, options):
  """Targets evenly spaced over all patches."""
  choice = visionzip.choose(tower, options)
  patches = tower.features.shape[1]
  target = jnp.broadcast_to(jnp.arange(options.contextual) * (patches // options.contextual), choice.target.shape)
  return visionzip.condense(tower, dataclasses.replace(choice, target=target))


WRONG_TOKENS = {
  'class token left out': lambda t, o: visionzip.condense(t, visionzip.choose(t, o)).at[:, 0].set(t.features[:, 0]),
  'mean with the target': merged_with_mean,
  'dominant by score': by_score,
  'targets of all patches': targets_of_all,
  'keys of block L-1': lambda t, o: visionzip.condense(t, visionzip.choose(at_block(t, keys=5), o)),
}


@pytest.mark.parametrize('wrong', [None, *WRONG_TOKENS])
def test_visionzip_condenses_as_recorded(wrong, towers):
  case = open_record(RECORDS / 'visionzip', None).case
  options = visionzip.Options(dominant=11, contextual=6)
  if wrong == 'keys of block L-1':
    got = WRONG_TOKENS[wrong](towers, options)
  else:
    right = lambda t, o: visionzip.condense(t, visionzip.choose(t, o))
    got = (WRONG_TOKENS[wrong] if wrong else right)(at_block(towers), options)
  off = max(np.abs(np.asarray(got[i]) - case[f's{i}/features']).max() for i in range(2))
  assert off > 1e-2 if wrong else off < 1e-4


def test_keys_normalised_before_the_head_mean_are_noticed(base, monkeypatch):
  original = clip.seen_by
  unit = lambda k: k / jnp.linalg.norm(k, axis=-1, keepdims=True)
  monkeypatch.setattr(clip, 'seen_by', lambda watched, q, k, x: original(watched, q, unit(k), x))
  pixels = jnp.asarray(base.case['pixel_values']).transpose(0, 2, 3, 1)[:2]
  tower = VisionTower(base.info.model.vision, jnp.float32, TowerNeeds(key_mean=(4,)))
  keys = jax.jit(tower.apply)({'params': base.params['vision']}, pixels).key_mean[4]
  assert np.abs(keys[0] - open_record(RECORDS / 'visionzip', None).case['s0/key_metric']).max() > 1e-2


def test_a_target_that_absorbs_nothing_stays_as_it_is(towers):
  same = dataclasses.replace(at_block(towers), key_mean={4: jnp.ones_like(towers.key_mean[4])})
  options = visionzip.Options(dominant=11, contextual=6)
  choice = visionzip.choose(same, options)
  features = visionzip.condense(same, choice)
  targets = jnp.take_along_axis(towers.features, choice.target[..., None], 1)
  np.testing.assert_array_equal(choice.assigned, 0)
  np.testing.assert_array_equal(features[:, options.dominant + 1 :], targets[:, 1:])
  zero = dataclasses.replace(same, key_mean={4: jnp.zeros_like(towers.key_mean[4])})
  assert np.isfinite(visionzip.condense(zero, visionzip.choose(zero, options))).all()


@pytest.mark.parametrize('dominant, contextual', [(1, 0), (1, 64), (65, 0), (11, 54), (5, 1)])
def test_visionzip_at_the_edges_of_its_budget(dominant, contextual, towers):
  options = visionzip.Options(dominant=dominant, contextual=contextual)
  tower = at_block(towers)
  reduced = visionzip.reduce(tower if contextual else dataclasses.replace(tower, key_mean={}), lambda x: x, options)
  assert reduced.tokens.shape == (2, dominant + contextual, 32) and np.isfinite(reduced.tokens).all()
  for row in np.asarray(reduced.index):
    assert row[0] == -1 and len(set(row)) == len(row) and (np.diff(row[1:dominant]) > 0).all()


def test_positions_are_those_of_the_short_sequence(base):
  """Kept at their original places the same tokens give other logits; and a budget of all patches gives a dense run's."""
  record = open_record(RECORDS / 'fastervlm', None)
  prompt = samples(record, base, record.meta['base_model']['inputs'])['s0']
  start = int(np.flatnonzero(prompt.ids == IMAGE_ID)[0])
  text = np.delete(prompt.ids, start)
  run = Reduction(base, Piece('fastervlm', {'tokens': 64}))
  every, params = run([prompt, *neighbours(prompt)], [1])[0], run.decoder.params
  model = DynLlava(dataclasses.replace(base.info.model, predictor=None), DENSE, arrangement=run.decoder.model.arrangement)

  @jax.jit
  def prefill(image, positions):
    def dense(model):
      x = model.llama.embed(jnp.asarray(text))
      x = jnp.concatenate([x[:start], image, x[start:]])
      return model.logits(model.llama.run_stage(0, x[None], positions[None])[0])[0]

    return model.apply({'params': params}, method=dense)

  image = model.apply({'params': params}, jnp.asarray(prompt.pixels)[None], method='encode_images')[0]
  np.testing.assert_allclose(every.answer.prefill_logits, prefill(image, jnp.arange(len(text) + 64)), atol=1e-5)
  kept = record.case['s0/kept_image_index']
  original = np.concatenate([np.arange(start), start + kept, np.arange(start + 64, len(text) + 64)])
  image = record.case['s0/projected']
  off = [np.abs(prefill(image, p) - record.case['s0/logits']).max() for p in (np.arange(len(original)), original)]
  assert off[0] < 1e-4 and off[1] > 0.1


REDUCED = Piece('visionzip', {'dominant': 5, 'contextual': 3})
ROWS = ((12, 3), (7, 5), (9, -1), (10, 0))  # (text tokens, place of the image or -1)


def batch(order=(0, 1, 2, 3), image_tokens=8):
  """Prompt and pixels of tiny rows, laid out for this many image tokens."""
  cfg, rows = presets.TINY, [ROWS[i] for i in order]
  tokens, pixels = np.zeros((len(rows), 12 + image_tokens), np.int32), []
  for row, number in enumerate(order):
    rng = np.random.default_rng(number)
    tokens[row, : 12 + image_tokens] = rng.integers(3, cfg.llama.vocab_size, 12 + image_tokens)
    pixels.append(rng.integers(0, 256, (cfg.vision.image_size,) * 2 + (3,), np.uint8))
  lengths = [n + (image_tokens if at >= 0 else 0) for n, at in rows]
  as_int = lambda x: jnp.asarray(x, jnp.int32)
  return Prompt(jnp.asarray(tokens), as_int(lengths), as_int([at for _, at in rows]), jnp.asarray(order, jnp.uint32)), jnp.asarray(
    np.stack(pixels)
  )


def test_a_reducer_and_a_stage_in_one_run(tiny_params):
  """Rows do not depend on neighbours or order, decoding without a cache agrees, a second batch compiles nothing."""
  stages = (Stage(), Stage(start=2, selector='dynamic', image_tokens=4))
  generator = Generator(presets.TINY, stages, tiny_params, max_new_tokens=5, eos_id=None, reducer=REDUCED)
  together = jax.device_get(generator(*batch()))
  programs = generator.compilations()
  order = (2, 0, 3, 1)
  again = jax.device_get(generator(*batch(order)))
  assert generator.compilations() == programs
  for name in ('tokens', 'kept'):
    np.testing.assert_array_equal(getattr(again, name), getattr(together, name)[list(order)])
  np.testing.assert_array_equal(generator.generate_uncached(*batch()).tokens, together.tokens)
  alone = generator(*batch((1,)))
  np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])
  first, second = (k[0].tolist() for k in together.kept_image)
  assert len(first) == 8 and first[0] == -1 and len(second) == 4 and set(second) <= set(first)


def test_rows_on_several_devices_are_those_of_one(tiny_params):
  """The choice by block inside the scan follows the batch, which is divided over the mesh."""
  _, pixels = batch((0, 1, 2, 3) * 2)
  pixels = normalize(pixels, presets.TINY.vision)
  model = DynLlava(presets.TINY, DENSE, reducer=REDUCED)
  run = jax.jit(lambda x: model.apply({'params': cut_params(tiny_params, DENSE)}, x, method='reduce_images'))
  one, mesh = run(pixels), sharding.make_mesh(MeshConfig(data=8))
  with sharding.on_mesh(mesh):
    divided = run(jax.device_put(pixels, sharding.batch_sharding(mesh)))
  np.testing.assert_array_equal(divided.index, one.index)
  np.testing.assert_allclose(divided.tokens, one.tokens, atol=1e-5)
  assert divided.tokens.sharding.shard_shape(divided.tokens.shape)[0] == 1


def test_training_on_reduced_images(tiny_params):
  """Gradients reach projector and tower through the merged tokens and are numbers, rows with a blank image included."""
  prompt, pixels = batch()
  model = DynLlava(presets.TINY, DENSE, reducer=REDUCED)
  params = cut_params(tiny_params, DENSE)
  start = jnp.maximum(prompt.length - 3, 0)

  def loss(trained):
    apply = lambda *args, method: model.apply({'params': params | trained}, *args, method=method)
    image = apply(normalize(pixels.at[2].set(0), presets.TINY.vision), method='encode_images')
    return (apply(prompt, image, TrainInputs(start), method='train_forward').logits ** 2).mean()

  gradients = jax.jit(jax.grad(loss))({k: params[k] for k in ('projector', 'vision')})
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients['projector']))


def test_a_tower_that_nobody_asks_computes_nothing_more(tiny_params):
  """Without a reducer the scan over blocks carries the hidden states alone and holds no choice by block."""
  vision = presets.TINY.vision
  pixels = jnp.zeros((1, vision.image_size, vision.image_size, 3))

  def program(needs):
    apply = VisionTower(vision, jnp.float32, needs).apply
    return str(jax.make_jaxpr(apply)({'params': tiny_params['vision']}, pixels))

  plain, asked = program(TowerNeeds()), program(TowerNeeds(class_attention=(0,)))
  assert 'num_carry=1' in plain and 'cond[' not in plain
  assert 'num_carry=3' in asked and 'cond[' in asked


@pytest.mark.parametrize(
  'reducer, message',
  [
    (Piece('visonzip'), "reducer 'visonzip' is unknown; expected one of .*visionzip"),
    (Piece('fastervlm', {'token': 3}), "reducer fastervlm.token: unknown key; did you mean 'tokens'"),
    (Piece('fastervlm'), 'reducer fastervlm: missing tokens'),
    (Piece('fastervlm', {'tokens': 3.5}), 'reducer fastervlm.tokens: expected int, got 3.5'),
    (Piece('fastervlm', {'tokens': 0}), 'tokens is 0, expected a positive number'),
    (Piece('fastervlm', {'tokens': 17}), 'tokens is 17, the tower has 16 patches'),
    (Piece('visionzip', {'dominant': 0, 'contextual': 1}), 'dominant is 0, expected at least 1, the class token'),
    (Piece('visionzip', {'dominant': 10, 'contextual': 8}), r'dominant - 1 \+ contextual is 17, the tower has 16 patches'),
  ],
)
def test_what_cannot_run_is_refused_in_one_line(reducer, message):
  with pytest.raises(ConfigError, match=message) as error:
    methods.check_run(presets.TINY, DENSE, reducer)
  assert '\n' not in str(error.value)


def test_stages_count_the_tokens_that_a_reducer_leaves():
  reducer = Piece('fastervlm', {'tokens': 8})
  methods.check_run(presets.TINY, (Stage(), Stage(start=1, selector='uniform', image_tokens=8)), reducer)
  with pytest.raises(ConfigError, match='image_tokens 9 are more than the 8 of the run'):
    methods.check_run(presets.TINY, (Stage(), Stage(start=1, selector='uniform', image_tokens=9)), reducer)
  bare = dataclasses.replace(presets.TINY, vision=VisionConfig(image_size=56, select_layer=0))
  with pytest.raises(ConfigError, match=r'looks at block -1 of the vision tower, of which 0 blocks are run \(select_layer 0\)'):
    methods.check_run(bare, DENSE, reducer)


def test_the_list_names_every_piece_with_its_options():
  text = '\n'.join(program.listing())
  for pieces in methods.METHODS.values():
    for name, piece in pieces.items():
      assert re.search(rf'\b{name}\b', text) and all(f'{f.name}: ' in text for f in dataclasses.fields(piece.options))


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(method='fastervln'), "nothing here recomputes records of method 'fastervln'; known are .*fastervlm"),
    (dict(method=3), 'meta.json: method is 3, expected a name'),
    (dict(hyper={}), 'meta.json: hyper/visual_token_num is missing'),
    (dict(base_model='nowhere'), "names 'nowhere', and there is no such folder beside the record; give .* with --bases"),
    (dict(base_model={}), 'base_model/language_model_and_projector is missing'),
  ],
)
def test_records_that_cannot_be_recomputed(change, message):
  record = open_record(RECORDS / 'fastervlm', None)
  with pytest.raises(verify.ConversionError, match=message) as error:
    list(verify.verify_method(dataclasses.replace(record, meta=record.meta | change)))
  assert '\n' not in str(error.value)
