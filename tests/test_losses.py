"""The objective on hand-made numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynllava_jax.config import IGNORE, Objective, SparsityConfig
from dynllava_jax.losses import count, training_losses
from dynllava_jax.methods.training import Drawn
from dynllava_jax.models import trained_cuts, trained_masks
from dynllava_jax.models.batch import TrainInputs
from dynllava_jax.models.cross_entropy import cross_entropy
from dynllava_jax.models.dynllava import Prompt, TrainOutput

CFG = Objective(sparsity=SparsityConfig(image_keep_rate=0.25, text_keep_rate=0.5, min_answer_len=3))
MASKS, PLAIN = (trained_masks.TRAINING,), (trained_cuts.DENSE,)


def test_cross_entropy_is_the_mean_over_supervised_tokens_of_the_whole_batch():
  logits = jnp.zeros((2, 4, 8)).at[0, 0, 5].set(2.0)
  labels = jnp.array([[IGNORE, 5, IGNORE, IGNORE], [IGNORE, 1, 2, IGNORE]])
  first = np.log(7 + np.exp(2.0)) - 2.0
  assert float(cross_entropy(logits, labels)) == pytest.approx((first + 2 * np.log(8)) / 3, rel=1e-6)


def losses(image_start, image_mask, text_mask, length, answer_start, dense=(False, False)):
  batch, size = text_mask.shape
  prompt = Prompt(jnp.zeros((batch, size), jnp.int32), jnp.array(length), jnp.array(image_start), jnp.zeros(batch, jnp.uint32))
  out = TrainOutput(jnp.zeros((batch, size, 4)), None, None, image_mask, text_mask, jnp.array(dense))
  drawn = {'masks': Drawn(dense=jnp.array(dense))}
  return training_losses(out, prompt, TrainInputs(jnp.array(answer_start), jnp.ones((batch, size), jnp.int32), drawn), CFG, MASKS)


def test_short_answers_count_in_the_mean_and_contribute_nothing():
  text_mask = jnp.array([[0, 0, 1, 1, 1, 1.0], [0, 0, 0, 0, 0, 0.0]])
  result = losses([0, 0], jnp.ones((2, 4)), text_mask, [6, 6], [2, 5])
  assert float(result.shown['text_mask']) == pytest.approx((0.5 - 1.0) ** 2 / 2)
  assert float(result.shown['text_keep']) == 1.0


def test_rows_without_image_do_not_enter_the_image_term():
  mask = jnp.array([[1, 0, 0, 0.0], [1, 1, 1, 1]])
  result = losses([0, -1], mask, jnp.ones((2, 6)), [6, 6], [2, 2])
  assert float(result.shown['image_mask']) == 0 and float(result.shown['image_keep']) == 0.25
  assert float(losses([0, 0], mask, jnp.ones((2, 6)), [6, 6], [2, 2]).shown['image_mask']) == pytest.approx(0.75**2 / 2)


def test_total_weighs_the_mask_terms():
  result = losses([0, 0], jnp.ones((2, 4)), jnp.ones((2, 6)), [6, 6], [2, 2])
  assert float(result.total) == pytest.approx(float(result.ce) + 100 * (0.75**2 + 0.5**2), rel=1e-6)


def test_rows_run_dense_enter_no_mask_term():
  mask = jnp.array([[1, 0, 0, 0.0], [1, 1, 1, 1]])
  text_mask = jnp.array([[0, 0, 1, 1, 1, 1.0], [0, 0, 0, 0, 0, 0.0]])
  result = losses([0, 0], mask, text_mask, [6, 6], [2, 2], dense=(False, True))
  assert float(result.shown['image_mask']) == 0 and float(result.shown['image_keep']) == 0.25
  assert float(result.shown['text_mask']) == pytest.approx(0.5**2) and float(result.shown['text_keep']) == 1.0


def test_keep_rates_of_nothing_are_not_numbers():
  """No image and no answer long enough: 0 would look as if everything had been dropped."""
  result = losses([-1, -1], jnp.ones((2, 4)), jnp.ones((2, 6)), [6, 6], [5, 5])
  assert np.isnan(result.shown['image_keep']) and np.isnan(result.shown['text_keep'])
  assert float(result.total) == float(result.ce)


@pytest.mark.parametrize('sparse', [True, False])
def test_losses_of_the_parts_of_a_batch_add_up_to_those_of_the_batch(sparse):
  """Of four rows, with answers of 6, 1, 3 and 5 tokens: one without image, one run dense."""
  prompt = Prompt(jnp.zeros((4, 8), jnp.int32), jnp.full(4, 8), jnp.array([0, -1, 0, 0]), jnp.zeros(4, jnp.uint32))
  starts = jnp.array([2, 7, 5, 3])
  labels = jnp.where(jnp.arange(8) >= starts[:, None], 1, IGNORE)
  masks = ((jnp.arange(32).reshape(4, 8) * 7) % 3 > 0).astype(jnp.float32)
  logits = jnp.sin(jnp.arange(128.0)).reshape(4, 8, 4)
  dense = jnp.array([False, False, True, False]) if sparse else None
  out = TrainOutput(logits, None, None, masks[:, :4], masks, dense) if sparse else TrainOutput(logits)
  inputs, parts = TrainInputs(starts, labels, {'masks': Drawn(dense=dense)}), MASKS if sparse else PLAIN
  whole = training_losses(out, prompt, inputs, CFG, parts)
  counts = count(prompt, inputs, CFG, parts, pieces=2)
  halves = [jax.tree.map(lambda x: x[rows], (out, prompt, inputs)) for rows in (slice(2), slice(2, 4))]
  added = jax.tree.map(jnp.add, *(training_losses(*half, CFG, parts, counts) for half in halves))
  for a, b in zip(jax.tree.leaves(added), jax.tree.leaves(whole)):
    assert float(a) == pytest.approx(float(b), rel=1e-6)
  assert not sparse or float(whole.shown['text_mask']) > 0 < float(whole.shown['image_mask'])
