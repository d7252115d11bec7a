"""The ladder, driven by a clock of its own: which rung, when it changes, and what it says of it."""

import dataclasses

import pytest

from dynllava_jax.config import ConfigError, Stage
from dynllava_jax.controller.ladder import Ladder, Load, Need, Rung
from dynllava_jax.controller.rules import DECODE, PREFILL, Rules, phase_of, read_rules

NEED = Need(32, 64)
RULES = Rules(queue_high=40, queue_full=80, calm_seconds=5.0)


def rung(name, share):
  return Rung(name, (Stage(),), lambda need: round(share * (need.text + need.new)))


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


@pytest.fixture
def ladder(clock):
  return Ladder([rung('dense', 10), rung('half', 5), rung('fifth', 2)], RULES, clock)


def load(held=0, waiting=0, room=9600, need=NEED, **more):
  """Room for ten dense requests."""
  return Load(room=room, held=held, waiting={need: waiting} if waiting else {}, **more)


def test_idle_is_dense_and_says_so(ladder):
  decision = ladder.choose('question 1', NEED, load())
  assert decision.rung == 'dense' and decision.line == '0.000 s  question 1: dense: nothing is held and nobody waits'


@pytest.mark.parametrize('waiting, expected', [(9, 'dense'), (10, 'half'), (19, 'half'), (20, 'fifth'), (1000, 'fifth')])
def test_the_densest_rung_at_which_all_that_wait_fit(ladder, waiting, expected):
  assert ladder.choose('q', NEED, load(waiting=waiting)).rung == expected


def test_what_is_held_counts(ladder):
  assert ladder.choose('q', NEED, load(held=8000, waiting=0)).rung == 'dense'
  assert ladder.choose('q', NEED, load(held=8000, waiting=1)).rung == 'half'


def test_each_requests_own_answer_length_counts(ladder):
  """Twenty short answers fit where ten long ones do; for dense, too."""
  short = Need(32, 16)
  assert ladder.choose('q', short, load(waiting=19, need=short)).rung == 'dense'
  assert ladder.choose('q', NEED, load(waiting=19, need=NEED)).rung == 'half'


def test_down_at_once_up_only_after_calm_with_a_margin(ladder, clock):
  assert ladder.choose('a', NEED, load(waiting=30)).rung == 'fifth'
  clock.now = 1.0
  almost = load(held=100, waiting=13)  # fits at half, but not one and a half times
  assert ladder.choose('b', NEED, almost).rung == 'fifth'
  light = load(held=100, waiting=2)
  for clock.now, expected in ((2.0, 'fifth'), (6.9, 'fifth'), (7.0, 'dense')):
    decision = ladder.choose('c', NEED, light)
    assert decision.rung == expected, decision.line
  assert 'for 5.0 s' in decision.why and decision.line.startswith('7.000 s  c: up to dense')


def test_a_burst_between_starts_the_calm_again(ladder, clock):
  light = load(held=100, waiting=2)
  for clock.now, what in ((0, load(waiting=30)), (1, light), (5, load(waiting=30)), (6.5, light), (11, light)):
    assert ladder.choose('x', NEED, what).rung == 'fifth'
  clock.now = 11.5
  assert ladder.choose('x', NEED, light).rung == 'dense'


def test_up_goes_as_far_as_would_have_done_all_the_time(ladder, clock):
  for clock.now, what in ((0, load(waiting=30)), (1, load(held=100, waiting=8)), (3, load(held=100)), (6, load(held=100))):
    decision = ladder.choose('x', NEED, what)
  assert decision.rung == 'half'  # with eight waiting dense would not have had its margin


def test_idle_needs_no_calm(ladder):
  ladder.choose('a', NEED, load(waiting=30))
  assert ladder.choose('b', NEED, load()).rung == 'dense'


def test_a_conversation_only_goes_down(ladder):
  assert ladder.choose('turn 2', NEED, load(), begun_on=1).rung == 'half'
  assert 'has dropped what dense would keep' in ladder.choose('turn 2', NEED, load(), begun_on=1).line
  assert ladder.choose('turn 3', NEED, load(waiting=30), begun_on=1).rung == 'fifth'


