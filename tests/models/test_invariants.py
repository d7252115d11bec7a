"""What must hold for any weights: batching, padding, caching and masking change nothing."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynllava_jax import presets, sharding
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import DENSE, MeshConfig, Objective, SparsityConfig, Stage
from dynllava_jax.generate import Generator, Sampling, Turn
from dynllava_jax.methods.training import Drawn
from dynllava_jax.models.batch import TrainInputs
from dynllava_jax.models.dynllava import DynLlava, Prompt
from dynllava_jax.models.params import abstract_params, cut_params, join_params
from dynllava_jax.ops.images import normalize

CFG = presets.TINY
P = CFG.vision.num_patches
TEXT, NEW = 12, 10
DYNAMIC = (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.25))
PYRAMID = (
  Stage(),
  Stage(start=1, selector='uniform', image_keep_rate=0.5),
  Stage(start=3, selector='dynamic', image_keep_rate=0.25),
)
FRONT = (Stage(start=0, selector='dynamic', image_keep_rate=0.25),)
RANDOM = (Stage(), Stage(start=2, selector='random', image_keep_rate=0.25))
# (text tokens, image position or -1) of four rows: long, short, without image, image first.
ROWS = ((12, 3), (7, 5), (9, -1), (10, 0))


def batch(rows=ROWS, text=TEXT, numbers=None):
  """Prompt and pixels; row i's content depends on its number alone."""
  numbers = list(range(len(rows))) if numbers is None else numbers
  tokens, pixels = np.zeros((len(rows), text + P), np.int32), []
  lengths = [n + (P if at >= 0 else 0) for n, at in rows]
  for i, number in enumerate(numbers):
    rng = np.random.default_rng(number)
    tokens[i, : lengths[i]] = rng.integers(3, CFG.llama.vocab_size, lengths[i])
    pixels.append(rng.integers(0, 256, (CFG.vision.image_size,) * 2 + (3,), np.uint8))
  as_int = lambda x: jnp.asarray(x, jnp.int32)
  starts = [at for _, at in rows]
  return Prompt(jnp.asarray(tokens), as_int(lengths), as_int(starts), jnp.asarray(numbers, jnp.uint32)), jnp.asarray(
    np.stack(pixels)
  )


@pytest.fixture(scope='module')
def params(gating_params):
  return gating_params


@pytest.fixture(scope='module')
def dynamic(params):
  return Generator(CFG, DYNAMIC, params, max_new_tokens=NEW, eos_id=None)


@pytest.fixture(scope='module')
def together(dynamic):
  return jax.device_get(dynamic(*batch()))


def step_by_step(generator, prompt, pixels, tokens):
  """Logits [B, T, V] of forced tokens through the cache."""
  turn, _ = generator.start(prompt, pixels)
  logits = [turn.logits]
  for column in tokens.T[:-1]:
    turn, _ = generator.step(turn, jnp.asarray(column), jnp.ones(len(column), bool))
    logits.append(turn.logits)
  return np.stack(logits, 1), turn


def in_one_program(stages, params, function):
  """`function` of the model, compiled as a whole: its operations one by one take several times as long."""
  model = DynLlava(CFG, stages)
  return jax.jit(lambda p: nn.apply(function, model)({'params': p}))(cut_params(params, stages))


def test_rows_mix_and_drop(together):
  """The cases below say something only if some tokens are dropped and some kept."""
  assert 0.2 < together.kept[:, :-1].mean() < 0.8


@pytest.mark.parametrize('row', range(len(ROWS)))
def test_row_alone_equals_row_in_batch(dynamic, together, row):
  alone = jax.device_get(dynamic(*batch([ROWS[row]], numbers=[row])))
  for field in ('tokens', 'kept', 'length', 'evicted'):
    np.testing.assert_array_equal(getattr(alone, field)[0], getattr(together, field)[row])
  np.testing.assert_allclose(alone.margin[0], together.margin[row], atol=1e-4)


def test_row_does_not_depend_on_neighbours_or_order(dynamic, together):
  order = [2, 0, 3, 1]
  shuffled = jax.device_get(dynamic(*batch([ROWS[i] for i in order], numbers=order)))
  np.testing.assert_array_equal(shuffled.tokens, together.tokens[order])
  np.testing.assert_array_equal(shuffled.kept, together.kept[order])


