"""What a conversation holds, token by token, and what of it stays when it outgrows its room: whole sentences, by importance.

A `Memory` knows of every token in the cache which turn and sentence it belongs to, in which slot of each stage it lies and at which
position it stands. `choose` names what stays within a budget, `Memory.compact` says how the cache is to be compacted to it.
Nothing here computes on the device.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

KEEP, EXTRACT, SUMMARISE = 'keep', 'extract', 'summarise'
REROTATE, GAPS = 'rerotate', 'gaps'
SENTENCE_ENDS = ('.', '!', '?', '\n')
FIXED = -1  # turn of what always stays: what stands in front of the first question, and the image
FRAME = -1  # sentence of tokens that only say who speaks


@dataclasses.dataclass
class Token:
  """One token of the cache. `turn`: exchange it belongs to; `sentence`: within it; `answer`: whether the model wrote it.

  `id`: -1 in an image; `surprisal`: -log of the model's probability, NaN where it was not seen; `position`: in the conversation.
  """

  id: int
  turn: int
  sentence: int
  answer: bool
  position: int
  surprisal: float = math.nan


Importance = Callable[[Sequence[Token]], np.ndarray]  # tokens of a conversation -> float[N], the larger the rather it stays


def frequency(tokens: Sequence[Token]) -> np.ndarray:
  """Rare tokens matter: -log of a token's share of the conversation."""
  ids = np.asarray([t.id for t in tokens])
  _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
  return -np.log(counts[inverse] / len(ids))


def surprisal(tokens: Sequence[Token]) -> np.ndarray:
  """What the model could not foresee matters; where it was not seen to try, the mean of the others."""
  values = np.asarray([t.surprisal for t in tokens])
  known = values[np.isfinite(values)]
  return np.where(np.isfinite(values), values, known.mean() if len(known) else 0.0)


def recency(tokens: Sequence[Token]) -> np.ndarray:
  """What was said last matters: the oldest leaves."""
  return np.arange(len(tokens), dtype=float)


IMPORTANCE: dict[str, Importance] = {'frequency': frequency, 'surprisal': surprisal, 'recency': recency}


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
  """What becomes of earlier turns that a conversation has no room for.

  Attributes:
    mode: `KEEP` all and refuse a turn that does not fit; `EXTRACT` whole sentences by importance; `SUMMARISE` in the model's words.
    budget: text tokens of earlier turns that are kept at most.
    importance: name in `IMPORTANCE`, what `EXTRACT` ranks by.
    positions: `REROTATE` numbers what stays anew, so that a conversation never comes to positions it was not trained at; `GAPS`
      leaves it where it stood.
    recompute: run what stays again as a prompt, so that nothing of what left is in its keys and values.
    prompt: what asks the model for a summary; in a config or an argument, as it must suit the model.
  """

  mode: str = KEEP
  budget: int = 256
  importance: str = 'surprisal'
  positions: str = REROTATE
  recompute: bool = False
  prompt: str = 'Summarise our conversation so far in a few sentences.'

  def __post_init__(self):
    for name, known in (('mode', (KEEP, EXTRACT, SUMMARISE)), ('importance', IMPORTANCE), ('positions', (REROTATE, GAPS))):
      value = getattr(self, name)
      if value not in tuple(known):
        raise ValueError(f'history {name}: {value!r}, expected one of {", ".join(known)}')
    if not isinstance(self.budget, int) or self.budget < 1:
      raise ValueError(f'history budget: {self.budget!r}, expected a positive number of tokens')
    if not self.prompt.strip():
      raise ValueError('history prompt: has no words, and the model is asked for a summary by it')


def sentences(pieces: Sequence[str]) -> list[int]:
  """Number of the sentence that each piece of a text belongs to."""
  out, number = [], 0
  for piece in pieces:
    out.append(number)
    number += piece.rstrip(' ').endswith(SENTENCE_ENDS)
  return out


@dataclasses.dataclass(frozen=True)
class Compaction:
  """What a conversation gave up, and when.

  Attributes:
    turn: exchanges that there were; how: 'extract' or 'summarise'.
    before, after: text tokens that the cache held of them.
    left_out: the sentences that are gone, in order; summary: what stands for them, '' if nothing does.
  """

  turn: int
  how: str
  before: int
  after: int
  left_out: tuple[str, ...]
  summary: str = ''


