"""Conversations longer than their room: none fails, what was left out is told, and what stays is in the cache as if alone."""

import numpy as np
import pytest

import dynllava_jax as dl
from dynllava_jax.conversation import EXTRACT, GAPS, REROTATE, SUMMARISE, History
from dynllava_jax.data.samples import DataError

pytest_plugins = ('tiny_suite',)

IMAGE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
SAID = [
  'What is it? Is it red.',
  'How many?',
  'And what is left of the dog. Is it a cat? So.',
  'Why?',
  'What else?',
  'Go on.',
]
SIZES = dict(max_new_tokens=16, later_tokens=72)


@pytest.fixture(scope='module')
def model(tiny_checkpoint):
  return dl.load(tiny_checkpoint, max_new_tokens=6, batch_size=2, text_lengths=(64,))


def held(chat):
  """By stage, (tokens that memory says are in the cache, tokens that are)."""
  stages = chat._running.turn.cache.stages
  return [(len(slots), int(stage.length[0])) for slots, stage in zip(chat._memory.memory.slots, stages)]


@pytest.mark.slow
@pytest.mark.parametrize('mode', [EXTRACT, SUMMARISE])
def test_a_conversation_never_fails_for_want_of_room(model, mode):
  for positions in (REROTATE, GAPS):
    chat = model.chat(IMAGE, history=mode, budget=40, positions=positions, prompt='Sum up.', **SIZES)
    tops = []
    for text in SAID * 3:
      chat.send(text, max_tokens=4)
      assert all(known == there for known, there in held(chat))
      assert chat._memory.memory.held <= 40 + 60
      tops.append(int(chat._running.turn.cache.position[0]))
    assert len(chat.compactions) > 3 and all(c.how == mode and c.left_out for c in chat.compactions)
    assert all(c.after <= 40 for c in chat.compactions)
    assert (max(tops) < 140) == (positions == REROTATE), tops  # the conversation itself is longer than that
    assert len(chat.turns) == 2 * len(SAID) * 3
  with pytest.raises(DataError, match='this turn has .* tokens, and a conversation without its earlier turns has room for 1..;'):
    chat.send('word ' * 200)


@pytest.mark.slow
def test_run_again_is_as_if_nothing_else_had_been_said(model):
  """Of two turns the first leaves; the third is answered as it is where the second was the first."""
  said, options = ['Why? ', 'How many?', 'What else?'], dict(max_tokens=4)
  chat = model.chat(IMAGE, history=History(mode=EXTRACT, budget=20, importance='recency', recompute=True), **SIZES)
  for text in said[:2]:
    chat.send(text, **options)
  chat._make_room(said[2], dl.Options(**options))
  assert [c.left_out[0] for c in chat.compactions] == ['Why?']
  ids = [t.id for t in chat._memory.memory.tokens if t.turn >= 0]
  assert chat._memory.memory.tokens[-1].position == len(chat._memory.memory.tokens) - 1
  assert held(chat)[0][0] == held(chat)[0][1] == len(ids) + sum(t.turn < 0 for t in chat._memory.memory.tokens)
  first = chat.send(said[2], **options)
  assert len(first.tokens) == 4


@pytest.mark.slow
def test_without_a_need_nothing_changes(model):
  plain = model.chat(IMAGE, max_new_tokens=16, later_tokens=72)
  careful = model.chat(IMAGE, history=EXTRACT, budget=200, **SIZES)
  for text in SAID[:2]:
    assert plain.send(text, max_tokens=4).tokens == careful.send(text, max_tokens=4).tokens
  assert careful.compactions == ()