def test_row_does_not_depend_on_padding(dynamic, together):
  wider = jax.device_get(dynamic(*batch(text=TEXT + 7)))
  np.testing.assert_array_equal(wider.tokens, together.tokens)
  np.testing.assert_array_equal(wider.kept, together.kept)


@pytest.mark.parametrize('stages', [DYNAMIC, PYRAMID, FRONT, RANDOM, DENSE], ids=['dynamic', 'pyramid', 'front', 'random', 'dense'])
def test_cached_equals_uncached_decoding(params, stages):
  generator = Generator(CFG, stages, params, max_new_tokens=NEW, eos_id=None)
  cached, uncached = jax.device_get((generator(*batch()), generator.generate_uncached(*batch())))
  np.testing.assert_array_equal(cached.tokens, uncached.tokens)
  np.testing.assert_array_equal(cached.kept, uncached.kept)
  np.testing.assert_allclose(cached.margin, uncached.margin, atol=1e-4)


def test_prefill_plus_steps_equals_one_forward(params):
  """Dense: the logits of n prompt tokens and k steps are those of one prefill over n + k tokens."""
  generator = Generator(CFG, DENSE, params, max_new_tokens=NEW, eos_id=None)
  prompt, pixels = batch()
  tokens = np.random.default_rng(9).integers(3, CFG.llama.vocab_size, (len(ROWS), 4)).astype(np.int32)
  stepped, _ = step_by_step(generator, prompt, pixels, tokens)
  whole = np.pad(np.asarray(prompt.tokens), [(0, 0), (0, 4)])
  for row, length in enumerate(np.asarray(prompt.length)):
    whole[row, length : length + 4] = tokens[row]
  full = dataclasses.replace(prompt, tokens=jnp.asarray(whole), length=prompt.length + 3)
  last, _ = generator.start(full, pixels)
  np.testing.assert_allclose(stepped[:, -1], last.logits, atol=1e-4)


def masked_inputs(prompt, noise=None, dense=None):
  """Answers that begin behind the prompt."""
  return TrainInputs(prompt.length, drawn={'masks': Drawn(noise=noise, dense=dense, told={'tau': jnp.float32(1.0)})})


def test_masked_full_length_forward_equals_gathered_forward(params):
  """Training masks that say what the selector says give the logits of the shortened sequence."""
  prompt, pixels = batch(ROWS[:2])

  def prefill(model):
    image = model.encode_images(normalize(pixels, CFG.vision))
    hidden, traces, _ = model.prefill(prompt, image, CacheSpec(max_new_tokens=1))
    return image, traces, model.logits(hidden)

  image, traces, gathered = in_one_program(DYNAMIC, params, prefill)
  kept = np.zeros((2, P), bool)
  np.put_along_axis(kept, np.asarray(traces[1].kept_image), True, 1)
  forced = np.where(kept, 100.0, -100.0)  # noise so large that it decides
  noise = (jnp.stack([forced, -forced], -1), jnp.zeros((2, TEXT + P, 2)))
  masked = lambda model: model.train_forward(prompt, image, masked_inputs(prompt, noise))
  out = in_one_program(DYNAMIC, params, masked)
  np.testing.assert_array_equal(out.image_mask, kept)
  for row in range(2):
    real = int(traces[1].length[row])
    places = np.asarray(traces[1].positions[row, :real])
    np.testing.assert_allclose(gathered[row, :real], out.logits[row, places], atol=1e-4)


def test_masked_forward_equals_gated_decoding(dynamic, params, together):
  """Training masks over an answer give the logits of decoding it with the gate."""
  prompt, pixels = batch()
  stepped, _ = step_by_step(dynamic, prompt, pixels, together.tokens)
  _, kept_image = dynamic.start(prompt, pixels)
  whole = np.pad(np.asarray(prompt.tokens), [(0, 0), (0, NEW)])
  for row, length in enumerate(np.asarray(prompt.length)):
    whole[row, length : length + NEW - 1] = together.tokens[row, :-1]
  answered = dataclasses.replace(prompt, tokens=jnp.asarray(whole), length=prompt.length + NEW - 1)
  kept = np.zeros((len(ROWS), P), bool)
  np.put_along_axis(kept, np.asarray(kept_image[1]), True, 1)
  forced = np.where(kept, 100.0, -100.0)  # noise so large that it decides; none for the text, so the larger logit does
  noise = (jnp.stack([forced, -forced], -1), jnp.zeros((*whole.shape, 2)))

  judged = Objective(sparsity=SparsityConfig(min_answer_len=NEW - 1))

  def masked(model):
    image = model.encode_images(normalize(pixels, CFG.vision))
    return model.train_forward(answered, image, masked_inputs(prompt, noise), judged)

  out = in_one_program(DYNAMIC, params, masked)
  for row, start in enumerate(np.asarray(prompt.length)):
    np.testing.assert_array_equal(out.text_mask[row, start : start + NEW - 1], together.kept[row, :-1])
    np.testing.assert_allclose(out.logits[row, start - 1 : start + NEW - 1], stepped[row], atol=1e-4)


