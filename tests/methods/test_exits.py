"""Early exit: the record of DeeR and wrong builds of it, rows in any batch, with a cache and without, thresholds and their file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from dynllava_jax import costs, methods, presets
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import ConfigError, ExitHeadConfig, Piece, Stage
from dynllava_jax.convert.records import deer as records
from dynllava_jax.convert.records.bases import open_record
from dynllava_jax.evals import exit_thresholds
from dynllava_jax.evals.layout import Rows
from dynllava_jax.generate import Generator
from dynllava_jax.methods.exits import ALWAYS, NEVER, shares, solve, taken
from dynllava_jax.models import exiting
from dynllava_jax.models.batch import Prompt
from dynllava_jax.serving.engine import Engine
from dynllava_jax.serving.request import Request

RECORD = GOLDEN / 'methods' / 'deer'
CFG = dataclasses.replace(presets.TINY, exit_head=ExitHeadConfig())
P, TEXT, NEW, LAYERS = CFG.vision.num_patches, 10, 6, CFG.llama.num_layers
ROWS = ((9, 3), (6, 5), (8, -1), (10, 0))  # text tokens, place of the image or -1


def stages(per, limits, name='confidence', starts=(1, 2), **options):
  """An exit at the end of the stage that begins at each of `starts`, behind a stage of one layer; then one more stage."""
  piece = lambda limit: Piece(name, dict(threshold=float(limit), per=per, **options))
  return (Stage(), *(Stage(start=s, exit=piece(t)) for s, t in zip(starts, limits)), Stage(start=starts[-1] + 1))


def batch(numbers=(0, 1, 2, 3)):
  """Prompt and pixels; row i depends on its number alone."""
  tokens, pixels = np.zeros((len(numbers), TEXT + P), np.int32), []
  lengths = np.asarray([ROWS[i][0] + (P if ROWS[i][1] >= 0 else 0) for i in numbers], np.int32)
  for row, i in enumerate(numbers):
    rng = np.random.default_rng(i)
    tokens[row, : lengths[row]] = rng.integers(3, CFG.llama.vocab_size, lengths[row])
    pixels.append(rng.integers(0, 256, (CFG.vision.image_size,) * 2 + (3,), np.uint8))
  starts = np.asarray([ROWS[i][1] for i in numbers], np.int32)
  return Prompt(tokens, lengths, starts, np.asarray(numbers, np.uint32)), np.stack(pixels)


@pytest.fixture(scope='module')
def params(tiny_params):
  head = jax.random.normal(jax.random.key(3), (CFG.llama.hidden_size, CFG.llama.vocab_size)) * 0.3
  return tiny_params | {'exit_head': {'norm': {'scale': jnp.ones(CFG.llama.hidden_size)}, 'head': head}}


@pytest.fixture(scope='module')
def limits(params):
  """Thresholds by which some rows and tokens leave at each exit, and some at none."""
  generator = Generator(CFG, stages('question', (NEVER, NEVER)), params, max_new_tokens=1, eos_id=None)
  values = np.asarray(generator.start(*batch())[0].cache.left.value)[:, 1:3]
  between = lambda x, i: np.sort(x)[i : i + 2].mean()  # no row lies on it
  first = between(values[:, 0], 0)
  return first, between(values[values[:, 0] > first, 1], 1)


@pytest.mark.slow
@pytest.mark.parametrize('per', ['question', 'token'])
def test_rows_alone_in_a_batch_and_without_a_cache(params, limits, per):
  generator = Generator(CFG, stages(per, limits), params, max_new_tokens=NEW, eos_id=None)
  together = jax.device_get(generator(*batch()))
  assert len(np.unique(together.layers)) == 3  # so all of this is about something
  if per == 'question':
    assert (together.layers == together.layers[:, :1]).all()
  uncached = jax.device_get(generator.generate_uncached(*batch()))
  np.testing.assert_array_equal(uncached.tokens, together.tokens)
  np.testing.assert_array_equal(uncached.layers, together.layers)
  for row in range(len(ROWS)):
    alone = jax.device_get(generator(*batch([row])))
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    np.testing.assert_array_equal(alone.layers[0], together.layers[row])


@pytest.mark.slow
def test_caches_of_layers_that_no_row_needs_are_not_there(params):
  generator = Generator(CFG, stages('question', (ALWAYS, NEVER)), params, max_new_tokens=NEW, eos_id=None)
  turn, _ = generator.start(*batch())
  _, cache = generator.decode(turn, np.zeros(len(ROWS), np.uint32))
  assert len(cache.stages) == 2
  # The first two layers alone with the exit head as theirs say the same.
  cut = dataclasses.replace(CFG, llama=dataclasses.replace(CFG.llama, num_layers=2), exit_head=None)
  llama = params['llama'] | {'layers': jax.tree.map(lambda x: x[:2], params['llama']['layers'])}
  small = params | {'llama': llama | params['exit_head']}
  del small['exit_head']
  found = jax.device_get(Generator(cut, (Stage(),), small, max_new_tokens=NEW, eos_id=None)(*batch()))
  np.testing.assert_array_equal(found.tokens, jax.device_get(generator(*batch())).tokens)


@pytest.mark.slow
@pytest.mark.parametrize('per', ['question', 'token'])
def test_a_later_turn(params, limits, per):
  """Per question it runs at the depth of the first; per token what comes is as if all had been one prompt."""
  generator = Generator(CFG, stages(per, limits), params, max_new_tokens=NEW, later_tokens=4, eos_id=None)
  chunk, count = np.full((len(ROWS), 4), 7, np.int32), np.asarray([4, 2, 3, 0], np.int32)
  turn, _ = generator.start(*batch())
  before = jax.device_get(turn.cache.left)
  prompt, pixels = batch()
  later, _ = generator.append(turn, chunk, count)
  after = jax.device_get(later.cache.left)
  np.testing.assert_array_equal(after.stage[3], before.stage[3])
  if per == 'question':
    np.testing.assert_array_equal(after.stage, before.stage)
  else:
    whole = np.pad(prompt.tokens, [(0, 0), (0, 4)])
    for row, n in enumerate(count):
      whole[row, prompt.length[row] : prompt.length[row] + n] = 7
    once, _ = generator.start(dataclasses.replace(prompt, tokens=whole, length=prompt.length + count), pixels)
    np.testing.assert_array_equal(np.asarray(once.cache.left.stage)[:3], after.stage[:3])
    np.testing.assert_allclose(np.asarray(once.logits)[:3], np.asarray(later.logits)[:3], atol=1e-4)


class Letters:
  """A tokenizer of one letter per token."""

  def decode(self, ids):
    return ''.join(chr(97 + i % 26) for i in ids)


@pytest.mark.slow
@pytest.mark.parametrize('per', ['question', 'token'])
def test_rows_of_an_engine_leave_as_they_do_alone(params, limits, per):
  """Slots whose rows left at different depths, and slots that are free, lie side by side."""
  generator = Generator(CFG, stages(per, limits), params, max_new_tokens=4, eos_id=None)
  engine = Engine(generator, Letters(), text_length=TEXT, slots=3, steps=2)
  one = lambda i: Rows(*batch([i]), np.zeros((1, 0, 0), np.int32), np.zeros((1, 0), np.int32))
  tickets = [engine.submit(Request(str(i), one(i))) for i in range(len(ROWS))]
  engine.run(tickets)
  for i, ticket in enumerate(tickets):
    assert list(ticket.reply().tokens) == np.asarray(generator(*batch([i])).tokens[0]).tolist()


@pytest.fixture(scope='module')
def record():
  return open_record(RECORD, None)


def test_recorded_thresholds(record):
  found = list(records.thresholds(record))
  assert len(found) == 15 and [str(q) for q in found if not q.ok] == []


@pytest.mark.slow
def test_every_recorded_quantity_agrees(record):
  """What `--verify` does."""
  found = list(records.verify(record))
  assert [str(q) for q in found if not q.ok] == []
  compared = {q.name.rpartition(': ')[2] for q in found}
  given = ('/values', '/ratio', 'delta/a', 'delta/b', 'ids', 'prompt', 'labels', 'random_exit', 'two_exit', 'cut')
  assert [k for k in record.case if k not in compared and not k.endswith(given)] == []


def nothing_filled(patch):
  original = exiting.run_stage
  patch.setattr(exiting, 'run_stage', lambda *a, **k: original(*a, **k | {'fill': False}))


def exact_states(patch):
  """States of tokens that left go on, as if layers above were run for them too: exact, but saves nothing."""
  original = exiting.run_stage
  patch.setattr(exiting, 'run_stage', lambda *a, gone, **k: original(*a, gone=gone & False, **k))


def logits_compared(patch):
  patch.setattr(exiting.jax.nn, 'softmax', lambda x, axis: x)


@pytest.mark.slow
@pytest.mark.parametrize('wrong', [nothing_filled, exact_states, logits_compared])
def test_wrong_builds_fail(record, wrong, monkeypatch):
  wrong(monkeypatch)
  model = records.text_decoder.model_of(record, exit_head=ExitHeadConfig())
  params = records.text_decoder.params_of(record, model)
  assert not all(q.ok for q in records.decoded(record, model, params, 'token', False))


def test_the_solver_with_ties_and_too_few():
  values = np.asarray([[1, 1, 1, 2, 3, 4.0], [5, 5, 5, 1, 2, 3], [0, 0, 0, 0, 0, 0]])
  limits = solve(values, np.asarray([1 / 3, 1 / 3, 1 / 3]))
  np.testing.assert_array_equal(limits[:2], [1, 2])  # two were wanted, three are as small
  np.testing.assert_array_equal(taken(values, limits), [0, 0, 0, 1, 1, 2])
  assert solve(values, np.asarray([0.9, 0.9, 0.1]))[1] == NEVER  # one is left, five are wanted
  assert solve(values, np.asarray([0.1, 0.5, 0.4]))[0] == NEVER  # less than one
  assert shares(0.5, 3).sum() == pytest.approx(1) and shares(0.5, 3)[0] > shares(2.0, 3)[0]


@pytest.mark.parametrize(
  'changed, said',
  [
    (dict(model=presets.TINY), 'this model has none'),
    (dict(stages=(Stage(exit=Piece('deer')), Stage(start=2))), 'compares with the end of the stage before'),
    (dict(stages=(Stage(exit=Piece('confidence')), Stage(start=2, exit=Piece('confidence', {'per': 'token'})))), 'per token'),
    (dict(stages=(Stage(exit=Piece('confidence', {'per': 'answer'})), Stage(start=2))), "expected 'question' or 'token'"),
    (dict(stages=(Stage(exit=Piece('deer', {'distance': 'l3'})), Stage(start=2))), 'expected one of rms'),
    (dict(stages=(Stage(exit=Piece('confidence', {'ratio': 1.0, 'threshold': 0.1})), Stage(start=2))), 'leave one out'),
  ],
)
def test_runs_that_cannot_be(changed, said):
  of = dict(model=CFG, stages=stages('question', (0, 0))) | changed
  with pytest.raises(ConfigError, match=said):
    methods.check_run(of['model'], of['stages'])


def test_thresholds_beside_a_checkpoint(tmp_path, monkeypatch):
  monkeypatch.setattr(exit_thresholds.checkpoint, 'locate', lambda path: (tmp_path, 7))
  run = (Stage(), *(Stage(start=s, exit=Piece('confidence', {'ratio': 0.8})) for s in (1, 2)), Stage(start=3))
  with pytest.raises(ConfigError, match='no thresholds of confidence behind layers .2, 3, 4. with ratio 0.8 for step 7'):
    exit_thresholds.with_thresholds(run, 'x', LAYERS)
  values = np.random.default_rng(0).random((3, 100))
  for ratio in (0.8, 2.0, 0.8):
    entry = exit_thresholds.entry(exit_thresholds.described(run, LAYERS), ratio, 7, values)
    exit_thresholds.store(tmp_path, [entry])
  entries = json.loads((tmp_path / exit_thresholds.FILE).read_text())
  assert [e['ratio'] for e in entries] == [0.8, 2.0] and entries[0]['layers'] == [2, 3, 4]
  found = exit_thresholds.with_thresholds(run, 'x', LAYERS)
  assert [dict(s.exit.options)['threshold'] for s in found if s.exit] == entries[0]['thresholds'][:2]
  assert exit_thresholds.with_thresholds(stages('token', (0, 0)), 'x', LAYERS) == stages('token', (0, 0))
  (tmp_path / exit_thresholds.FILE).write_text('{}')
  with pytest.raises(ConfigError, match='calibrate again'):
    exit_thresholds.with_thresholds(run, 'x', LAYERS)


def test_what_leaving_early_saves():
  run, spec, kept = stages('question', (0, 0)), CacheSpec(max_new_tokens=8), [True] * 7
  flops = lambda run, depths=(): costs.sample_flops(CFG, run, 10, kept, spec, depths=depths)
  head = 2 * CFG.llama.hidden_size * CFG.llama.vocab_size
  dense = flops((Stage(),))
  assert flops(run) == pytest.approx(dense + 2 * head)  # both exits spoke, to no avail
  cut = dataclasses.replace(CFG, llama=dataclasses.replace(CFG.llama, num_layers=2), exit_head=None)
  assert flops(run, [2] * 8) == pytest.approx(costs.sample_flops(cut, (Stage(),), 10, kept, spec) + head)
  by_token = flops(stages('token', (0, 0)), [2] * 8)
  assert flops(run, [2] * 8) < by_token < dense + 16 * head  # the prompt runs through all layers
