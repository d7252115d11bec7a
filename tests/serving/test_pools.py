"""An engine on a ladder: idle is dense, bit by bit; a burst goes down and comes back; every reply is its rung's own."""

import types

import numpy as np
import pytest
from test_engine import CFG, EOS, NEW, TEXT, Letters, rows

from dynllava_jax.config import DENSE, ConfigError, Stage
from dynllava_jax.controller.ladder import Ladder, Need
from dynllava_jax.controller.rules import Rules
from dynllava_jax.controller.rungs import cut_alike, rungs
from dynllava_jax.generate import Generator
from dynllava_jax.models.params import cut_params
from dynllava_jax.serving.engine import Engine
from dynllava_jax.serving.pools import Pools
from dynllava_jax.serving.request import Request

LISTS = {'dense': DENSE, 'sparse': (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.25, text_keep_budget=0.4))}
SLOT = Need(TEXT, NEW)


def test_rungs_share_one_set_of_cut_weights():
  cut = cut_alike(LISTS)
  assert [s.start for s in cut['dense']] == [0, 2] and cut['sparse'] == LISTS['sparse']
  early = {'early': (Stage(), Stage(start=1, selector='uniform', image_keep_rate=0.5)), **LISTS}
  with pytest.raises(ConfigError, match='early drops tokens before layer 2'):
    cut_alike(early)


@pytest.fixture(scope='module')
def ladder():
  return Ladder(rungs(CFG, LISTS, width=4), Rules(calm_seconds=0.0))


@pytest.fixture(scope='module')
def engine(ladder, gating_params):
  weights = cut_params(gating_params, ladder.rungs[0].stages)
  generators = {r.name: Generator(CFG, r.stages, weights, max_new_tokens=NEW, eos_id=EOS) for r in ladder.rungs}
  room = 2 * ladder.rungs[0].bytes(SLOT)
  return Engine(Pools.on(ladder, generators, room, TEXT), Letters(), text_length=TEXT, steps=4)


def test_a_room_that_holds_nobody(ladder):
  generators = dict.fromkeys(LISTS, types.SimpleNamespace(max_new_tokens=NEW))
  with pytest.raises(ConfigError, match='room: 100 bytes, and one on rung dense takes'):
    Pools.on(ladder, generators, 100, TEXT)


@pytest.mark.slow
def test_idle_is_dense_and_a_burst_goes_down(ladder, engine, gating_params):
  # Dense as one stage: the ladder's dense rung is cut in two.
  generators = dict(
    dense=Generator(CFG, DENSE, gating_params, max_new_tokens=NEW, eos_id=EOS), sparse=engine.pools.pools[1].generator
  )
  engine.warm([Request('short', rows(1)), Request('long', rows(0))])
  compiled = engine.compilations()
  dense, sparse = engine.pools.pools
  assert dense.slots == 2 <= sparse.slots

  def check(number, reply, rung):
    expected = generators[rung](rows(number).prompt, rows(number).pixels)
    assert reply.rung == rung
    assert list(reply.tokens) == np.asarray(expected.tokens[0, : int(expected.length[0])]).tolist()

  ask = lambda number: engine.submit(Request(f'question {number}', rows(number)))
  alone = {}
  for number in (0, 1):  # one after the other: idle
    alone[number] = ask(number)
    engine.run([alone[number]])
  burst = {number: ask(number) for number in range(8)}
  engine.run(list(burst.values()))
  alone[2] = ask(2)
  engine.run([alone[2]])
  assert ladder.counts == {'dense': 3, 'sparse': 8} and len({d.request for d in ladder.decisions}) == 8
  assert engine.compilations() == compiled
  for rung, tickets in (('dense', alone), ('sparse', burst)):
    for number, ticket in tickets.items():
      check(number, ticket.reply(), rung)
