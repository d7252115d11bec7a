"""The stream of batches is a function of (data, seed, step)."""

import contextlib
import itertools
import time

import numpy as np
import pytest

from dynllava_jax.config import ConfigError, DataConfig, VisionConfig
from dynllava_jax.data import digits
from dynllava_jax.data.order import Order, Part
from dynllava_jax.data.pipeline import LayOut, training_batches
from dynllava_jax.data.sources import TrainingData
from dynllava_jax.data.tokenizer import MODEL_FILE

TOKENIZER = {MODEL_FILE: digits.tokenizer_model()}
VISION = VisionConfig(image_size=98, hidden_size=32, num_heads=4)
BATCH = 12


def take(count, *, step=0, shuffle=True, size=1_000_000, workers=0, seed=0, batch=4, **where):
  layout = LayOut(DataConfig(text_length=104, shuffle=shuffle, workers=workers), VISION, TOKENIZER, VISION.num_patches)
  source = digits.TrainingScenes('train', 0, size=size)
  training = TrainingData(source, Order(source.parts, batch, seed, (104,), shuffle=shuffle), {})
  with contextlib.closing(training_batches(training, layout, batch_size=batch, step=step, **where)) as stream:
    return list(itertools.islice(stream, count))


def same(a, b):
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_array_equal(a.pixels, b.pixels)
  np.testing.assert_array_equal(a.seed, b.seed)


@pytest.mark.parametrize('shuffle', [True, False])
def test_resuming_gives_the_same_batches(shuffle):
  for a, b in zip(take(5, shuffle=shuffle)[3:], take(2, step=3, shuffle=shuffle), strict=True):
    same(a, b)


@pytest.mark.parametrize('workers', [1, 2])
def test_worker_processes_change_nothing(workers):
  for a, b in zip(take(3), take(3, workers=workers), strict=True):
    same(a, b)


@pytest.mark.parametrize('hosts', [2, 3, 4])
def test_hosts_share_the_same_global_batches(hosts):
  """Across the end of an epoch of two batches."""
  whole = take(3, step=1, size=2 * BATCH + 5, batch=BATCH)
  shares = [take(3, step=1, size=2 * BATCH + 5, batch=BATCH, hosts=hosts, host=h) for h in range(hosts)]
  for step, batch in enumerate(whole):
    for host in range(hosts):
      np.testing.assert_array_equal(np.split(batch.tokens, hosts)[host], shares[host][step].tokens)
      np.testing.assert_array_equal(np.split(batch.pixels, hosts)[host], shares[host][step].pixels)


def test_hosts_that_do_not_divide_the_batch_are_refused():
  with pytest.raises(ConfigError, match='config.batch_size: 4 is not a multiple of 3 hosts'):
    take(1, hosts=3, host=0)


def test_any_step_is_reached_within_a_second():
  start = time.monotonic()
  far = take(1, step=10_000_000, size=10_000)
  assert time.monotonic() - start < 1
  same(far[0], take(1, step=10_000_000, size=10_000)[0])


def test_epochs_are_permutations_without_repeats():
  first = {p.tobytes() for batch in take(3, size=12) for p in batch.pixels}
  second = {p.tobytes() for batch in take(3, step=3, size=12) for p in batch.pixels}
  assert len(first) == 12 and first == second
  assert [p.tobytes() for b in take(3, size=12) for p in b.pixels] != [
    p.tobytes() for b in take(3, step=3, size=12) for p in b.pixels
  ]


def test_unshuffled_streams_follow_the_source():
  rows = np.concatenate([b.seed for b in take(3, shuffle=False, size=8)])
  np.testing.assert_array_equal(rows, np.arange(12))
  order = Order((Part(0, 8),), 4, 0, (104,), shuffle=False)
  assert [order(p)[0] for p in range(10)] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]


def test_every_row_fits_the_bucket_of_the_demo():
  layout = LayOut(DataConfig(text_length=104), VISION, TOKENIZER, VISION.num_patches)
  for index in (*range(60), *range(2400, 2500)):
    assert layout(digits.TrainingScenes('train', 0)[index], index, 104).length > 0
