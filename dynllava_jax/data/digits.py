"""The embedded data set: scenes of scanned handwritten digits, and questions about them.

scikit-learn ships 1,797 scans of 8x8 pixels (UCI Optical Recognition of Handwritten Digits). A scene is a noisy
98x98 canvas of 7x7 cells, 6 to 9 of which hold a digit: 12 to 18 % of the image tokens carry the evidence, so
a selector that finds them can keep a fifth of the tokens and a blind one cannot. The scans are split before any scene
is made, so no digit of the test scenes was seen in training. Sample i is a pure function of (split, seed, i).
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import SupportsIndex

import numpy as np
from PIL import Image
from sklearn import datasets

from dynllava_jax.data.conversation import IMAGE_TOKEN, TEMPLATES, render
from dynllava_jax.data.order import Part
from dynllava_jax.data.samples import Sample
from dynllava_jax.data.tokenizer import train_tokenizer

GRID, CELL = 7, 14
CANVAS = GRID * CELL
MIN_DIGITS, MAX_DIGITS = 6, 9
COLUMNS = 'ABCDEFG'
EMPTY = '-'  # an empty cell in the answer to READ
READ = 'Read the whole scene, row by row.'
LIST = 'List all cells.'
NAME = 'Name every digit.'
SPLITS = {'train': (0, 1297), 'validation': (1297, 1497), 'test': (1497, 1797)}  # of the shuffled scans

# Share of each question type among the short questions, and of long ones, in the test split.
SHORT_TASKS = {'which': 0.6, 'how_many': 0.2, 'largest': 0.2}
READ_SHARE = 0.15


@dataclasses.dataclass(frozen=True)
class Scene:
  """uint8[98, 98, 3] image and int[7, 7] digit per cell, -1 where there is none."""

  image: np.ndarray
  cells: np.ndarray


@functools.cache
def _scans(split: str) -> tuple[np.ndarray, np.ndarray]:
  """(float32[N, 8, 8] ink in [0, 1], int[N] label) of a split."""
  bunch = datasets.load_digits()
  order = np.random.default_rng(20412).permutation(len(bunch.target))
  start, end = SPLITS[split]
  picked = order[start:end]
  return (bunch.images[picked] / 16).astype(np.float32), bunch.target[picked]


@functools.cache
def _by_label(split: str) -> list[np.ndarray]:
  labels = _scans(split)[1]
  return [np.flatnonzero(labels == d) for d in range(10)]


@functools.cache
def _scaled(split: str, index: int, size: int) -> np.ndarray:
  """One scan as float32[size, size]."""
  scan = Image.fromarray(_scans(split)[0][index])
  return np.clip(np.asarray(scan.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)


def make_scene(split: str, rng: np.random.Generator) -> Scene:
  """Draws a scene. The largest digit is uniform over 2..9, so that it cannot be guessed."""
  count = rng.integers(MIN_DIGITS, MAX_DIGITS + 1)
  largest = rng.integers(2, 10)
  digits = rng.integers(0, largest + 1, count)
  digits[rng.integers(count)] = largest
  cells = np.full(GRID * GRID, -1)
  cells[rng.choice(GRID * GRID, count, replace=False)] = digits
  cells = cells.reshape(GRID, GRID)

  coarse = rng.normal(0, 16, (5, 5)).astype(np.float32)
  shade = np.asarray(Image.fromarray(coarse).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC))
  ground = 70 + 12 * rng.standard_normal((CANVAS, CANVAS), np.float32) + shade
  ink = np.zeros((CANVAS, CANVAS), np.float32)
  for row, column in np.argwhere(cells >= 0):
    size = rng.integers(11, CELL + 1)
    scan = _scaled(split, rng.choice(_by_label(split)[cells[row, column]]), size)
    top, left = np.array([row, column]) * CELL + rng.integers(0, CELL - size + 1, 2)
    ink[top : top + size, left : left + size] = scan
  paper, pen = rng.uniform(0.7, 1.1, 3), rng.uniform(190, 255, 3)
  image = ground[..., None] * paper * (1 - ink[..., None]) + pen * ink[..., None]
  return Scene(np.clip(image, 0, 255).astype(np.uint8), cells)


def cell_name(row: int, column: int) -> str:
  """As on a chess board: column letter and row number, `C5`."""
  return f'{COLUMNS[column]}{row + 1}'


def ask(task: str, scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
  """A question of the given type and its answer."""
  places = np.argwhere(scene.cells >= 0)
  present = scene.cells[scene.cells >= 0]
  if task == 'which':
    row, column = places[rng.integers(len(places))]
    return f'Which digit is at {cell_name(row, column)}?', str(scene.cells[row, column])
  if task == 'how_many':
    return 'How many digits are there?', str(len(present))
  if task == 'largest':
    return 'What is the largest digit?', str(present.max())
  if task == 'read':
    return READ, write_scene(scene.cells)
  if task == 'list':
    return LIST, ' '.join(EMPTY if c < 0 else str(c) for c in scene.cells.reshape(-1))
  if task == 'name':
    # In any order: each digit must be looked up by the name of its cell, as for `which`.
    return NAME, ', '.join(f'{cell_name(r, c)} {scene.cells[r, c]}' for r, c in rng.permutation(places))
  raise ValueError(f'unknown task {task!r}')


def write_scene(cells: np.ndarray) -> str:
  """The answer to `READ`: `row 1: - 3 - - 7 - - - row 2: ...`."""
  rows = (' '.join(EMPTY if c < 0 else str(c) for c in row) for row in cells)
  return ' '.join(f'row {i + 1}: {row}' for i, row in enumerate(rows))


def read_scene(text: str) -> dict[tuple[int, int], str]:
  """The inverse of `write_scene`, lenient: what stands at (row, column), empty cells left out."""
  found: dict[tuple[int, int], str] = {}
  for part in text.split('row ')[1:]:
    head, _, body = part.partition(':')
    if head.strip().isdigit():
      for column, entry in enumerate(body.split()):
        if entry != EMPTY:
          found[int(head), column + 1] = entry
  return found


def _turns(pairs: list[tuple[str, str]]) -> tuple[dict[str, str], ...]:
  turns = []
  for i, (question, answer) in enumerate(pairs):
    turns += [{'from': 'human', 'value': f'{IMAGE_TOKEN}\n{question}' if i == 0 else question}, {'from': 'gpt', 'value': answer}]
  return tuple(turns)


@dataclasses.dataclass(frozen=True)
class Mix:
  """What training conversations are made of.

  Attributes:
    listed: so many conversations at the beginning start with the plain list of all cells, which teaches to tell
      digits apart; a curriculum only if the source is read unshuffled.
    shares: of the others, by what they begin with: a caption that names every digit, the long answer, or neither.
    counted: chance of each counting question in a conversation that begins with neither; the rest of it is `which`.
  """

  listed: int
  shares: Mapping[str, float]
  counted: float


COUNTING = ('how_many', 'largest')
# A long answer has 60 supervised tokens, a short one 2: a larger share of long ones drowns the short. Of the short ones,
# `which` takes longest to learn from nothing; counting has to be learned again with a fifth of the image tokens.
FROM_NOTHING = Mix(listed=2400, shares={'name': 0.35, 'read': 0.1, '': 0.55}, counted=0.4)
INSTRUCT = Mix(listed=0, shares={'read': 0.3, '': 0.7}, counted=0.8)


class TrainingScenes:
  """Random-access source of training conversations, several questions each."""

  TURNS = {'list': 3, 'name': 4, 'read': 1, '': 6}  # questions by what a conversation begins with; 90 text tokens hold them

  def __init__(self, split: str, seed: int, mix: Mix = FROM_NOTHING, size: int = 1_000_000):
    """`size` is how many different scenes there are; none is stored."""
    self.split, self.seed, self.mix, self.size = split, seed, mix, size
    self.parts = (Part(0, size),)

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: SupportsIndex) -> Sample:
    index = int(index)
    rng = np.random.default_rng((self.seed, list(SPLITS).index(self.split), index))
    scene = make_scene(self.split, rng)
    shares = self.mix.shares
    first = 'list' if index < self.mix.listed else str(rng.choice(list(shares), p=list(shares.values())))
    pairs = dict([ask(first, scene, rng)] if first else [ask(t, scene, rng) for t in COUNTING if rng.random() < self.mix.counted])
    while len(pairs) < self.TURNS[first]:
      pairs.update([ask('which', scene, rng)])  # each question once
    pairs = list(pairs.items())
    if not first:
      pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    return Sample(f'digits/{self.split}/{index}', scene.image, _turns(pairs))


class Questions:
  """Random-access source of single questions with their answers, for evaluation."""

  def __init__(self, split: str, seed: int, size: int):
    self.split, self.seed, self.size = split, seed, size

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: SupportsIndex) -> Sample:
    rng = np.random.default_rng((self.seed, list(SPLITS).index(self.split), 1, int(index)))
    scene = make_scene(self.split, rng)
    task = 'read' if rng.random() < READ_SHARE else rng.choice(list(SHORT_TASKS), p=list(SHORT_TASKS.values()))
    return Sample(f'digits/{self.split}/question/{int(index)}', scene.image, _turns([ask(task, scene, rng)]), str(task))


@functools.cache
def tokenizer_model() -> bytes:
  """A SentencePiece model trained on the templated text of 400 conversations."""
  source = TrainingScenes('train', seed=0)
  style = TEMPLATES['plain_turns']
  indices = [*range(50), *range(source.mix.listed, source.mix.listed + 350)]
  texts = (' ' + render(source[i].conversations, style, '')[0] for i in indices)
  return train_tokenizer((part for text in texts for part in re.split(f'{IMAGE_TOKEN}\n|</s>', text) if part), vocab_size=430)