def test_rows_trained_dense_use_no_mask(params):
  prompt, pixels = batch(ROWS[:2])
  drop = jnp.broadcast_to(jnp.array([-100.0, 100.0]), (2, TEXT + P, 2))  # noise that drops whatever it may

  def logits(stages, *drawn):
    def forward(model):
      image = model.encode_images(normalize(pixels, CFG.vision))
      return model.train_forward(prompt, image, masked_inputs(prompt, *drawn)).logits

    return in_one_program(stages, params, forward)

  sparse = logits(DYNAMIC, (drop[:, :P], drop), jnp.array([True, False]))
  whole = logits((Stage(),))
  real = int(prompt.length[0])
  np.testing.assert_allclose(sparse[0, :real], whole[0, :real], atol=1e-5)
  assert np.abs(sparse[1, : int(prompt.length[1])] - whole[1, : int(prompt.length[1])]).max() > 1e-2


def test_cache_with_room_for_everything_never_evicts(params, together):
  roomy = (DYNAMIC[0], dataclasses.replace(DYNAMIC[1], text_keep_budget=1.0))
  result = jax.device_get(Generator(CFG, roomy, params, max_new_tokens=NEW, eos_id=None)(*batch()))
  assert result.evicted.sum() == 0
  np.testing.assert_array_equal(result.tokens, together.tokens)


def test_small_cache_evicts_exactly_the_smallest_margins(params):
  small = (DYNAMIC[0], dataclasses.replace(DYNAMIC[1], text_keep_budget=0.2))
  generator = Generator(CFG, small, params, max_new_tokens=NEW, eos_id=None)
  prompt, pixels = batch()
  turn, _ = generator.start(prompt, pixels)
  result, cache = jax.device_get(generator.decode(turn, prompt.seed))
  assert cache.stages[1].budget == 2 and result.evicted.sum() > 0
  for row in range(len(ROWS)):
    fed = slice(0, NEW - 1)
    kept = np.sort(result.margin[row, fed][result.kept[row, fed]])[::-1]
    held = np.sort(cache.stages[1].margin[row][np.isfinite(cache.stages[1].margin[row])])[::-1]
    np.testing.assert_array_equal(held, kept[:2])
    assert result.evicted[row] == max(len(kept) - 2, 0)


def test_later_turn_equals_one_longer_prompt(params):
  """A chunk on top of a cache, nothing generated between, gives the logits of the whole prompt."""
  generator = Generator(CFG, DYNAMIC, params, max_new_tokens=NEW, eos_id=None, later_tokens=4)
  prompt, pixels = batch(((9, 3), (6, 1)), text=9)
  chunk = jnp.asarray(np.random.default_rng(3).integers(3, CFG.llama.vocab_size, (2, 4)), jnp.int32)
  counts = jnp.array([4, 2])
  turn, _ = generator.start(prompt, pixels)
  turn, _ = generator.append(turn, chunk, counts)
  whole = np.pad(np.asarray(prompt.tokens), [(0, 0), (0, 4)])
  for row, length in enumerate(np.asarray(prompt.length)):
    whole[row, length : length + counts[row]] = chunk[row, : counts[row]]
  longer = dataclasses.replace(prompt, tokens=jnp.asarray(whole), length=prompt.length + counts)
  expected, _ = generator.start(longer, pixels)
  np.testing.assert_allclose(turn.logits, expected.logits, atol=1e-4)


def test_second_batch_of_the_same_shapes_compiles_nothing(dynamic, together):
  before = dynamic.compilations()
  dynamic(*batch(ROWS[::-1], numbers=[7, 8, 9, 10]))
  assert dynamic.compilations() == before


def test_streaming_yields_what_the_loop_generates(dynamic, together):
  np.testing.assert_array_equal(np.stack(list(dynamic.stream(*batch())), 1), together.tokens)


