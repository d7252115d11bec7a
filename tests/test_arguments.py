"""Whatever is passed to generation works or is a ValueError that names the argument."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynllava_jax import presets
from dynllava_jax.config import DENSE, ConfigError, Stage
from dynllava_jax.generate import Generator, Sampling
from dynllava_jax.models.dynllava import Prompt
from dynllava_jax.models.params import cut_params

CFG = presets.TINY
P, R, V = CFG.vision.num_patches, CFG.vision.image_size, CFG.llama.vocab_size
TEXT, NEW = 5, 3
GOOD = dict(max_new_tokens=NEW, eos_id=None, later_tokens=2)


@pytest.fixture(scope='module')
def generator(tiny_params):
  return Generator(CFG, DENSE, tiny_params, **GOOD)


def prompt(rows=2, **changes):
  tokens = np.full((rows, TEXT + P), 7, np.int32)
  tokens[:, 1 : 1 + P] = -200  # anything, where the image goes
  values = dict(tokens=tokens, length=np.full(rows, TEXT + P, np.int32), image_start=np.ones(rows, np.int32))
  return Prompt(**values | dict(seed=np.arange(rows, dtype=np.uint32)) | changes)


def pixels(rows=2, dtype=np.uint8, size=R):
  return np.zeros((rows, size, size, 3), dtype)


@pytest.mark.parametrize('name', ['max_new_tokens', 'later_tokens', 'given_tokens', 'eos_id'])
@pytest.mark.parametrize('value', [-3, 2.5, True, '4', float('nan'), 10**12, [3]], ids=str)
def test_sizes_of_a_generator(tiny_params, name, value):
  with pytest.raises(ValueError, match=f'^{name}: '):
    Generator(CFG, DENSE, tiny_params, **GOOD | {name: value})


@pytest.mark.parametrize(
  'name, changes',
  [
    ('max_new_tokens', {'max_new_tokens': 0}),
    ('max_new_tokens', {'max_new_tokens': None}),
    ('eos_id', {'eos_id': V}),
    ('dtype', {'dtype': jnp.int32}),
    ('dtype', {'dtype': 'float33'}),
    ('dtype', {'dtype': None.__class__}),
    ('dtype', {'dtype': None}),
    ('dtype', {'dtype': jnp.float8_e4m3fn}),
    ('dtype', {'dtype': 'float64'}),
    ('reducer', {'reducer': 'fastervlm'}),
    ('reducer', {'reducer': {'name': 'fastervlm'}}),
    ('lora', {'lora': True}),
    ('sampling', {'sampling': 0.7}),
    ('stages', {'stages': ()}),
    ('stages', {'stages': [Stage(start=0)]}),
    ('stages', {'stages': (Stage(start=0), Stage(start=99))}),
    ('stages', {'stages': 'dense'}),
    ('cfg', {'cfg': None}),
    ('params', {'params': None}),
    ('params', {'params': {}}),
    ('params', {'params': {'llama': {'stage_0': {}}}}),
    ('params', {'params': {'llama': {'layers': {'w': np.zeros((99, 2))}}}}),
  ],
  ids=lambda x: str(x)[:40],
)
def test_other_arguments_of_a_generator(tiny_params, name, changes):
  given = dict(cfg=CFG, stages=DENSE, params=tiny_params) | GOOD | changes
  with pytest.raises(ValueError, match=f'^{name}: '):
    Generator(given.pop('cfg'), given.pop('stages'), given.pop('params'), **given)


def changed(params, name, value):
  """Parameters with another value in the place of one; None takes it out."""
  group, _, rest = name.partition('/')
  inner = value if not rest else changed(params.get(group, {}), rest, value)
  return {k: v for k, v in params.items() if k != group} | ({} if inner is None else {group: inner})


@pytest.mark.parametrize(
  'name, value, message',
  [
    ('projector', None, 'projector/.* is missing, expected floating-point numbers of shape'),
    ('llama/norm', None, 'llama/norm/.* is missing'),
    ('llama/layers/q', None, 'llama/layers/q is missing'),
    ('llama/layers/q', np.zeros((4, 3, 4, 5), np.float32), 'llama/layers/q has shape 4x3x4x5, expected'),
    ('llama/head', np.zeros(3, np.int8), 'llama/head is int8, expected floating-point numbers'),
    ('projector/linear_0/kernel', 'none', 'projector/linear_0/kernel is str, expected an array'),
    ('projector/more', np.zeros(3, np.float32), 'projector/more is no parameter of this model'),
    ('optimizer', {'a': np.zeros(3, np.float32)}, 'optimizer is no group of this model, expected .*llama'),
    ('adapters', {'layers': {}}, 'adapters is no group of this model'),
    ('scales', {'layers': {}}, 'scales is no group of this model'),
  ],
)
def test_parameters_are_those_of_the_config(tiny_params, name, value, message):
  with pytest.raises(ValueError, match=f'^params: {message}'):
    Generator(CFG, DENSE, changed(tiny_params, name, value), **GOOD)


@pytest.mark.parametrize('kind', [np.int8, np.int32, np.bool_, np.complex64])
def test_parameters_are_numbers_with_a_point(tiny_params, kind):
  with pytest.raises(ValueError, match=f'^params: .* is {np.dtype(kind)}, expected floating-point numbers'):
    Generator(CFG, DENSE, jax.tree.map(lambda x: np.zeros(x.shape, kind), tiny_params), **GOOD)


def test_predictors_are_needed_where_a_stage_asks_them(tiny_params):
  without = {k: v for k, v in tiny_params.items() if not k.endswith('_predictor')}
  Generator(CFG, DENSE, without, **GOOD)
  with pytest.raises(ValueError, match='^params: image_predictor/.* is missing'):
    Generator(CFG, (Stage(), Stage(start=1, selector='dynamic', image_keep_rate=0.5)), without, **GOOD)


def test_cut_parameters_are_compared_too(tiny_params):
  stages = (Stage(), Stage(start=1, selector='fastv', image_keep_rate=0.5))
  cut = cut_params(tiny_params, stages)
  Generator(CFG, stages, cut, **GOOD)
  with pytest.raises(ValueError, match='^params: llama/layers/q has shape'):
    Generator(CFG, stages, changed(cut, 'llama/stage_1/q', cut['llama']['stage_1']['q'][..., :1]), **GOOD)
  with pytest.raises(ValueError, match='^params: llama/embedding is missing'):
    Generator(CFG, stages, changed(cut, 'llama/embedding', None), **GOOD)


@pytest.mark.parametrize(
  'field, value',
  [
    *[('start', v) for v in ('1', None, 1.0, True)],
    *[('selector', v) for v in (None, 3, ['fastv'])],
    *[(name, v) for name in ('image_keep_rate', 'text_keep_budget', 'image_tokens') for v in ('half', None, [1], True)],
    ('image_tokens', 2.5),
    *[(name, v) for name in ('layers', 'compressor') for v in ({'x': 3}, 'snapkv', 3)],
    *[('options', v) for v in (3, 'x', [1], [('a', 1, 2)], {3: 1})],
  ],
  ids=str,
)
def test_a_stage_is_checked_where_it_is_made(field, value):
  with pytest.raises(ConfigError, match=field) as caught:
    Stage(**{field: value})
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'name, value',
  [(n, v) for n in ('temperature', 'top_k', 'top_p') for v in (-1, float('nan'), float('inf'), '1', None, True, [1], 10**400)]
  + [('top_k', 2.5), ('top_p', 0), ('top_p', 1.5), ('top_k', 2**40), ('temperature', 1e-38)],
  ids=str,
)
def test_sampling(name, value):
  with pytest.raises(ValueError, match=f'^sampling.{name}: '):
    Sampling(**{name: value})


def test_numpy_numbers_are_numbers(tiny_params):
  Sampling(temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float64(1))
  Generator(CFG, DENSE, tiny_params, max_new_tokens=np.int32(2), eos_id=np.int64(1))


BAD_PROMPTS = [
  ('prompt', None, None),
  ('prompt', {}, None),
  ('prompt.tokens', prompt(tokens=[[1, 2]]), None),
  ('prompt.tokens', prompt(tokens=np.zeros((2, TEXT + P))), None),
  ('prompt.tokens', prompt(tokens=np.zeros(TEXT + P, np.int32)), None),
  ('prompt.tokens', prompt(rows=0), None),
  ('prompt.tokens', prompt(tokens=np.zeros((2, P), np.int32)), None),
  ('prompt.tokens', prompt(tokens=np.full((2, TEXT + P), V, np.int32)), None),
  ('prompt.tokens', prompt(tokens=np.full((2, TEXT + P), -200, np.int32)), None),
  ('prompt.length', prompt(length=np.int32([5])), None),
  ('prompt.length', prompt(length=np.int32([0, 5])), None),
  ('prompt.length', prompt(length=np.int32([9, 999])), None),
  ('prompt.length', prompt(length=np.float32([9, 9])), None),
  ('prompt.image_start', prompt(image_start=np.int32([-2, 0])), None),
  ('prompt.image_start', prompt(image_start=np.int32([TEXT + 1, 0])), None),
  ('prompt.image_start', prompt(length=np.int32([3, TEXT + P])), None),
  ('prompt.image_start', prompt(image_start=None), None),
  ('prompt.seed', prompt(seed=np.float32([1, 2])), None),
  ('prompt.seed', prompt(seed=3), None),
  ('pixels', prompt(), pixels(1)),
  ('pixels', prompt(), pixels(dtype=np.float32)),
  ('pixels', prompt(), pixels(dtype=np.int32)),
  ('pixels', prompt(), pixels(size=R + 1)),
  ('pixels', prompt(), 'photo.jpg'),
  ('pixels', prompt(), pixels()[..., :1]),
]


@pytest.mark.parametrize('name, bad, image', BAD_PROMPTS, ids=lambda x: x if isinstance(x, str) else '')
def test_prompts(generator, name, bad, image):
  image = pixels() if image is None else image
  for call in (generator, generator.start, generator.generate_uncached, lambda *a: next(generator.stream(*a))):
    with pytest.raises(ValueError, match=f'^{name}: '):
      call(bad, image)


def ints(*values):
  return np.asarray(values, np.int32)


@pytest.mark.parametrize(
  'message, call',
  [
    ('turn: ', lambda g, t: g.append(None, ints([1], [1]), ints(1, 1))),
    ('turn: ', lambda g, t: g.force(t.cache, ints([1], [1]), ints(1, 1))),
    ('turn: ', lambda g, t: g.decode(None, np.uint32([1, 2]))),
    ('chunk: ', lambda g, t: g.append(t, [[1], [1]], ints(1, 1))),
    ('chunk: ', lambda g, t: g.append(t, ints([1]), ints(1, 1))),
    ('chunk: ', lambda g, t: g.append(t, np.zeros((2, 0), np.int32), ints(0, 0))),
    ('chunk: ', lambda g, t: g.append(t, ints([V], [1]), ints(1, 1))),
    ('chunk: ', lambda g, t: g.append(t, np.float32([[1], [1]]), ints(1, 1))),
    ('count: ', lambda g, t: g.append(t, ints([1], [1]), ints(1, 2))),
    ('count: ', lambda g, t: g.append(t, ints([1], [1]), ints(-1, 1))),
    ('count: ', lambda g, t: g.append(t, ints([1], [1]), ints(1))),
    ('count: ', lambda g, t: g.append(t, ints([1], [1]), 1)),
    ('the turn has 3 tokens.*raise later_tokens', lambda g, t: g.append(t, ints([1] * 3, [1] * 3), ints(3, 3))),
    ('tokens: ', lambda g, t: g.force(t, ints([1], [-1]), ints(1, 1))),
    ('tokens: ', lambda g, t: g.force(t, ints([1]), ints(1))),
    ('tokens: ', lambda g, t: g.force(t, None, ints(1, 1))),
    ('length: ', lambda g, t: g.force(t, ints([1], [1]), ints(1, 2))),
    ('length: ', lambda g, t: g.force(t, ints([1], [1]), np.float32([1, 1]))),
    ('row 1: 0 tokens are held and 4 more.*raise given_tokens', lambda g, t: g.force(t, ints([1] * 5, [1] * 5), ints(1, 5))),
    ('seed: ', lambda g, t: g.decode(t, np.uint32([1]))),
    ('seed: ', lambda g, t: g.decode(t, 3)),
    ('active: ', lambda g, t: g.step(t, ints(1, 1), ints(1, 1))),
    ('tokens: ', lambda g, t: g.step(t, ints([1], [1]), np.ones(2, bool))),
    ('tokens: ', lambda g, t: g.step(t, ints(1, V), np.ones(2, bool))),
  ],
)
def test_turns(generator, turn, message, call):
  with pytest.raises(ValueError, match=f'^{message}'):
    call(generator, turn)


@pytest.fixture(scope='module')
def turn(generator):
  """None of the refused calls consumes it."""
  return generator.start(prompt(), pixels())[0]


def test_a_turn_that_was_consumed_is_refused(generator):
  first, _ = generator.start(prompt(), pixels())
  generator.force(first, ints([1], [1]), ints(1, 1))
  jax.tree.map(lambda x: x.delete(), first.cache)  # as the call does where the device supports it
  with pytest.raises(ValueError, match='^turn: was consumed'):
    generator.force(first, ints([1], [1]), ints(1, 1))


def test_more_steps_than_there_is_room_for_are_refused(generator):
  now, _ = generator.start(prompt(), pixels())
  for _ in range(NEW):
    now, _ = generator.step(now, ints(1, 1), np.ones(2, bool))
  with pytest.raises(ValueError, match='row 0: 3 tokens are held and 1 more come.*raise max_new_tokens'):
    generator.step(now, ints(1, 1), np.ones(2, bool))
  generator.step(now, ints(1, 1), np.zeros(2, bool))


def test_arrays_of_either_kind_and_rows_without_image_are_accepted(generator):
  text = dataclasses.replace(prompt(), tokens=np.full((2, TEXT + P), 7, np.int32), image_start=ints(-1, 1))
  one = generator(text, pixels())
  other = generator(jax.tree.map(jnp.asarray, text), jnp.asarray(pixels()))
  np.testing.assert_array_equal(one.tokens, other.tokens)
