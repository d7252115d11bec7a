"""Steps that went wrong: named with their samples, left on disk, and skipped where that is asked for."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_run_files import CONFIG
from test_step import CFG as STEP
from test_step import batch, begin

from dynllava_jax import checkpoint, sharding
from dynllava_jax.config import IGNORE, ConfigError, OptimizerConfig
from dynllava_jax.data import batches, inspect
from dynllava_jax.data.batches import Batch
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.saved_batch import load_batch, save_batch
from dynllava_jax.training import loop, watch
from dynllava_jax.training.metrics import read_metrics
from dynllava_jax.training.step import WINDOW, judge, make_optimizer, make_train_step, new_watch

P = 4
VISION = CONFIG.model.vision


def row_of(supervised, wrong=None, length=10):
  """Begin, image, three tokens of a question, an answer of three; two of padding. `wrong`: (position, label)."""
  tokens = np.r_[1, np.zeros(P, int), 5, 6, 7, 8, 9, 2, 0, 0].astype(np.int32)[None]
  labels = np.full_like(tokens, IGNORE)
  labels[0, supervised] = tokens[0, supervised]
  if wrong:
    labels[0, wrong[0]] = wrong[1]
  pixels = np.zeros((1, VISION.image_size, VISION.image_size, 3), np.uint8)
  return Batch(pixels, tokens, labels, np.array([P + 7]), np.array([1]), np.array([8]), np.zeros(1, np.uint32), np.array([5]))


ANSWER = [8, 9, 10]


@pytest.mark.parametrize(
  'batch, words',
  [
    (row_of([]), 'no token is supervised'),
    (row_of([0]), 'no token is supervised'),  # nothing predicts the first
    (row_of([*range(5, 11)]), 'every token is supervised, the question too'),
    (row_of(ANSWER, (3, 7)), 'labels on image positions or padding'),
    (row_of(ANSWER, (11, 7)), 'labels on image positions or padding'),
    (row_of(ANSWER, (9, 5)), 'labels are not the tokens at their places'),
  ],
)
def test_labels_that_cannot_be_right_are_named(batch, words):
  row, what = watch.wrong_labels(batch, P, captions=False)
  assert row == 0 and words in what


def test_right_labels_pass_and_captions_supervise_all_text():
  assert watch.wrong_labels(row_of(ANSWER), P, captions=False) is None
  assert watch.wrong_labels(row_of([*range(5, 11)]), P, captions=True) is None


def test_a_missing_mask_ends_a_run_before_its_first_step(tmp_path, monkeypatch):
  """As if the template's spans were lost: LLaVA's code would train on questions, or on nothing, without a word."""
  real = batches.render_turns
  monkeypatch.setattr(batches, 'render_turns', lambda *args, **more: (text := real(*args, **more)[0], [(0, len(text))]))
  with pytest.raises(DataError, match=r'step 1, sample digits/train/\d+: every token is supervised.*the mask .* is missing'):
    loop.train(CONFIG, tmp_path)
  assert not read_metrics(tmp_path)


def test_a_spike_is_far_above_the_median_of_a_full_window():
  cfg = dataclasses.replace(CONFIG, spike=3.0)
  state, rng = new_watch(cfg), np.random.default_rng(0)
  assert new_watch(CONFIG) is None
  for i in range(WINDOW):
    state, bad = judge(state, jnp.float32(100.0 if i == 7 else 1 + rng.random()), jnp.float32(1.0), cfg)
    assert not bad, 'until the window is full nothing is known'
  for loss, norm, expected in ((2.0, 1.0, False), (9.0, 1.0, True), (1.0, 3.5, True), (np.nan, 1.0, True), (2.0, 1.0, False)):
    before = state['recent']
    state, bad = judge(state, jnp.float32(loss), jnp.float32(norm), cfg)
    assert bool(bad) == expected and (np.array_equal(before, state['recent']) == expected), (loss, norm)
  assert state['skipped'] == 3


HOT = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(learning_rate=1e30, clip_norm=1e30), steps=3, log_every=3, save_every=3)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_batch(tmp_path, monkeypatch, capsys):
  with pytest.raises(FloatingPointError) as error:
    loop.train(HOT, tmp_path)
  message = str(error.value)
  assert '\n' not in message
  found = re.fullmatch(
    r'step (\d): the loss is (\S+), the gradient norm (\S+) \((.*)\); samples (.*); `python -m dynllava_jax.data.inspect '
    r'--batch=(.*)` shows the batch; the last saved step is intact. Lower the learning rate, .*--config.on_bad_step=skip',
    message,
  )
  assert found, message
  step, norms, ids, file = int(found[1]), found[4], found[5].split(', '), tmp_path / 'bad_steps' / f'{found[1]}.npz'
  assert {n.split()[0] for n in norms.split(', ')} == {'llama', 'projector', 'vision'} and str(file) == found[6]
  _, about, _ = load_batch(file)
  assert about['ids'] == ids and about['step'] == step and len(ids) == HOT.batch_size
  assert checkpoint.all_steps(tmp_path / 'checkpoints') == []
  sample, row, tokenizer, num_image = inspect.look_saved(file, 3)
  head, text, _ = inspect.describe(sample, row, tokenizer, num_image)
  assert head.plain.startswith(f'sample {ids[3]}: ') and '<image: positions' in text.plain


@pytest.mark.slow
def test_a_skipped_step_leaves_weights_and_moments_as_they_are(tiny_params):
  cfg = dataclasses.replace(STEP, on_bad_step='skip', spike=2.0, optimizer=OptimizerConfig(warmup_share=0.0))
  mesh, optimizer = sharding.make_mesh(cfg.mesh), make_optimizer(cfg.optimizer, cfg.steps)
  with sharding.on_mesh(mesh):
    step = make_train_step(cfg, optimizer, mesh)
    rows = jax.device_put(batch(), sharding.batch_sharding(mesh))
    for usual, skipped in ((1e6, 0), (1e-6, 1)):
      state, frozen = begin(cfg, optimizer, tiny_params, mesh)
      recent = jnp.full((2, WINDOW), usual)
      state = dataclasses.replace(state, step=state.step + 1, watch=jax.device_put({'recent': recent, 'skipped': jnp.int32(0)}))
      before = jax.device_get(state)
      after, metrics = jax.device_get(step(state, frozen, rows))
      same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before.opt_state), jax.tree.leaves(after.opt_state))]
      same += [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params))]
      assert all(same) == bool(skipped) and after.step == 2
      assert metrics['bad_step'] == metrics['skipped_steps'] == after.watch['skipped'] == skipped


@pytest.mark.slow
def test_bad_steps_are_skipped_counted_and_told_until_there_are_too_many(tmp_path, capsys, monkeypatch):
  """Step 1 has learning rate 0, step 2 moves the weights off, so nothing after it is a number."""
  cfg = dataclasses.replace(HOT, on_bad_step='skip')
  monkeypatch.setattr(watch, 'MOST_SKIPPED', 2)
  with pytest.raises(FloatingPointError, match='2 steps in a row up to .* were bad and skipped.*It is not the batches'):
    loop.train(dataclasses.replace(cfg, steps=9, log_every=9, save_every=9), tmp_path)
  told = capsys.readouterr().out
  assert told.count('; skipped') >= 2 and (tmp_path / 'bad_steps').is_dir()


def test_files_that_are_no_batch_are_one_line(tmp_path):
  (tmp_path / 'x.npz').write_bytes(b'PK not really')
  np.savez(tmp_path / 'y.npz', a=np.zeros(2))
  for name in ('x.npz', 'y.npz', 'none.npz'):
    with pytest.raises(ConfigError, match=f'{name}: cannot be read as a batch that training left .*WORKDIR/bad_steps'):
      load_batch(tmp_path / name)
  save_batch(tmp_path / 'z.npz', row_of(ANSWER), ['a'], {}, P)
  with pytest.raises(ConfigError, match='--index: 1, the batch has rows 0 to 0'):
    inspect.look_saved(tmp_path / 'z.npz', 1)
