"""Counts of token ids in a corpus's answers, as data preparation writes them for the gate `frequency`."""

import io

import numpy as np

from dynllava_jax.data.frequencies import as_file, count_answers


class Letters:
  """Each letter is a token: a is 0, b is 1, and so on."""

  def encode(self, text):
    return [(ord(c) - ord('a'), i) for i, c in enumerate(text)]


def turns(*pairs):
  return [{'from': who, 'value': text} for pair in pairs for who, text in zip(('human', 'gpt'), pair)]


def test_answers_count_and_questions_do_not():
  counts = count_answers([turns(('zzz', 'abba'), ('z', 'c')), turns(('y', 'a'))], Letters())
  np.testing.assert_array_equal(counts, [3, 2, 1])


def test_a_corpus_without_answers_has_counts_too():
  np.testing.assert_array_equal(count_answers([], Letters()), [0])


def test_parts_of_other_lengths_add_up():
  parts = [count_answers([turns(('', text))], Letters()) for text in ('aab', 'dd', 'c')]
  total = np.load(io.BytesIO(as_file(parts)))
  np.testing.assert_array_equal(total, [2, 1, 1, 2])
  np.testing.assert_array_equal(total, count_answers([turns(('', 'aab'), ('', 'dd'), ('', 'c'))], Letters()))
