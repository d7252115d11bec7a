"""The engine: whoever comes when, beside whomever, gets the reply that `Generator` gives to the prompt alone."""

import dataclasses

import jax
import numpy as np
import pytest

from dynllava_jax import methods, presets
from dynllava_jax.config import Piece, Stage
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.layout import Rows
from dynllava_jax.generate import Generator
from dynllava_jax.models.dynllava import Prompt
from dynllava_jax.sampling import Sampling
from dynllava_jax.serving.engine import Engine
from dynllava_jax.serving.request import Options, Request
from dynllava_jax.serving.text import Text
from dynllava_jax.serving.waiting import FullError, Waiting

CFG = presets.TINY
P = methods.num_image_tokens(CFG)
NEW, TEXT = 10, 16
EOS = 7
DYNAMIC = (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.25, text_keep_budget=0.4))
SNAP = Piece('snapkv', dict(ratio=0.5, window=2, kernel=3))
ASKED = ((12, 3), (7, 5), (9, -1), (10, 0), (5, 1), (14, 2), (3, -1), (8, 8))  # text tokens, place of the image or -1


HOT = Sampling(temperature=1.5, top_k=20, top_p=0.9)


class Letters:
  """A tokenizer of one letter per token."""

  def decode(self, ids):
    return ''.join(chr(97 + i % 26) for i in ids).strip()


def rows(number):
  """The prompt of question `number` as a batch of one, in a text bucket of 8 or 16."""
  text, at = ASKED[number]
  rng = np.random.default_rng(number)
  bucket, length = 8 if text <= 8 else 16, text + (P if at >= 0 else 0)
  tokens = np.zeros((1, bucket + P), np.int32)
  tokens[0, :length] = rng.integers(8, CFG.llama.vocab_size, length)
  pixels = rng.integers(0, 256, (1, *[CFG.vision.image_size] * 2, 3)).astype(np.uint8)
  one = lambda value, dtype=np.int32: np.full(1, value, dtype)
  return Rows(
    Prompt(tokens, one(length), one(at), one(number, np.uint32)), pixels, np.zeros((1, 0, 0), np.int32), one(0)[:, None][:, :0]
  )


def options(number):
  hot = dict(temperature=1.5, top_k=20, top_p=0.9, seed=number) if number % 2 else {}
  return Options(**hot, max_tokens=4 if number == 4 else None)


@pytest.fixture(scope='module')
def params(gating_params):
  return gating_params


@pytest.fixture(scope='module')
def generator(params):
  return Generator(CFG, DYNAMIC, params, max_new_tokens=NEW, eos_id=EOS)


@pytest.fixture(scope='module')
def alone(generator):
  """What `Generator` gives to each question alone: everything, or the tokens where they are drawn by chance."""
  replies = []
  for i in range(len(ASKED)):
    prompt = rows(i).prompt
    prompt = dataclasses.replace(prompt, tokens=np.pad(prompt.tokens, [(0, 0), (0, TEXT + P - prompt.tokens.shape[1])]))
    generator.sampling = HOT if i % 2 else Sampling()
    draw = lambda: [int(t[0]) for t in generator.stream(prompt, rows(i).pixels)]
    replies.append(draw() if i % 2 else jax.device_get(generator(prompt, rows(i).pixels)))
  generator.sampling = Sampling()
  return replies


@pytest.fixture(scope='module')
def engine(generator):
  return Engine(generator, Letters(), text_length=TEXT, slots=3, steps=4, prefill_rows=1)


def arrive(engine, order, seed):
  """Submits the questions in an order, some at a time, while others are answered; replies by question."""
  rng, tickets, waiting = np.random.default_rng(seed), {}, list(order)
  while waiting or not all(t.finish for t in tickets.values()):
    for _ in range(rng.integers(0, 4)):
      if waiting:
        number = waiting.pop(0)
        tickets[number] = engine.submit(Request(f'question {number}', rows(number), options(number), client=str(number % 3)))
    engine.step()
  return {number: ticket.reply() for number, ticket in tickets.items()}


@pytest.fixture(scope='module')
def replies(engine):
  return arrive(engine, range(len(ASKED)), seed=0)


@pytest.mark.slow
def test_a_reply_is_that_of_the_generator_alone(replies, alone):
  for number, expected in enumerate(alone):
    reply, wanted = replies[number], options(number).max_tokens or NEW
    if number % 2:
      assert list(reply.tokens) == expected
      continue
    assert list(reply.tokens) == expected.tokens[0, : expected.length[0]].tolist()[:wanted]
    assert list(reply.kept) == expected.kept[0, : len(reply.tokens) - 1].tolist()
    assert list(reply.kept_image) == (expected.kept_image[-1][0].tolist() if ASKED[number][1] >= 0 else [])
    if wanted == NEW:
      assert reply.evicted == expected.evicted[0]
    assert reply.finish == ('end' if reply.tokens[-1] == EOS else 'length')
  assert any(r.evicted for r in replies.values()) and any(not all(r.kept) for r in replies.values())


