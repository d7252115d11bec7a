"""Where an engine's requests live while they are answered: slots of one stage list, and of several the one that has the room.

With a ladder every rung has as many slots as fit into the room for keys and values. One rung at a time has the room, since a cache
is allocated whole: it changes when its last request is over, and until then nobody new begins.
"""

from collections.abc import Mapping, Sequence

from dynllava_jax import arguments
from dynllava_jax.config import ConfigError
from dynllava_jax.controller import resources
from dynllava_jax.controller.ladder import Decision, Ladder, Load, Need
from dynllava_jax.generate import Generator
from dynllava_jax.serving.stepping import Running, Stepper

SMOOTH = 0.2  # weight of the newest dispatch in the mean time of a step


class Pool:
  """Slots of one `Generator`: its programs, and its cache while it is in use."""

  def __init__(self, generator: Generator, slots: int, rung: str = ''):
    arguments.integer('slots', slots, 1, arguments.MOST_TOKENS)
    self.generator, self.slots, self.rung = generator, slots, rung
    self.stepper = Stepper(generator)
    self.running: Running | None = None


class Pools:
  """Pools by rung, one of them `present`; without a ladder there is but one."""

  def __init__(self, pools: Sequence[Pool], ladder: Ladder | None = None, room: int = 0, text_length: int = 0):
    self.pools, self.ladder, self.room = tuple(pools), ladder, room
    self.present = self.pools[0]
    new = self.present.generator.max_new_tokens
    self._slot = Need(text_length, new)  # what a slot has room for
    self.step_seconds: float | None = None

  @classmethod
  def on(cls, ladder: Ladder, generators: Mapping[str, Generator], room: int, text_length: int) -> 'Pools':
    """Pools of all rungs of a ladder.

    Args:
      ladder: its rungs; generators: of each rung, by name, of one set of weights and of as many new tokens.
      room: bytes for keys and values, of all that is answered at once.
      text_length: the largest text bucket.

    Raises:
      ConfigError: not even one request fits.
    """
    pools, slot = [], None
    for rung in ladder.rungs:
      generator = generators[rung.name]
      slot = Need(text_length, generator.max_new_tokens)
      if (slots := room // rung.bytes(slot)) < 1:
        raise ConfigError(
          f'room: {room} bytes, and one on rung {rung.name} takes {rung.bytes(slot)} (text bucket {slot.text}, {slot.new} new '
          'tokens); give more room, or shorten them'
        )
      pools.append(Pool(generator, slots, rung.name))
    return cls(pools, ladder, room, text_length)

  def choose(self, name: str, need: Need, held: int, waiting: Mapping[Need, int]) -> Decision:
    """What the ladder says of a request while `held` slots are in use and others wait."""
    held_bytes = held * self.ladder.rungs[self.pools.index(self.present)].bytes(self._slot)
    load = Load(room=self.room, held=held_bytes, waiting=waiting, step_seconds=self.step_seconds, memory=resources.memory_share())
    return self.ladder.choose(name, need, load)

  def change(self, index: int) -> None:
    """Gives the room to another rung; the cache of the present one, in which nobody is, goes."""
    self.present.running = None
    self.present = self.pools[index]
    self.step_seconds = None

  def took(self, seconds: float) -> None:
    """Tells how long a step of the present pool took."""
    self.step_seconds = seconds if self.step_seconds is None else (1 - SMOOTH) * self.step_seconds + SMOOTH * seconds
