"""Conversations that need their history: what is asked for was told before, and the picture does not know it."""

import numpy as np
import pytest

from dynllava_jax.data import conversation
from dynllava_jax.data.batches import encode_turns
from dynllava_jax.data.digits import tokenizer_model
from dynllava_jax.data.talks import FACT, IMAGE, RECALL, SUMMARY, Talks, make_talk
from dynllava_jax.data.tokenizer import MODEL_FILE, load_tokenizer

TEXT_LENGTH = 320  # of configs/digits.py:conversation


@pytest.fixture(scope='module')
def talks():
  return [make_talk('train', np.random.default_rng(i), 2 + i % 9, 20)[1] for i in range(60)]


def test_facts_are_told_before_they_are_asked_for(talks):
  kinds = {t.kind for turns in talks for t in turns}
  assert kinds == {FACT, RECALL, IMAGE, SUMMARY} and all(turns[0].kind == FACT for turns in talks)
  for turns in talks:
    known = {}
    for number, turn in enumerate(turns):
      if turn.kind == FACT:
        cell, digit = turn.question.rstrip('.').split(' is ')
        assert cell not in known and turn.answer == digit
        known[cell] = digit
      elif turn.kind == RECALL:
        assert turn.told < number and known[turn.question.removeprefix('What is ').rstrip('?')] == turn.answer
      elif turn.kind == SUMMARY:
        assert dict(part.split() for part in turn.answer.split(', ')) == known
    assert len(turns) == 20 and len(known) == sum(t.kind == FACT for t in turns)


def test_facts_do_not_depend_on_the_scene(talks):
  """Told digits are as often each of ten, as no scene's are; recalled ones lie back by several turns."""
  digits = [int(t.answer) for turns in talks for t in turns if t.kind == FACT]
  assert len(set(digits)) == 10 and abs(np.mean(digits) - 4.5) < 0.5
  back = [number - t.told for turns in talks for number, t in enumerate(turns) if t.kind == RECALL]
  assert np.mean(back) > 5


def test_training_talks_fit_their_rows_and_are_a_function_of_their_number():
  source, tokenizer = Talks('train', 2), load_tokenizer({MODEL_FILE: tokenizer_model()})
  style = conversation.template('plain_turns')
  lengths = []
  for i in (*range(20), *range(5000, 5060)):
    turns = source[i].conversations
    lengths.append(len(encode_turns('talk', turns, True, style=style, tokenizer=tokenizer).ids))
    assert turns == source[i].conversations
  assert max(lengths) <= TEXT_LENGTH and max(lengths[:20]) < max(lengths[20:])