@pytest.mark.slow
def test_arrival_order_changes_no_bit_and_compiles_nothing(engine, replies):
  before = engine.compilations()
  for seed in (1, 2):
    order = np.random.default_rng(seed).permutation(len(ASKED)).tolist()
    for number, reply in arrive(engine, order, seed).items():
      assert dataclasses.replace(reply, timings=None) == dataclasses.replace(replies[number], timings=None)
  assert engine.compilations() == before


@pytest.mark.slow
def test_prompts_run_together_give_the_same_answers(generator, replies):
  engine = Engine(generator, Letters(), text_length=TEXT, slots=5, steps=3)
  for number, reply in arrive(engine, range(len(ASKED)), 3).items():
    expected = replies[number]
    np.testing.assert_allclose(reply.log_probs, expected.log_probs, atol=1e-5)  # of products of other sizes
    alike = dict(timings=None, log_probs=())
    assert dataclasses.replace(reply, **alike) == dataclasses.replace(expected, **alike)


@pytest.mark.slow
def test_stop_cancel_and_timeout_leave_the_others_alone(engine, replies):
  text = replies[0].text
  wanted = {0: options(0), 2: dataclasses.replace(options(2), timeout=1e-9), 5: options(5)}
  wanted[0] = dataclasses.replace(wanted[0], stop=(text[3:5],))
  tickets = {n: engine.submit(Request(str(n), rows(n), o)) for n, o in wanted.items()}
  gone = [engine.submit(Request('gone', rows(3), options(3))) for _ in range(4)]
  engine.step()
  for ticket in gone:
    engine.cancel(ticket)
  engine.run([*tickets.values(), *gone])
  stopped = tickets[0].reply()
  assert stopped.finish == 'stop' and stopped.text == text[:3] and stopped.tokens == replies[0].tokens[:5]
  assert tickets[2].reply().finish == 'timed out' and not tickets[2].reply().tokens
  assert {t.reply().finish for t in gone} == {'cancelled'}
  assert tickets[5].reply().tokens == replies[5].tokens


@pytest.mark.slow
def test_pieces_of_a_stream_make_up_the_text(engine, replies):
  ticket = engine.submit(Request('stream', rows(0), options(0)))
  pieces = list(engine.stream(ticket))
  assert ''.join(pieces) == replies[0].text and len(pieces) > 1
  left = engine.stream(engine.submit(Request('left', rows(0), options(0))))
  next(left)
  left.close()
  assert engine.step() is False  # nobody is answered who does not listen


def test_a_prompt_that_no_slot_has_room_for(params):
  small = Engine(Generator(CFG, DYNAMIC, params, max_new_tokens=2, eos_id=None), Letters(), text_length=8)
  with pytest.raises(DataError, match='question 0: a text bucket of 16, and the slots have room for 8'):
    small.submit(Request('question 0', rows(0)))


@pytest.mark.slow
@pytest.mark.parametrize(
  'stages', [(Stage(compressor=SNAP),), (Stage(), Stage(start=2, selector='pyramiddrop', image_keep_rate=0.5))]
)
def test_caches_with_numbers_of_their_own_are_put_into_slots(params, stages):
  generator = Generator(CFG, stages, params, max_new_tokens=4, eos_id=None)
  engine = Engine(generator, Letters(), text_length=TEXT, slots=2, steps=2)
  tickets = [engine.submit(Request(str(i), rows(i))) for i in range(4)]
  engine.run(tickets)
  for i, ticket in enumerate(tickets):
    expected = generator(rows(i).prompt, rows(i).pixels)
    assert list(ticket.reply().tokens) == np.asarray(expected.tokens[0]).tolist()


def test_clients_take_turns_up_to_a_limit():
  waiting = Waiting(5)
  for client, item in (('a', 1), ('a', 2), ('a', 3), ('b', 4), ('c', 5)):
    waiting.put(client, item)
  with pytest.raises(FullError, match='5 requests are waiting, which is the limit'):
    waiting.put('d', 6)
  waiting.remove([2])
  assert list(waiting.in_turn()) == [1, 4, 5, 3]
  assert [waiting.take() for _ in range(4)] == [1, 4, 5, 3] and len(waiting) == 0


class Bytes:
  """A tokenizer of one byte per token."""

  def decode(self, ids):
    return bytes(ids).decode(errors='replace').strip()


def test_text_is_given_once_it_is_certain():
  text, pieces = Text(Bytes(), stop=('END',)), []
  for token in 'è so ENCOEND x'.encode():
    stopped = text.push(token)
    pieces.append(text.piece())
    if stopped:
      break
  pieces.append(text.piece(last=True))
  assert ''.join(pieces) == text.text == 'è so ENCO'
  assert pieces[0] == '' and 'E' not in ''.join(pieces[:7])