def test_rows_stop_at_eos_one_by_one(params, together):
  eos = int(together.tokens[0, 3])
  generator = Generator(CFG, DYNAMIC, params, max_new_tokens=NEW, eos_id=eos)
  result = jax.device_get(generator(*batch()))
  uncached = jax.device_get(generator.generate_uncached(*batch()))
  for row, tokens in enumerate(together.tokens):
    where = np.flatnonzero(tokens == eos)
    length = int(where[0]) + 1 if len(where) else NEW
    assert result.length[row] == uncached.length[row] == length
    np.testing.assert_array_equal(result.tokens[row], np.where(np.arange(NEW) < length, tokens, 0))
  np.testing.assert_array_equal(result.tokens, uncached.tokens)
  np.testing.assert_array_equal(np.stack(list(generator.stream(*batch())), 1), result.tokens[:, : result.length.max()])


def test_sampling_is_reproducible_per_row_and_obeys_its_limits(params):
  hot = Generator(CFG, DYNAMIC, params, max_new_tokens=NEW, eos_id=None, sampling=Sampling(temperature=1.5, top_k=5, top_p=0.9))
  one, two = hot(*batch()).tokens, hot(*batch([ROWS[1]], numbers=[1])).tokens
  np.testing.assert_array_equal(one[1], two[0])
  assert len(np.unique(np.asarray(one))) > 8
  cold = Generator(CFG, DYNAMIC, params, max_new_tokens=NEW, eos_id=None, sampling=Sampling(temperature=1.0, top_k=1))
  greedy = Generator(CFG, DYNAMIC, params, max_new_tokens=NEW, eos_id=None)
  np.testing.assert_array_equal(cold(*batch()).tokens, greedy(*batch()).tokens)


def test_bfloat16_runs_and_stays_close(params):
  results = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    generator = Generator(CFG, DENSE, params, max_new_tokens=NEW, eos_id=None, dtype=dtype)
    turn, _ = generator.start(*batch())
    assert turn.cache.stages[0].k[0].dtype == dtype and turn.logits.dtype == jnp.float32
    results[dtype] = np.asarray(turn.logits)
  assert np.abs(results[jnp.float32] - results[jnp.bfloat16]).max() < 0.25 * results[jnp.float32].std()


def test_sharded_generation_equals_one_device(params, together):
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  placed = jax.device_put(params, sharding.shardings(abstract_params(CFG), mesh))
  generator = Generator(CFG, DYNAMIC, placed, max_new_tokens=NEW, eos_id=None)
  with sharding.on_mesh(mesh):
    inputs = jax.device_put(batch(), sharding.batch_sharding(mesh))
    result = jax.device_get(generator(*inputs))
  np.testing.assert_array_equal(result.tokens, together.tokens)
  np.testing.assert_array_equal(result.kept, together.kept)


def test_cutting_and_joining_the_layers_is_lossless(params):
  for stages in (DENSE, DYNAMIC, PYRAMID):
    back = join_params(cut_params(params, stages))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, back))


def test_several_turns_stay_within_the_cache(params):
  """`max_new_tokens` counts over all turns; what no longer fits is refused, not lost."""
  generator = Generator(CFG, DENSE, params, max_new_tokens=6, eos_id=None, later_tokens=3)
  prompt, pixels = batch(ROWS[:1])
  turn, _ = generator.start(prompt, pixels)
  first, cache = generator.decode(turn, prompt.seed)
  chunk, count = jnp.full((1, 3), 5, jnp.int32), jnp.array([3])
  turn, _ = generator.append(Turn(cache, jnp.zeros((1, CFG.llama.vocab_size))), chunk, count)
  second, cache = generator.decode(turn, prompt.seed)
  stage = cache.stages[0]
  assert int(first.length[0]) == 6 and int(second.length[0]) == 2  # 5 + 1 fed tokens fill the budget of 6
  assert int(stage.length[0]) == int(cache.position[0]) <= stage.slots and int(stage.evicted[0]) == 0
  with pytest.raises(ValueError, match='room for 0 more'):
    generator.append(Turn(cache, turn.logits), chunk, count)


def test_chunk_longer_than_the_room_is_refused(params):
  generator = Generator(CFG, DYNAMIC, params, max_new_tokens=NEW, eos_id=None, later_tokens=2)
  turn, _ = generator.start(*batch(ROWS[:1]))
  with pytest.raises(ValueError, match='later_tokens'):
    generator.append(turn, jnp.zeros((1, 3), jnp.int32), jnp.array([3]))