@pytest.mark.parametrize(
  'signal, expected, why',
  [
    (dict(memory=0.84), 'dense', 'nothing is held'),
    (dict(memory=0.85), 'half', '85% of the memory is in use'),
    (dict(memory=0.97), 'fifth', '97% of the memory is in use'),
    (dict(step_seconds=0.04), 'dense', 'nothing is held'),
    (dict(step_seconds=0.06), 'half', 'a step takes 60.0 ms, the limit is 50.0 ms'),
  ],
)
def test_memory_and_step_time(clock, signal, expected, why):
  rungs = [rung('dense', 10), rung('half', 5), rung('fifth', 2)]
  decision = Ladder(rungs, dataclasses.replace(RULES, step_seconds=0.05), clock).choose('q', NEED, load(**signal))
  assert decision.rung == expected and why in decision.why


def test_a_slow_step_goes_one_rung_at_a_time(clock):
  slow = Ladder([rung('dense', 10), rung('half', 5), rung('fifth', 2)], dataclasses.replace(RULES, step_seconds=0.05), clock)
  chosen = [slow.choose('q', NEED, load(held=100, step_seconds=s)).rung for s in (0.06, 0.06, 0.04)]
  assert chosen == ['half', 'fifth', 'fifth']  # 0.04 is below the limit, not below it by the margin


def test_a_long_queue_alone(clock):
  rungs = [rung('dense', 10), rung('half', 5), rung('fifth', 2)]
  chosen = [Ladder(rungs, RULES, clock).choose('q', NEED, load(waiting=n, room=10**9)) for n in (39, 40, 80)]
  assert [d.rung for d in chosen] == ['dense', 'half', 'fifth'] and '40 wait behind it' in chosen[1].why


def test_what_was_acted_on_is_recorded(ladder):
  for waiting in (0, 30):
    ladder.record(ladder.choose(f'question {waiting}', NEED, load(waiting=waiting)))
  assert [d.rung for d in ladder.decisions] == ['dense', 'fifth'] and ladder.counts == {'dense': 1, 'fifth': 1}


def test_rungs_in_the_wrong_order_are_refused():
  with pytest.raises(ConfigError, match='dense takes 1280 bytes and stands behind half with 640; swap them'):
    Ladder([rung('half', 5), rung('dense', 10)])
  with pytest.raises(ConfigError, match='each with a name of its own'):
    Ladder([rung('a', 5), rung('a', 5)])


def test_the_rules_directions():
  """Prefill favours the image, decoding text; a cache drops more text; scarcity drops more, plenty nothing."""
  rules = Rules()
  prefill, decode = rules.kept(PREFILL, True, 1.0), rules.kept(DECODE, True, 1.0)
  assert prefill[0] < decode[0] and decode[1] < prefill[1]
  for phase in (PREFILL, DECODE):
    assert rules.kept(phase, True, 1.0)[1] < rules.kept(phase, False, 1.0)[1]
    shares = [rules.kept(phase, True, s) for s in (0.0, 0.3, 0.6, 1.0)]
    assert shares[0] == (1.0, 1.0) and sorted(shares, reverse=True) == shares
  assert (phase_of(3, 1, rules), phase_of(1, 3, rules)) == (PREFILL, DECODE)


def test_rules_are_read_strictly():
  assert read_rules('') == Rules()
  assert read_rules('decode_image=0.9, levels=0:1,queue_high=4') == Rules(decode_image=0.9, levels=(0.0, 1.0), queue_high=4)
  for text, message in (
    ('decode_imge=0.9', "did you mean 'decode_image'"),
    ('decode_image', 'expected NAME=NUMBER'),
    ('decode_image=1', 'expected a share that is dropped, from 0 to below 1'),
    ('levels=0.5', 'expected increasing numbers from 0'),
  ):
    with pytest.raises(ConfigError, match=message):
      read_rules(text)
