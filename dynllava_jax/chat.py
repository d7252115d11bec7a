"""A conversation with a checkpoint in a terminal.

    python -m dynllava_jax.chat --checkpoint=CHECKPOINT --image=scene.png

Answers come as they are made. Lines that begin with `/` are orders; `/help` lists them.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from dynllava_jax import command_line
from dynllava_jax.config import ConfigError
from dynllava_jax.data.samples import DataError
from dynllava_jax.display import Terminal, printable

CHECKPOINT = command_line.define_path('checkpoint', None, 'Checkpoint directory, or one step in it.')
IMAGE = command_line.define_path('image', None, 'Picture that the conversation is about; none if not given.')
STAGES = flags.DEFINE_string('stages', None, "How it is run: dense, dynamic, a method, or a JSON list; the checkpoint's own.")
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 1024, 'Room for all answers of a conversation.', lower_bound=1)
LATER_TOKENS = flags.DEFINE_integer('later_tokens', 1024, 'Room for all later questions of a conversation.', lower_bound=16)
TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 takes the most likely token.', lower_bound=0.0)
SEED = flags.DEFINE_integer('seed', 0, 'Of what is drawn by chance.', lower_bound=0, upper_bound=2**32 - 1)
QUANTIZATION = command_line.define_quantization()
DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Of the computation; bfloat16 on accelerators if not given.')

ORDERS = """\
/image PATH   another picture, and a new conversation; without PATH none
/dense        from now on with all tokens
/keep SHARE   from now on with this share of the image tokens, such as 0.1
/own          from now on as the checkpoint was made to
/stats        what the last answer kept, its speed, and the size of the cache
/new          a new conversation about the same picture
/quit         the end; so is Ctrl-D. Ctrl-C ends an answer"""
MISTAKES = (DataError, ConfigError, ValueError, OSError, FloatingPointError)  # of whoever types: one line, and on


class Session:
  """A conversation that goes on while the way it is run changes.

  Attributes:
    chat: the conversation on its present cache.
    reply: the last whole reply, or None.
  """

  def __init__(self, model: Any, image: Any, *, max_new_tokens: int, later_tokens: int, temperature: float, seed: int):
    """`model`: a `dl.Model`; `image`: as in `Model.chat`."""
    self.model, self.image = model, image
    self._own = model
    self._ways: dict[str, Any] = {}
    self._sizes = dict(max_new_tokens=max_new_tokens, later_tokens=later_tokens)
    self._options = dict(temperature=temperature, seed=seed)
    self.reply = None
    self.spent = 0.0
    self.begin()

  def begin(self, before: Any = ()) -> None:
    """A new conversation, or one that goes on with what was said `before`, read anew; questions without an answer are left out."""
    pairs = [pair for pair in zip(before[::2], before[1::2]) if pair[1]['value']]
    self.chat = self.model.chat(self.image, before=[turn for pair in pairs for turn in pair], **self._sizes)

  def say(self, words: str) -> Iterator[str]:
    """Pieces of the answer; `reply` is there at the end."""
    start = time.monotonic()
    self.reply = yield from self.chat.stream(words, **self._options)
    self.spent = time.monotonic() - start

  def order(self, line: str) -> str:
    """Does what a line that begins with `/` says; what there is to say about it. Raises one of `MISTAKES` if it cannot."""
    name, _, rest = line[1:].strip().partition(' ')
    orders: dict[str, Callable[[str], str]] = {
      'image': self._look_at,
      'dense': lambda _: self._run('dense'),
      'keep': self._keep,
      'own': lambda _: self._run(None),
      'stats': lambda _: self.stats(),
      'new': lambda _: self._new(),
      'help': lambda _: ORDERS,
    }
    if name not in orders:
      raise ValueError(f'/{name}: no such order; /help lists them')
    return orders[name](rest.strip())

  def stats(self) -> str:
    """Numbers of the last answer."""
    if self.reply is None:
      return 'nothing was answered yet'
    reply, model = self.reply, self.model
    made = len(reply.tokens)
    return '\n'.join(
      [
        f'image tokens behind the last cut   {len(reply.kept_image)} of {model.loaded.num_image if self.image is not None else 0}',
        f'generated tokens whose K/V stay    {reply.kept_generated} of {len(reply.kept)} fed, {reply.evicted} of them given up',
        f'tokens                             {made} in {self.spent:.2f} s, {made / self.spent:.1f} per second',
        f'to the first                       {reply.timings.first:.2f} s',
        f'KV cache, with its room            {self.chat.cache_bytes / 2**20:.2f} MiB',
        f'run as                             {described(model.loaded.stages)}',
      ]
    )

  def _new(self) -> str:
    self.begin()
    return 'a new conversation'

  def _look_at(self, path: str) -> str:
    from dynllava_jax.evals.layout import load_image
    from dynllava_jax.serving import questions

    asked = questions.question('image', path or None, 'a')
    load_image(asked)  # what is no picture is said now
    self.image = path or None
    self.begin()
    return f'a new conversation about {path}' if path else 'a new conversation without a picture'

  def _keep(self, share: str) -> str:
    try:
      wanted = float(share)
    except ValueError:
      wanted = -1.0
    if not 0 < wanted <= 1:
      raise ValueError(f'/keep {share}: expected a share above 0 up to 1, such as /keep 0.1')
    from dynllava_jax import api

    return self._run(api.share_of(self._own.loaded.info, wanted))

  def _run(self, stages: str | None) -> str:
    """Another way to run the model, for what follows; the conversation is read anew."""
    key = stages or 'own'
    if key not in self._ways:
      self._ways[key] = self._own.run_as(stages) if stages else self._own
    self.model = self._ways[key]
    self.begin(before=self.chat.turns)
    return f'from now on {described(self.model.loaded.stages)}'


def described(stages: Any) -> str:
  """A stage list in words."""
  cuts = [s for s in stages if s.selector != 'all']
  if not cuts:
    return 'dense'
  tokens = lambda s: f'{s.image_tokens} image tokens' if s.image_tokens else f'{s.image_keep_rate:.0%} of the image tokens'
  return ', '.join(f'{s.selector} with {tokens(s)} from layer {s.start} on' for s in cuts)


def talk(session: Session, lines: Iterator[str], console: Terminal) -> None:
  """Answers lines until there are no more, or `/quit`. No line ends it otherwise."""
  for line in lines:
    line = line.strip()
    if line in ('/quit', '/exit'):
      return
    if not line:
      continue
    try:
      if line.startswith('/'):
        console.print(session.order(line))
        continue
      for piece in session.say(line):
        console.print(printable(piece, lines=True), end='')
        console.file.flush()
      console.print()
    except KeyboardInterrupt:
      session.begin(before=session.chat.turns)
      console.print('\n(ended)')
    except MISTAKES as e:
      console.print(f'error: {e}')


def typed(console: Terminal) -> Iterator[str]:
  """Lines from the terminal, whatever bytes they hold, up to its end."""
  shown = '> ' if sys.stdin.isatty() else ''
  for _ in itertools.count():
    try:
      yield console.input(shown)
    except EOFError:
      return
    except KeyboardInterrupt:
      console.print('\n/quit or Ctrl-D ends the conversation')
    except UnicodeDecodeError as e:
      console.print(f'error: that was no text ({e.reason})')


def main(_) -> None:
  """Loads, then talks."""
  with command_line.readable_errors():
    if CHECKPOINT.value is None:
      raise ConfigError('--checkpoint is missing')
    if sys.stdin is None:
      raise ConfigError('standard input is closed; a conversation reads what is said from it')
    import dynllava_jax as dl
    from dynllava_jax import api

    if sys.stdin.isatty():
      import readline  # lines can be edited and called back

      del readline
    sys.stdin.reconfigure(errors='replace')
    console = Terminal(soft_wrap=True)
    sizes = dict(dtype=DTYPE.value, quantization=QUANTIZATION.value)
    model = dl.load(command_line.path(CHECKPOINT), stages=command_line.stages(STAGES), **sizes)
    session = Session(
      model,
      command_line.path(IMAGE),
      max_new_tokens=MAX_NEW_TOKENS.value,
      later_tokens=LATER_TOKENS.value,
      temperature=TEMPERATURE.value,
      seed=SEED.value,
    )
    console.print(f'{api.name_of(command_line.path(CHECKPOINT))} runs {described(model.loaded.stages)}; /help lists orders')
    talk(session, typed(console), console)


if __name__ == '__main__':
  command_line.run(main)
