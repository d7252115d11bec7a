"""Training that cuts the sequence: PyramidDrop's step as its authors' code computed it, builds that differ, what can be trained."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from dynllava_jax import losses, methods
from dynllava_jax.config import IGNORE, ConfigError, Piece, Stage
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records import cut_training, selectors
from dynllava_jax.convert.records.bases import open_record
from dynllava_jax.methods import pyramiddrop

RECORD, CONFIG = GOLDEN / 'methods' / 'pyramiddrop', 'public_b/train'
CUT = (Stage(), Stage(start=2, selector='pyramiddrop', image_keep_rate=0.5))


def verified():
  """Every quantity of the recorded step, in a batch, and whether it agrees."""
  found = selectors.verify(open_record(RECORD, GOLDEN), alone=False, only=[CONFIG])
  return {q.name.removeprefix('in a batch: '): q.ok for q in found}


def test_the_recorded_step_in_a_batch():
  found = verified()
  assert [name for name, ok in found.items() if not ok] == []
  recorded = {k for k in open_record(RECORD, GOLDEN).case if k.startswith(CONFIG)}
  assert {k for k in recorded if not k.endswith(('input_ids', '/labels'))} == {name.partition('[')[0] for name in found}


def all_answers(labels, options):
  """Every row of an answer, not those in front of one."""
  inside = labels != IGNORE
  return inside / inside.sum(-1, keepdims=True)


def last_answer(labels, options):
  """The row in front of the last answer alone, as in a prefill."""
  answered = labels != IGNORE
  ahead = ~answered[:, :-1] & answered[:, 1:]
  last = labels.shape[1] - 2 - jnp.argmax(ahead[:, ::-1], 1)
  return (jnp.arange(labels.shape[1]) == last[:, None]).astype(jnp.float32)


WRONG = {
  'ranked by the last answer alone': (dict(training_weight=last_answer), 'kept_image_index_1'),
  'ranked by answers': (dict(training_weight=all_answers), 'kept_image_index_1'),
  'positions kept': (dict(renumbers=lambda options: False), 'logits_tail[0]'),
  'labels cut off': (None, 'reduced_labels[0]'),
}


@pytest.mark.slow
@pytest.mark.parametrize('wrong', WRONG)
def test_a_wrong_build_fails(monkeypatch, wrong):
  fields, array = WRONG[wrong]
  if fields:
    monkeypatch.setitem(methods.SELECTORS, 'pyramiddrop', dataclasses.replace(pyramiddrop.SELECTOR, **fields))
  else:
    for place in (losses, cut_training):
      monkeypatch.setattr(place, 'remaining', lambda labels, places: labels[:, : places.shape[1]])
  monkeypatch.setattr(cut_training, 'compare_gradients', lambda *_: [])
  try:
    assert not verified()[f'{CONFIG}/{array}']
  except ConversionError as e:
    assert 'has shape' in str(e)


def test_rows_in_front_of_answers_count_alike():
  labels = jnp.array([[IGNORE, IGNORE, 5, 6, IGNORE, 7], [3, 3, IGNORE, IGNORE, 4, 4], [IGNORE] * 6])
  expected = [[0, 0.5, 0, 0, 0.5, 0], [0, 0, 0, 1, 0, 0], [0] * 6]
  np.testing.assert_array_equal(pyramiddrop.training_weight(labels, pyramiddrop.Options()), expected)


def test_labels_go_with_their_rows():
  labels = jnp.array([[IGNORE, 4, 5, 6]])
  np.testing.assert_array_equal(losses.remaining(labels, jnp.array([[0, 2, 3, -1]])), [[IGNORE, 5, 6, IGNORE]])
  assert losses.remaining(labels, None) is labels


@pytest.mark.parametrize(
  ('stages', 'adapters', 'message'),
  [
    (
      (Stage(), Stage(start=2, selector='random', image_keep_rate=0.5)),
      False,
      'with dpn, pyramiddrop alone',
    ),
    ((Stage(), Stage(start=1, selector='dynamic'), Stage(start=2, selector='dynamic')), False, 'can be trained'),
    ((Stage(), Stage(start=1, selector='dynamic'), Stage(start=2, selector='pyramiddrop')), False, 'can be trained'),
    ((Stage(compressor=Piece('tova', {'slots': 8})),), False, 'tova acts in generation only'),
    (CUT, True, 'lora: pyramiddrop ranks by weights that adapters change'),
  ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(stages, adapters, message):
  with pytest.raises(ConfigError, match=message) as caught:
    methods.check_training(stages, adapters)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('stages', 'how'),
  [((Stage(),), ''), ((Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.2)), 'masks'), (CUT, 'gathers')],
)
def test_what_can_be_trained_and_how(stages, how):
  methods.check_training(stages, adapters=how != 'gathers')
  assert methods.trained_by(stages) == how


def test_text_may_fill_what_the_last_cut_leaves():
  assert methods.text_room(CUT, 16, 4) == 8
  for stages in ((Stage(),), (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.2))):
    assert methods.text_room(stages, 16, 4) == 16
