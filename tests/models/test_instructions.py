"""The instruction predictor: equal to the authors' code; wrong builds fail; off it changes nothing; where instructions begin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from recorded import recorded, verified

from dynllava_jax import cache as kv
from dynllava_jax import losses, methods, presets, sharding
from dynllava_jax.config import IGNORE, ConfigError, Objective, SparsityConfig, Stage, TrainConfig, judges_instructions
from dynllava_jax.convert.records import instruct_predictor as records
from dynllava_jax.convert.records.base import LOGITS, load_case
from dynllava_jax.convert.records.dynamic_runs import DynamicRunner
from dynllava_jax.data.batches import make_row
from dynllava_jax.data.conversation import template
from dynllava_jax.data.samples import Sample
from dynllava_jax.data.tokenizer import load_tokenizer, read_files
from dynllava_jax.generate import Generator
from dynllava_jax.models import trained_masks
from dynllava_jax.models.batch import InstructRule, Prompt, TrainInputs, TrainOutput
from dynllava_jax.models.params import init_params
from dynllava_jax.training.step import unused

NAMES = ('b1', 'long', 'turns')


@pytest.mark.slow
def test_every_recorded_quantity_agrees():
  """As `python -m dynllava_jax.methods --verify` does it: prefill, decoding, a later turn, text alone, a training step."""
  found, well, lines = verified('instruct_predictor')
  assert [str(q) for q in found if not q.ok] == [] and well
  left = [line.partition(': ')[2].partition(' (')[0] for line in lines if line.startswith('not compared')]
  assert all(name.startswith('nocache/') for names in left for name in names.split(', '))


class Built:
  """The recorded model and prompts; what a build gives for the last prompt token, and for the last of a later turn."""

  def __init__(self):
    self.record = recorded('instruct_predictor')
    self.info, self.params = records.model(self.record)
    self.pixels = jnp.asarray(load_case(GOLDEN / 'public_b' / 'case.npz')['pixel_values']).transpose(0, 2, 3, 1)
    self.prompts = [records.asked(self.record, name, 512, 2) for name in NAMES]

  def last_logits(self, *, info=None, params=None, start=None, chunk=False) -> np.ndarray:
    """float[3, V] behind the prompts, or float[2, V] behind token 0 of what follows the later turns of the first two."""
    runner = DynamicRunner(info or self.info, params or self.params)
    run = records.Run(runner, self.pixels, self.prompts)
    prompt, pixels = run.lay_out(range(3))
    if start is not None:
      prompt = dataclasses.replace(prompt, instruct_start=start(prompt, runner))
    if chunk:
      first, second = run(range(3))
      del first
      return second['logits'][:2, 1]
    logits, traces, *_ = runner.prefilled(prompt, pixels, kv.CacheSpec(max_new_tokens=1))
    return np.asarray(logits[jnp.arange(3), traces[-1].length - 1])


@pytest.fixture(scope='module')
def built() -> Built:
  return Built()


@pytest.fixture(scope='module')
def expected(built) -> np.ndarray:
  return np.stack([built.record.array(f'{name}/prefill_logits')[0, -1] for name in NAMES])


def off(info):
  """The description of a run that judges no instructions."""
  return dataclasses.replace(info, stages=tuple(dataclasses.replace(s, options=()) for s in info.stages))


def test_wrong_builds_are_far_off(built, expected):
  """The differences that the record's authors measured, about: not judged, by the text predictor, the whole tail."""
  far = lambda **build: np.abs(built.last_logits(**build) - expected).max(-1)
  assert (far() < LOGITS).all()
  assert (far(info=off(built.info)) > (0.5, 1.2, 0.2)).all()
  swapped = built.params | {'instruct_predictor': built.params['text_predictor']}
  assert (far(params=swapped) > (0.5, 0.8, 0.3)).all()
  tail = far(start=lambda prompt, runner: prompt.image_start + runner.num_image)
  assert (tail[:2] < LOGITS).all() and tail[2] > 0.5
  everything = far(start=lambda prompt, runner: prompt.length)
  np.testing.assert_allclose(everything, far(info=off(built.info)), atol=1e-6)


@pytest.mark.slow
def test_a_quota_and_new_positions_are_far_off(built, expected, monkeypatch):
  def quota(name):  # a threshold that 0.7 of the span pass
    logits = built.record.array(f'{name}/instruct_predictor_logits')[0]
    margin = np.sort(logits[:, 0] - logits[:, 1])[::-1]
    return margin[int(0.7 * len(margin)) - 1 :][:2].mean()

  right = methods.SELECTORS['dynamic']
  shifted = lambda x, predictor: right.text_margin(x, predictor) - jnp.asarray([[quota(name)] for name in NAMES])
  for build, least in (({'text_margin': shifted}, 0.5), ({'renumbers': lambda options: True}, 0.1)):
    monkeypatch.setitem(methods.SELECTORS, 'dynamic', dataclasses.replace(right, **build))
    assert np.abs(built.last_logits() - expected).max() > least


