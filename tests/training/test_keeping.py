"""Which steps of a run are saved, and which of them stay."""

import dataclasses

import jax.numpy as jnp
import pytest
from test_run_files import CONFIG

from dynllava_jax import checkpoint
from dynllava_jax.config import ConfigError, TrainEval
from dynllava_jax.training import recovery, saving
from dynllava_jax.training.keeping import Keeping
from dynllava_jax.training.saving import Saver, SaveTimes

EVALS = {'digits': TrainEval(every=2), 'held_out': TrainEval(every=2, benchmark='perplexity', data='somewhere')}
SCORES = [{'step': s, 'eval/digits/score': v, 'eval/held_out/score': v} for s, v in ((2, 5.0), (4, 9.0), (6, 7.0), (8, 9.0))]


def policy(**changes):
  return Keeping.of_run(dataclasses.replace(CONFIG, evals=EVALS, **changes), [{'step': 2, 'loss': 1.0}, *SCORES])


@pytest.mark.parametrize(
  'changes, kept',
  [
    (dict(keep=2), {7, 8}),
    (dict(keep=1, keep_every=3), {3, 6, 8}),
    (dict(keep=1, keep_best=1, keep_best_by='digits'), {8}),
    (dict(keep=1, keep_best=2, keep_best_by='digits'), {4, 8}),
    (dict(keep=1, keep_best=1, keep_best_by='held_out'), {2, 8}),
    (dict(keep=2, keep_every=5, keep_best=3, keep_best_by='held_out'), {2, 5, 6, 7, 8}),
  ],
  ids=str,
)
def test_newest_multiples_and_best_stay(changes, kept):
  """The smaller perplexity is the better one, and of equal scores the later step."""
  assert policy(**changes).kept(range(1, 9)) == kept


def test_a_policy_that_cannot_be_is_refused():
  with pytest.raises(ConfigError, match=r"keep_best_by is '', expected the name of one of evals \(digits, held_out\)"):
    policy(keep_best=1)
  with pytest.raises(ConfigError, match=r"keep_best_by is 'x'.*\(none\)"):
    dataclasses.replace(CONFIG, keep_best=1, keep_best_by='x')
  for name in ('keep_every', 'keep_best', 'save_minutes'):
    with pytest.raises(ConfigError, match=f'{name} is -1'):
      dataclasses.replace(CONFIG, **{name: -1})
  assert dataclasses.replace(CONFIG, keep_best=1, evals={'digits': EVALS['digits']}).best_by == 'digits'


def test_a_score_that_comes_later_counts_when_the_run_ends(tmp_path):
  keeping = Keeping(last=1, every=4, best=1, by='score')
  with Saver(tmp_path, keeping) as saver:
    for step, score in ((1, 3.0), (2, 4.0), (4, 1.0), (5, 2.0), (6, 9.0)):
      saver.save(step, {'params': {'a': jnp.full(3, score)}})
      keeping.note(step, {'score': score})
      if step == 5:
        assert {2, 4, 5} <= {*checkpoint.all_steps(tmp_path), 5}, 'the best so far is there while the next is written'
  assert checkpoint.all_steps(tmp_path) == [4, 6], 'the last one turned out best, so step 2 went'


def test_a_damaged_step_that_was_kept_for_good_is_set_aside_and_one_that_was_on_its_way_out_removed(tmp_path):
  with Saver(tmp_path, Keeping(last=9)) as saver:
    for step in (4, 5, 6):
      saver.save(step, {'params': {'a': jnp.zeros(3)}})
  for step in (4, 5):
    (tmp_path / str(step) / 'integrity.json').unlink()
  step, told = recovery.newest_whole_step(tmp_path, Keeping(last=1, every=4))
  assert step == 6 and 'half deleted' in told[0] and '4.damaged' in told[1]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['4.damaged', '6']


def test_minutes_begin_again_with_every_save(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(saving.time, 'monotonic', lambda: now[0])
  times = SaveTimes(dataclasses.replace(CONFIG, steps=100, save_every=10, save_minutes=2.0))
  due = []
  for step in range(1, 13):
    now[0] += 50
    if times.due(step, talking=True):
      due.append(step)
      times.saved()
  assert due == [3, 6, 9, 10]
