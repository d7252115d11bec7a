"""Conversations that need their history: facts told in earlier turns, which no picture shows, and asked for later.

Beside a digit scene the user names digits for cells (`C5 is 7.`), drawn without regard to the scene, and asks for them in later
turns (`What is C5?`), which the picture cannot answer; `Which digit is at C5?` between them is answered by the picture alone.
`List all.` asks for a summary of what was told, in the form of `digits.NAME`'s answers. The words are those of the demo's
tokenizer, so that checkpoints trained on digits can go on with them. Conversation i is a pure function of (split, seed, i).
"""

import dataclasses
from typing import SupportsIndex

import numpy as np

from dynllava_jax.data.conversation import IMAGE_TOKEN
from dynllava_jax.data.digits import GRID, SPLITS, ask, cell_name, make_scene
from dynllava_jax.data.order import Part
from dynllava_jax.data.samples import Sample

FACT, RECALL, IMAGE, SUMMARY = 'fact', 'recall', 'image', 'summary'  # kinds of turns
SUMMARISE = 'List all.'
MOST_FACTS, EASY_FACTS = 10, 4
EASY = 4000  # so many conversations at the beginning have few facts; a curriculum if the source is read unshuffled
IMAGE_SHARE, SUMMARY_SHARE = 1 / 3, 0.1
TALK = 3  # beside 0 and 1, which `digits` draws its streams with


@dataclasses.dataclass(frozen=True)
class Turn:
  """A question and its answer. `kind`: what it needs; `told`: for `RECALL`, the turn in which the fact was told."""

  question: str
  answer: str
  kind: str
  told: int = -1


def told(cell: str, digit: int) -> str:
  """A fact, as the user tells it."""
  return f'{cell} is {digit}.'


def make_talk(split: str, rng: np.random.Generator, facts: int, turns: int) -> tuple[np.ndarray, list[Turn]]:
  """A picture, and so many turns: `facts` of them tell one, the others ask; some facts are told before anything is asked.

  Facts come in the first half of the turns that are left to them, so that what is asked for lies back.
  """
  scene = make_scene(split, rng)
  places = [cell_name(*divmod(int(i), GRID)) for i in rng.choice(GRID * GRID, facts, replace=False)]
  digits = rng.integers(0, 10, facts)
  telling = set(rng.choice(np.arange(1, max(facts, (turns + facts) // 2)), facts - 1, replace=False).tolist()) | {0}
  out: list[Turn] = []
  known: list[tuple[str, int, int]] = []  # cell, digit, turn
  for number in range(turns):
    if number in telling:
      cell, digit = places[len(known)], int(digits[len(known)])
      known.append((cell, digit, number))
      out.append(Turn(told(cell, digit), str(digit), FACT))
    elif rng.random() < IMAGE_SHARE:
      out.append(Turn(*ask('which', scene, rng), IMAGE))
    elif rng.random() < SUMMARY_SHARE and all(t.kind != SUMMARY for t in out):  # a second one would be too long for a row
      out.append(Turn(SUMMARISE, summary(known), SUMMARY))
    else:
      cell, digit, when = known[rng.integers(len(known))]
      out.append(Turn(f'What is {cell}?', str(digit), RECALL, when))
  return scene.image, out


def summary(known: list[tuple[str, int, int]]) -> str:
  """The answer to `SUMMARISE`, facts in the order in which they were told."""
  return ', '.join(f'{cell} {digit}' for cell, digit, _ in known)


def as_conversation(turns: list[Turn]) -> tuple[dict[str, str], ...]:
  """In LLaVA's form."""
  pairs = ((f'{IMAGE_TOKEN}\n{t.question}' if i == 0 else t.question, t.answer) for i, t in enumerate(turns))
  return tuple(part for q, a in pairs for part in ({'from': 'human', 'value': q}, {'from': 'gpt', 'value': a}))


class Talks:
  """Random-access source of conversations for training: 2 to `MOST_FACTS` facts, up to 20 turns, as many as a row holds."""

  def __init__(self, split: str, seed: int, size: int = 1_000_000):
    """`size` is how many different ones there are; none is stored."""
    self.split, self.seed, self.size = split, seed, size
    self.parts = (Part(0, size),)

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: SupportsIndex) -> Sample:
    index = int(index)
    rng = np.random.default_rng((self.seed, list(SPLITS).index(self.split), TALK, index))
    most = EASY_FACTS if index < EASY else MOST_FACTS
    facts = int(rng.integers(2, most + 1))
    image, turns = make_talk(self.split, rng, facts, min(20, facts + int(rng.integers(facts, 2 * facts + 3))))
    return Sample(f'talks/{self.split}/{index}', image, as_conversation(turns))