@pytest.mark.slow
def test_wrong_builds_of_a_later_turn_are_far_off(built, monkeypatch):
  truth = np.stack([built.record.array(f'{name}/round2/logits')[0, 1] for name in NAMES[:2]])
  far = lambda: np.abs(built.last_logits(chunk=True) - truth).max(-1)
  assert (far() < LOGITS).all()
  right = kv.append_chunk
  monkeypatch.setattr(kv, 'append_chunk', lambda cache, k, v, count, keep=None: right(cache, k, v, count))
  assert (far() > 0.1).all()  # the chunk is not judged
  last = lambda count, keep: jnp.arange(keep.shape[1]) == count[:, None] - 1
  monkeypatch.setattr(kv, 'append_chunk', lambda cache, k, v, count, keep: right(cache, k, v, count, keep & ~last(count, keep)))
  assert (far() > 0.05).all()  # its last token goes too


def test_off_the_weights_are_not_looked_at(built):
  """Bitwise: the model without the predictor, the one with it and the option off, and in an unjudged prompt with it on."""
  plain = off(built.info)
  bare = dataclasses.replace(plain.model, predictor=dataclasses.replace(plain.model.predictor, instruct=False))
  without = dataclasses.replace(plain, model=bare)
  params = {k: v for k, v in built.params.items() if k != 'instruct_predictor'}
  np.testing.assert_array_equal(built.last_logits(info=plain), built.last_logits(info=without, params=params))


@pytest.mark.slow
def test_generation_with_and_without_cache_and_a_prompt_that_ends_with_its_image():
  """Rows: an instruction, none behind the image, no image, one token; the same tokens both ways, and only judged rows lose text."""
  predictor = dataclasses.replace(presets.TINY.predictor, instruct=True)
  cfg = dataclasses.replace(presets.TINY, predictor=predictor)
  image = cfg.num_image_tokens
  params = sharding.unboxed(init_params(cfg, jax.random.key(3)))
  text, rng = 9, np.random.default_rng(0)
  ints = lambda *x: jnp.asarray(x, jnp.int32)
  length, start = ints(image + 9, image + 2, 7, image + 3), ints(2, 2, -1, 2)
  prompt = Prompt(
    jnp.asarray(rng.integers(3, 90, (4, image + text)), jnp.int32),
    length,
    start,
    jnp.arange(4, dtype=jnp.uint32),
    jnp.where(start < 0, length, start + image),
  )
  pixels = jnp.asarray(rng.integers(0, 256, (4, 56, 56, 3)), jnp.uint8)
  stages = (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.5, options={'instruct': True}))
  generator = Generator(cfg, stages, params, max_new_tokens=6, eos_id=None, later_tokens=4)
  turn, _ = generator.start(prompt, pixels)
  gone = np.asarray(prompt.length - image // 2 * (start >= 0) - turn.cache.stages[1].length)
  assert 0 < gone[0] < 6 and not gone[1:].any()
  np.testing.assert_array_equal(turn.cache.stages[0].length, length)
  cached, whole = generator(prompt, pixels), generator.generate_uncached(prompt, pixels)
  np.testing.assert_array_equal(cached.tokens, whole.tokens)
  np.testing.assert_array_equal(cached.kept, whole.kept)
  later, _ = generator.append(turn, ints(*[[5, 6, 7, 8]] * 4), ints(4, 2, 0, 1))
  before = length - image // 2 * (start >= 0) - gone
  grown = np.asarray(later.cache.stages[1].length - before)
  assert (grown <= [4, 2, 0, 1]).all() and (grown >= [1, 1, 0, 1]).all()  # the last token of a turn always stays


def test_a_prompt_must_say_where_its_instructions_begin(built):
  with pytest.raises(ValueError, match='prompt.instruct_start: None, but this run judges instructions'):
    built.last_logits(start=lambda prompt, runner: None)


def test_the_option_needs_the_predictor():
  stages = (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.5, options={'instruct': True}))
  assert judges_instructions(stages) and not judges_instructions(stages[:1])
  with pytest.raises(ConfigError, match='is to judge instructions, and this model has no instruction predictor'):
    methods.check_run(presets.TINY, stages)
  sparsity = SparsityConfig(image_keep_rate=0.5)
  with pytest.raises(ConfigError, match=r'option instruct needs an instruction predictor; set model\.predictor\.instruct'):
    TrainConfig(model=presets.TINY, stages=stages, sparsity=sparsity)
  model = dataclasses.replace(presets.TINY, predictor=dataclasses.replace(presets.TINY.predictor, instruct=True))
  methods.check_run(model, stages)
  on, idle = (TrainConfig(model=model, stages=s, sparsity=sparsity) for s in (stages, (stages[0],)))
  assert ('instruct_predictor' in on.held, 'instruct_predictor' in unused(on)) == (False, False)
  assert ('instruct_predictor' in idle.held, 'instruct_predictor' in unused(idle)) == (True, True)


