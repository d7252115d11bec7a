"""The terminal: every line is answered, done or refused in one line, and none ends the conversation but the one that says so."""

import dataclasses
import io
import types

import pytest
from conftest import ROOT
from PIL import Image
from programs import program

from dynllava_jax import api
from dynllava_jax.data.samples import DataError
from dynllava_jax.display import Terminal

chat = program('chat')
EXAMPLE = ROOT / 'examples' / 'digits'


@dataclasses.dataclass
class Told:
  """A conversation without a model: it answers with how many turns there were. `broken`: what the next answer raises."""

  image: object
  turns: list
  sizes: dict
  broken: BaseException | None = None
  cache_bytes: int = 2**20

  def stream(self, text, **options):
    if self.broken is not None:
      self.broken, raised = None, self.broken
      yield 'half '
      raise raised
    self.turns += [{'from': 'human', 'value': text}, {'from': 'gpt', 'value': f'answer {len(self.turns) // 2}'}]
    yield from ('ans', f'wer {len(self.turns) // 2 - 1}\x1b[31m')
    timings = types.SimpleNamespace(first=0.5)
    return types.SimpleNamespace(
      tokens=(1, 2, 3), kept=(True, False), kept_generated=1, evicted=0, kept_image=tuple(range(9)), timings=timings
    )


class Model:
  """What `chat.Session` needs of a `dl.Model`; it knows how it was told to run."""

  def __init__(self, stages=None):
    self.stages, self.loaded = stages, api.describe(str(EXAMPLE), stages)[0]

  def chat(self, image, before=(), **sizes):
    return Told(image, list(before), sizes)

  def run_as(self, stages):
    return Model(stages)


@pytest.fixture
def talked():
  """(session, a function from lines to what the terminal showed)."""
  session = chat.Session(Model(), None, max_new_tokens=20, later_tokens=30, temperature=0.0, seed=1)

  def say(*lines):
    shown = io.StringIO()
    chat.talk(session, iter(lines), Terminal(file=shown, width=200, soft_wrap=True))
    return shown.getvalue()

  return session, say


def test_a_conversation_goes_on_however_it_is_run(talked):
  session, say = talked
  assert say('/stats') == 'nothing was answered yet\n'
  shown = say('How many?', '', '/keep 0.2', 'And now?', '/dense', '/own')
  assert 'answer 0' in shown and 'answer 1' in shown and '\x1b' not in shown  # nothing that an answer holds steers the terminal
  assert 'dynamic with 9 image tokens from layer 1 on' in shown and 'from now on dense' in shown
  assert [t['value'] for t in session.chat.turns] == ['How many?', 'answer 0', 'And now?', 'answer 1']
  assert session.chat.sizes == dict(max_new_tokens=20, later_tokens=30)
  assert '9 of 0' in say('/stats') and '1 of 2 fed, 0 of them given up' in say('/stats') and '1.00 MiB' in say('/stats')
  say('/new')
  assert session.chat.turns == []


@pytest.mark.parametrize(
  'line, message',
  [
    ('/fly', 'error: /fly: no such order; /help lists them'),
    ('/', 'error: /: no such order'),
    ('/keep', 'error: /keep : expected a share above 0 up to 1, such as /keep 0.1'),
    ('/keep 2', 'error: /keep 2: expected a share'),
    ('/keep nan', 'error: /keep nan: expected a share'),
    ('/image nowhere.png', 'nowhere.png'),
    ('/help', '/image PATH   another picture'),
  ],
)
def test_orders_that_cannot_be_are_one_line_and_it_goes_on(talked, line, message):
  session, say = talked
  shown = say('First?', line, 'Second?')
  assert message in shown and 'Traceback' not in shown and 'answer 1' in shown
  assert len(session.chat.turns) == 4


def test_another_picture_begins_anew_and_no_picture_changes_nothing(talked, tmp_path):
  session, say = talked
  Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
  (tmp_path / 'b.png').write_bytes(b'no picture')
  assert f'a new conversation about {tmp_path / "a.png"}' in say('First?', f'/image {tmp_path / "a.png"}')
  assert session.chat.turns == [] and str(session.chat.image) == str(tmp_path / 'a.png')
  assert say('First?', f'/image {tmp_path / "b.png"}').count('error: ') == 1
  assert len(session.chat.turns) == 2 and str(session.chat.image) == str(tmp_path / 'a.png')
  assert 'without a picture' in say('/image') and session.chat.image is None


@pytest.mark.parametrize(
  'raised', [DataError('the conversation is full', 'too_long'), KeyboardInterrupt(), FloatingPointError('nan')]
)
def test_an_answer_that_ends_early_is_told_and_the_next_one_comes(talked, raised):
  session, say = talked
  say('First?')
  session.chat.broken = raised
  shown = say('Second?', 'Third?', '/quit', 'Fourth?')
  assert 'half ' in shown and ('(ended)' in shown or f'error: {raised}' in shown)
  assert [t['value'] for t in session.chat.turns[::2]] == ['First?', 'Third?']
