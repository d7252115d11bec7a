"""Epochs, weights, buckets and grouping: which sample stands where."""

import pickle

import numpy as np
import pytest

from dynllava_jax.config import ConfigError
from dynllava_jax.data.order import Order, Part

NEED = np.random.default_rng(0).integers(1, 400, 1000)


def epoch(order, number=0):
  return [order(p)[0] for p in range(number * order.whole, (number + 1) * order.whole)]


def test_left_over_rows_differ_from_epoch_to_epoch():
  order = Order((Part(0, 10),), 4, 0, (8,))
  left = [set(range(10)) - set(epoch(order, e)) for e in range(8)]
  assert all(len(x) == 2 for x in left) and len(set.union(*left)) > 4


def test_weights_say_how_often_a_source_is_drawn():
  order = Order((Part(0, 100, 1.0), Part(100, 200, 2.5), Part(200, 300, 0.1)), 10, 0, (8,))
  drawn = np.bincount(epoch(order), minlength=300)
  assert order.whole == 360
  assert (drawn[:100] == 1).all() and set(drawn[100:200]) == {2, 3} and drawn[100:200].sum() == 250
  assert drawn[200:].sum() == 10 and drawn[200:].max() == 1
  later = np.bincount(epoch(order, 1), minlength=300)
  assert (later[200:] != drawn[200:]).any()


def test_samples_left_out_are_never_drawn_and_none_is_repeated():
  usable = np.arange(20) % 3 != 0
  order = Order((Part(0, 20),), 13, 0, (8,), usable=usable)
  assert sorted(epoch(order)) == np.flatnonzero(usable).tolist()


@pytest.mark.parametrize('group', [False, True])
def test_every_row_of_a_batch_fits_its_bucket_and_none_smaller_would_do(group):
  order = Order((Part(0, 1000),), 10, 0, (100, 200, 400), need=NEED, group=group)
  for step in range(100):
    (bucket,) = {order(step * 10 + r)[1] for r in range(10)}
    longest = NEED[order.batch(step)].max()
    assert longest <= bucket and bucket == min(b for b in (100, 200, 400) if b >= longest)
  assert sorted(epoch(order)) == list(range(1000))


def test_grouping_saves_padding():
  plans = {g: Order((Part(0, 1000),), 10, 0, (100, 200, 400), need=NEED, group=g).bucket_plan() for g in (False, True)}
  padded = {g: sum(u.batches * u.text_length for u in plan) for g, plan in plans.items()}
  assert padded[True] < 0.8 * padded[False]
  assert sum(u.batches for u in plans[True]) == 100
  used = {u.text_length: u for u in plans[True]}
  real = sum((1 - u.padding) * u.batches * 10 * u.text_length for u in plans[True])
  assert real == pytest.approx(NEED.sum()) and used[100].padding < 1


def test_grouped_batches_are_not_sorted_over_the_epoch():
  order = Order((Part(0, 1000),), 10, 0, (400,), need=NEED, group=True)
  means = [NEED[order.batch(s)].mean() for s in range(100)]
  assert means != sorted(means) and abs(np.corrcoef(means, range(100))[0, 1]) < 0.3


def test_order_survives_pickling_and_depends_on_the_seed():
  order = Order((Part(0, 50),), 5, 3, (8,))
  assert epoch(pickle.loads(pickle.dumps(order)), 2) == epoch(order, 2)
  assert epoch(Order((Part(0, 50),), 5, 4, (8,))) != epoch(order)


def test_too_few_samples_are_refused():
  with pytest.raises(ConfigError, match='3 samples, fewer than one batch of 4'):
    Order((Part(0, 3),), 4, 0, (8,))


def test_buckets_need_lengths():
  with pytest.raises(ConfigError, match='does not know its lengths'):
    Order((Part(0, 30),), 4, 0, (8, 16))