def test_a_chunk_keeps_what_is_asked_for():
  """Kept tokens stand next to each other; what is rejected, or lies beyond a row's count, is nowhere."""
  zeros = jnp.zeros((1, 2, 10, 1, 1))
  spec = kv.CacheSpec(max_new_tokens=2, later_tokens=4)
  cache = kv.from_prompt(zeros, zeros, jnp.array([3, 2]), gated=True, text_keep_budget=1.0, spec=spec)
  chunk = jnp.arange(1.0, 9).reshape(1, 2, 4, 1, 1)
  keep = jnp.array([[True, False, True, True], [False, True, True, False]])
  cache = kv.append_chunk(cache, chunk, -chunk, jnp.array([3, 4]), keep)
  np.testing.assert_array_equal(cache.length, [5, 4])
  np.testing.assert_array_equal(cache.k[0, :, :5, 0, 0], [[0, 0, 0, 1, 3], [0, 0, 6, 7, 0]])
  np.testing.assert_array_equal(cache.v[0, 0, 3:5, 0, 0], [-1, -3])


def test_what_training_judges():
  positions = jnp.arange(8)[None]
  start, end = jnp.array([2, 3, 6]), jnp.array([6, 5, 6])
  judged = InstructRule(min_len=3).mask(positions, start, end)
  np.testing.assert_array_equal(np.flatnonzero(judged[0]), [2, 3, 4])  # the last token is always kept
  assert not judged[1].any() and not judged[2].any()  # too short, and none
  np.testing.assert_array_equal(np.flatnonzero(InstructRule(3, last=True).mask(positions, start, end)[0]), [2, 3, 4, 5])


def test_the_third_loss_counts_short_instructions():
  cfg = SparsityConfig(instruct_keep_rate=0.7, min_instruct_len=3, min_answer_len=99, image_keep_rate=1.0, mask_loss_weight=10.0)
  ints = lambda *x: jnp.asarray(x, jnp.int32)
  prompt = Prompt(jnp.zeros((2, 8), jnp.int32), ints(8, 8), ints(0, 0), jnp.zeros(2, jnp.uint32), ints(1, 5))
  labels = jnp.full((2, 8), IGNORE).at[:, 6:].set(1)
  mask = jnp.zeros((2, 8)).at[0, 1:3].set(1.0)
  nothing = jnp.zeros((2, 8, 4))
  out = TrainOutput(
    hidden=nothing,
    image_mask=jnp.ones((2, 1)),
    text_mask=jnp.ones((2, 8)),
    dense=jnp.zeros(2, bool),
    instruct_mask=mask,
  )
  inputs, objective, parts = TrainInputs(ints(6, 6), labels), Objective(sparsity=cfg), (trained_masks.TRAINING,)
  found = losses.training_losses(out, prompt, inputs, objective, parts)
  assert float(found.shown['instruct_mask']) == pytest.approx(
    (0.7 - 2 / 4) ** 2 / 2
  )  # of four judged tokens; the other row is short
  assert float(found.shown['instruct_keep']) == pytest.approx(0.5)
  assert float(found.total) == pytest.approx(float(found.ce) + 10 * float(found.shown['instruct_mask']), rel=1e-6)
  alone = losses.training_losses(dataclasses.replace(out, instruct_mask=None), prompt, inputs, objective, parts)
  assert float(alone.total) == float(alone.ce) and 'instruct_keep' not in alone.shown


def test_where_the_last_instruction_begins():
  """Behind the image in a first turn, behind the answer before it in a later one; nowhere without image."""
  tokenizer = load_tokenizer(read_files(GOLDEN / 'text' / 'tok'))
  how = dict(style=template('vicuna_v1'), tokenizer=tokenizer, vision=presets.TINY.vision, num_image=4, text_length=160)
  turn = lambda who, text: {'from': who, 'value': text}
  first = [turn('human', '<image>\nWhat is it?'), turn('gpt', 'A cat.')]
  second = [turn('human', 'And now?'), turn('gpt', 'A dog.')]
  picture = np.zeros((8, 8, 3), np.uint8)
  one, two, text = (
    make_row(Sample(id='s', conversations=turns, image=image), 0, **how, training=True)
    for turns, image in ((first, picture), (first + second, picture), (second, None))
  )
  assert one.instruct_start == one.image_start + 4 < one.answer_start
  answered = np.flatnonzero(two.labels[: two.answer_start] != IGNORE)
  assert two.instruct_start == answered.max() + 1 and two.tokens[two.instruct_start - 1] == tokenizer.eos_id
  assert tokenizer.piece(two.tokens[two.instruct_start]).strip() in ('US', 'USER')
  assert text.instruct_start == text.length