class Memory:
  """The tokens of a conversation, and where they lie in each stage's cache."""

  def __init__(self, stages: int):
    self.tokens: list[Token] = []
    self.slots: list[list[int]] = [[] for _ in range(stages)]  # by stage and slot, number of the token in it

  @property
  def held(self) -> int:
    """Text tokens that may leave."""
    return sum(t.turn != FIXED for t in self.tokens)

  def add(self, new: Sequence[Token], kept: Sequence[Sequence[bool]]) -> None:
    """Tokens that were fed; `kept`: for each stage, which of them are in its cache."""
    first = len(self.tokens)
    self.tokens += new
    for slots, flags in zip(self.slots, kept):
      slots += [first + i for i, flag in enumerate(flags) if flag]

  def compact(self, stays: Collection[int], positions: str) -> tuple[list[list[int]], list[list[int]], int]:
    """Forgets all but the tokens with these numbers and what is fixed.

    Args:
      stays: numbers of tokens. positions: `REROTATE` numbers what stays anew, `GAPS` leaves it where it stood.

    Returns:
      (for each stage the slots that stay, in order; for each of them how far its key is to be rotated on; the next position).
    """
    stays = set(stays) | {i for i, t in enumerate(self.tokens) if t.turn == FIXED}
    order = sorted(stays)
    next_position = self.tokens[-1].position + 1
    old = {i: self.tokens[i].position for i in order}
    if positions == REROTATE:
      for place, i in enumerate(order):
        self.tokens[i].position = place
      next_position = len(order)
    number = {i: place for place, i in enumerate(order)}
    where = [[slot for slot, i in enumerate(slots) if i in stays] for slots in self.slots]
    moved = [[self.tokens[slots[s]].position - old[slots[s]] for s in kept] for slots, kept in zip(self.slots, where)]
    self.slots = [[number[slots[s]] for s in kept] for slots, kept in zip(self.slots, where)]
    self.tokens = [self.tokens[i] for i in order]
    return where, moved, next_position


@dataclasses.dataclass(frozen=True)
class Sentence:
  """A sentence of an exchange: the numbers of its tokens, and their mean importance."""

  turn: int
  answer: bool
  tokens: tuple[int, ...]
  importance: float


def found_sentences(memory: Memory, importance: Importance) -> list[Sentence]:
  """All sentences of what may leave, in order."""
  numbers = [i for i, t in enumerate(memory.tokens) if t.turn != FIXED]
  scores = dict(zip(numbers, importance([memory.tokens[i] for i in numbers])))
  groups: dict[tuple[int, bool, int], list[int]] = {}
  for i in numbers:
    t = memory.tokens[i]
    if t.sentence != FRAME:
      groups.setdefault((t.turn, t.answer, t.sentence), []).append(i)
  return [Sentence(turn, answer, tuple(g), float(np.mean([scores[i] for i in g]))) for (turn, answer, _), g in groups.items()]


def choose(memory: Memory, budget: int, importance: Importance) -> set[int]:
  """Numbers of the tokens that stay: whole sentences by mean importance, at most `budget` tokens, what says who speaks included.

  No question stands without an answer and no answer without a question: first the most important sentence of each side of an
  exchange, weighed together, then what there is room for of the other sentences of exchanges that stay.
  """
  found = found_sentences(memory, importance)
  frames: dict[int, set[int]] = {}
  for i, t in enumerate(memory.tokens):
    if t.turn != FIXED and t.sentence == FRAME:
      frames.setdefault(t.turn, set()).add(i)
  pairs: list[tuple[float, int, set[int]]] = []
  others: list[tuple[float, int, set[int]]] = []
  for turn in dict.fromkeys(s.turn for s in found):
    sides = [[s for s in found if (s.turn, s.answer) == (turn, answer)] for answer in (False, True)]
    pair = [max(side, key=lambda s: s.importance) for side in sides if side]
    numbers = {i for s in pair for i in s.tokens}
    pairs.append((sum(s.importance * len(s.tokens) for s in pair) / len(numbers), turn, numbers | frames.get(turn, set())))
    others += [(s.importance, turn, set(s.tokens)) for s in found if s.turn == turn and s not in pair]
  stays: set[int] = set()
  there: set[int] = set()
  for offers, allowed in ((pairs, None), (others, there)):
    for _, turn, numbers in sorted(offers, key=lambda offer: (-offer[0], offer[1])):
      if (allowed is None or turn in allowed) and len(stays) + len(numbers) <= budget:
        stays |= numbers
        there.add(turn)
  return stays
