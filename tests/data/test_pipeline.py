"""The stream of batches is a function of (source, seed, step)."""

import itertools

import numpy as np
import pytest

from dynllava_jax.config import DataConfig, VisionConfig
from dynllava_jax.data import digits
from dynllava_jax.data.pipeline import LayOut, training_batches
from dynllava_jax.data.tokenizer import MODEL_FILE

TOKENIZER = {MODEL_FILE: digits.tokenizer_model()}
VISION = VisionConfig(image_size=98, hidden_size=32, num_heads=4)


def take(count, *, step=0, shuffle=True, size=1_000_000, workers=0, seed=0):
  layout = LayOut(DataConfig(text_length=104, shuffle=shuffle, workers=workers), VISION, TOKENIZER)
  stream = training_batches(digits.TrainingScenes('train', 0, size=size), layout, batch_size=4, seed=seed, step=step)
  return list(itertools.islice(stream, count))


@pytest.mark.parametrize('shuffle', [True, False])
def test_resuming_gives_the_same_batches(shuffle):
  whole, resumed = take(5, shuffle=shuffle), take(2, step=3, shuffle=shuffle)
  for a, b in zip(whole[3:], resumed):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.pixels, b.pixels)
    np.testing.assert_array_equal(a.seed, b.seed)


def test_worker_processes_change_nothing():
  for a, b in zip(take(2), take(2, workers=1)):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.pixels, b.pixels)


def test_epochs_are_permutations_without_repeats():
  rows = [b.pixels.tobytes() for batch in take(6, size=12) for b in [batch]]
  first = {p.tobytes() for batch in take(3, size=12) for p in batch.pixels}
  second = {p.tobytes() for batch in take(3, step=3, size=12) for p in batch.pixels}
  assert len(first) == 12 and first == second
  assert rows[:3] != rows[3:]


def test_every_row_fits_the_bucket_of_the_demo():
  for index in (*range(60), *range(2400, 2500)):
    sample = digits.TrainingScenes('train', 0)[index]
    assert LayOut(DataConfig(text_length=104), VISION, TOKENIZER).map_with_index(index, sample).length > 0
