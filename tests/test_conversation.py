"""What stays of a conversation: whole sentences within a budget, and where each token then lies and stands."""

import numpy as np
import pytest

from dynllava_jax.conversation import (
  FIXED,
  FRAME,
  GAPS,
  IMPORTANCE,
  REROTATE,
  History,
  Memory,
  Token,
  choose,
  recency,
  sentences,
)


def exchange(turn, asked, answered, position):
  """`U: asked A: answered`, a token a word, of which `U:` and `A:` are frames."""
  tokens = [Token(0, turn, FRAME, False, position)]
  for text, answer in ((asked, False), (answered, True)):
    words = text.split()
    tokens += [
      Token(ord(w[0]), turn, n, answer, position + len(tokens) + i) for i, (w, n) in enumerate(zip(words, sentences(words)))
    ]
    tokens += [] if answer else [Token(1, turn, FRAME, False, position + len(tokens))]
  return tokens


@pytest.fixture
def memory():
  """Two image tokens, then three exchanges of 6, 9 and 6 tokens; the second stage holds one image token and no answers."""
  memory = Memory(2)
  memory.add([Token(-1, FIXED, FRAME, False, i) for i in range(2)], [[True, True], [True, False]])
  for turn, (asked, answered) in enumerate((('a b. c', 'd'), ('e f. g h.', 'i j. k'), ('l m n', 'o'))):
    new = exchange(turn, asked, answered, len(memory.tokens))
    memory.add(new, [[True] * len(new), [not t.answer for t in new]])
  return memory


def test_sentences_end_where_they_end():
  assert sentences(['It', ' is', ' 7', '.', ' And', ' 3', '!', ' so']) == [0, 0, 0, 0, 1, 1, 1, 2]


def test_the_most_important_exchanges_stay_whole(memory):
  said = lambda stays: ''.join(chr(memory.tokens[i].id) for i in sorted(stays) if memory.tokens[i].id > 1)
  assert memory.held == 21 and said(choose(memory, 100, recency)) == 'abcdefghijklmno'
  assert said(choose(memory, 6, recency)) == 'lmno'  # dropping the oldest
  middle = lambda tokens: np.asarray([float(t.turn == 1) for t in tokens])
  assert said(choose(memory, 6, middle)) == 'efij'
  assert said(choose(memory, 9, middle)) == 'efghijk'
  assert choose(memory, 3, recency) == set()  # no question without its answer


def test_rare_and_unforeseen_tokens_matter():
  tokens = [Token(i, 0, 0, False, n, s) for n, (i, s) in enumerate(((5, 1.0), (5, float('nan')), (6, 3.0)))]
  frequency, surprisal = IMPORTANCE['frequency'](tokens), IMPORTANCE['surprisal'](tokens)
  assert frequency[0] == frequency[1] < frequency[2] and surprisal.tolist() == [1.0, 2.0, 3.0]
  assert IMPORTANCE['surprisal'](tokens[1:2]).tolist() == [0.0]


@pytest.mark.parametrize('positions', [REROTATE, GAPS])
def test_slots_and_positions_after_compaction(memory, positions):
  stays = {i for i, t in enumerate(memory.tokens) if t.turn == 2}
  where, moved, following = memory.compact(stays, positions)
  assert where == [[0, 1, *range(17, 23)], [0, *range(12, 17)]]
  shift = -15 if positions == REROTATE else 0
  assert moved == [[0, 0, *[shift] * 6], [0, *[shift] * 5]]
  assert following == (8 if positions == REROTATE else 23)
  assert memory.held == 6 and memory.slots == [list(range(8)), [0, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize(
  'wrong, message',
  [
    (dict(mode='forget'), "mode: 'forget'"),
    (dict(budget=0), 'budget: 0'),
    (dict(importance='x'), 'importance'),
    (dict(prompt=' '), 'prompt'),
  ],
)
def test_what_cannot_be_asked_for(wrong, message):
  with pytest.raises(ValueError, match=message):
    History(**wrong)
