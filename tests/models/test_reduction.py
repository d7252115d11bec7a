"""How a selector's choice makes the next sequence, drawn out on small rows: merged vectors, new rows, numbers of positions."""

import jax.numpy as jnp
import numpy as np

from dynllava_jax.methods import Chosen
from dynllava_jax.models import reduction

START = jnp.array([2, -1])


def sequence():
  """Text 0 1, image 2 3 4 5, text 6 7 8 | text only, 5 tokens long."""
  x = jnp.broadcast_to(jnp.arange(9.0)[None, :, None], (2, 9, 1))
  return reduction.start(x, jnp.array([9, 5]), 4)


def reduce(state, chosen, size):
  keep = reduction.kept_rows(state, chosen.index, START, 4)
  return reduction.compact(*reduction.choose(state, chosen, keep, START), size)


def real(state, row, what):
  return np.asarray(getattr(state, what)[row, : int(state.length[row])]).squeeze().tolist()


def test_vectors_take_the_place_of_kept_rows():
  both = jnp.array([[1, 3], [1, 3]])
  state = reduce(sequence(), Chosen(index=both, vectors=jnp.full((2, 2, 1), 50.0) + jnp.arange(2.0)[:, None]), 7)
  assert real(state, 0, 'x') == [0, 1, 50, 51, 6, 7, 8]
  assert real(state, 0, 'positions') == real(state, 0, 'rotary') == [0, 1, 3, 5, 6, 7, 8]
  assert real(state, 1, 'x') == [0, 1, 2, 3, 4]


def test_new_rows_follow_the_image_and_are_image_tokens_of_later_stages():
  chosen = Chosen(index=jnp.array([[1, 3], [1, 3]]), more=jnp.full((2, 1, 1), 70.0), more_index=jnp.array([[2], [2]]))
  state = reduce(sequence(), chosen, 8)
  assert real(state, 0, 'x') == [0, 1, 3, 5, 70, 6, 7, 8]
  assert real(state, 0, 'positions') == [0, 1, 3, 5, 4, 6, 7, 8]  # the new one stands for image token 2, at place 4
  assert state.image_index[0].tolist() == [1, 3, 2]
  assert real(state, 1, 'x') == [0, 1, 2, 3, 4]
  again = reduce(state, Chosen(index=jnp.array([[0, 2], [0, 2]])), 7)
  assert real(again, 0, 'x') == [0, 1, 3, 70, 6, 7, 8] and again.image_index[0].tolist() == [1, 2]


def test_renumbering_counts_what_is_left_and_goes_on_behind_it():
  """The last two of nine tokens were generated; the gate has dropped the first of them."""
  prompt = jnp.array([7, 3])
  state = sequence()
  keep = reduction.kept_rows(state, jnp.array([[1, 3], [1, 3]]), START, 4) & (state.positions != 7)
  state = reduction.compact(*reduction.choose(state, Chosen(index=jnp.array([[1, 3], [1, 3]])), keep, START), 8)
  state = reduction.renumbered(state, prompt)
  assert real(state, 0, 'positions') == [0, 1, 3, 5, 6, 8]
  assert real(state, 0, 'rotary') == [0, 1, 2, 3, 4, 6]
  assert state.shift.tolist() == [2, 0]
  assert real(state, 1, 'rotary') == [0, 1, 2, 3, 4]


def test_ranking_rows_are_those_of_the_prompt():
  state = sequence()
  last = reduction.ranking_queries(state, START, jnp.array([7, 3]), None)
  assert last.place.tolist() == [[6], [2]] and last.weight.tolist() == [[1.0], [1.0]]
  weights = jnp.broadcast_to(jnp.arange(9.0), (2, 9))
  some = reduction.ranking_queries(state, START, jnp.array([8, 3]), weights)
  assert some.place.tolist() == [[0, 1, 6, 7, 8], [0, 1, 2, 3, 4]]
  assert some.weight.tolist() == [[0, 1, 6, 7, 0], [0, 1, 2, 0, 0]]
