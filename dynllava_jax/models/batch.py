"""What goes into the model and what comes out of it: prompts, traces, the output of training, and which text training judges.

Axes: B batch, S sequence, P image tokens, M kept ones, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.methods.training import Drawn
from dynllava_jax.models.clip_text import NO_SEGMENT
from dynllava_jax.models.llama import head_logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
  """A batch of right-padded sequences, laid out on the host.

  Attributes:
    tokens: int32[B, S], text ids; anything at the P positions of the image and in the padding.
    length: int32[B], real positions, image included.
    image_start: int32[B], position of the first image token, -1 for rows without image.
    seed: uint32[B], one number per row for whatever is drawn at random.
    instruct_start: int32[B], where the last instruction begins, behind the image; `length` where nothing is to be judged, as in
      rows without image. Only runs that judge instructions need it.
    question: int32[B, N, L], the first question in CLIP's tokens, begin and end among them, cut into segments of L and padded with
      0; segments that are not there hold -1. Only runs whose reducer matches patches and question need it.
  """

  tokens: jax.Array
  length: jax.Array
  image_start: jax.Array
  seed: jax.Array
  instruct_start: jax.Array | None = None
  question: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StageTrace:
  """What happened at the entry of one stage, and in it.

  Attributes:
    entry: float[B, S, D], hidden states before anything was removed, and stream: float[B, S', D], what goes on.
    kept_image: int32[B, M], image tokens that go on, ascending, counted from the image's start; those that new rows stand for
      are behind.
    positions: int32[B, S'], places in the full sequence of what goes on, and rotary: int32[B, S'], rotary positions.
    length: int32[B], real entries among them.
    unmerged: int32[B, N], row at each place that the layers attend over; None unless the reducer unmerges.
    attention: float32[B, N, P'], what the selector saw of it; None if it did not ask.
    of_selector: what else the selector shows to records, by name, and of_layers what the layers' pieces do, for each stack of the
      stage (`stacks`), stacked [L, ...].
  """

  entry: jax.Array
  stream: jax.Array
  kept_image: jax.Array
  positions: jax.Array
  rotary: jax.Array
  length: jax.Array
  attention: jax.Array | None = None
  of_selector: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  of_layers: tuple[dict[str, jax.Array], ...] = ()
  unmerged: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainInputs:
  """What training knows of a batch besides the prompt.

  Attributes:
    answer_start: int32[B], first position of the last answer, which ends at `prompt.length`.
    labels: int32[B, S], `IGNORE` where not supervised; only methods that cut in training, or that choose in answers, look at them.
    drawn: by the name of a `methods.training.Training`, what it drew.
  """

  answer_start: jax.Array
  labels: jax.Array | None = None
  drawn: dict[str, Drawn] = dataclasses.field(default_factory=dict)

  def of(self, training: str) -> Drawn:
    """What a part of the training drew; nothing if it did not."""
    return self.drawn.get(training, Drawn())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainOutput:
  """Output of `train_forward`.

  Attributes:
    hidden: float[B, S, D] after the final norm, and head: float[D, V]: what the loss makes logits of, some positions at a time.
      Without `head` the hidden states are the logits.
    image_logits: float[B, P, 2] and text_logits: float[B, S, 2], predictor outputs; None in a dense run.
    image_mask: float32[B, P], 0 or 1, 1 where there is no image; None in a dense run.
    text_mask: float32[B, S], 0 or 1, the sample for every position before any rule; None in a dense run.
    dense: bool[B], rows whose masks were not used; None in a dense run.
    policy: float32[B, S], the weight of every key from the dynamic stage on; None in a dense run.
    places: int32[B, S'], places in the full sequence of the rows of `hidden`, which are S' then, -1 for padding, in a run that is
      trained by gathers; None if all are there.
    kept_image: per stage of such a run, int32[B, M], the image tokens that entered it.
    chooses: bool[B, S], rows that choose among the image tokens in a run that is trained by choices; distance: float32[B, S], how
      far their scores are from the attention of the layers, and choice: float32[B, S, P], 0 or 1, where these are asked for.
    instruct_logits: float[B, S, 2] and instruct_mask: float32[B, S], the same of instructions; None where none are judged.
    seen: what else methods look at in their losses and records, by name.
  """

  hidden: jax.Array
  image_logits: jax.Array | None = None
  text_logits: jax.Array | None = None
  image_mask: jax.Array | None = None
  text_mask: jax.Array | None = None
  dense: jax.Array | None = None
  head: jax.Array | None = None
  instruct_logits: jax.Array | None = None
  instruct_mask: jax.Array | None = None
  policy: jax.Array | None = None
  places: jax.Array | None = None
  kept_image: tuple[jax.Array, ...] = ()
  chooses: jax.Array | None = None
  distance: jax.Array | None = None
  choice: jax.Array | None = None
  seen: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

  @property
  def logits(self) -> jax.Array:
    """float32[B, S, V], all of them at once."""
    return self.hidden if self.head is None else head_logits(self.hidden, self.head)


def question_segments(questions: Sequence[np.ndarray | None], length: int) -> np.ndarray:
  """`Prompt.question` of rows of CLIP tokens int[Q], None for nothing: int32[B, N, length], as many segments as the longest has.

  The number of segments is a power of two, so that few programs are compiled for whatever is asked.
  """
  segments = max(-(-len(ids) // length) for ids in (*questions, ()) if ids is not None)
  rows = np.full((len(questions), 1 << max(segments - 1, 0).bit_length(), length), NO_SEGMENT, np.int32)
  for row, ids in zip(rows, questions):
    if ids is not None:
      used = row[: -(-len(ids) // length)]
      used[...] = np.pad(ids, (0, used.size - len(ids))).reshape(used.shape)
  return rows


@dataclasses.dataclass(frozen=True)
class InstructRule:
  """What training judges of an instruction, which ends where the answer starts.

  Attributes:
    min_len: shorter ones are kept whole.
    last: whether the last token is judged too; generation always keeps it.
  """

  min_len: int = 0
  last: bool = False

  def mask(self, positions: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    """bool[B, S] of int32[B, S] `positions`: those judged of instructions from int32[B] `start` to `end`."""
    inside = (positions >= start[:, None]) & (positions < end[:, None] - (not self.last))
    return inside & (end - start >= self.min_len)[:, None]


def instruct_start_of(prompt: Prompt) -> jax.Array:
  """int32[B], `length` without image; ValueError if the prompt does not say where its instructions begin."""
  if prompt.instruct_start is None:
    raise ValueError('prompt.instruct_start: None, but this run judges instructions; say where the last one of each row begins')
  return jnp.where(prompt.image_start >= 0, prompt.instruct_start, prompt.length)


def answer_mask(positions: jax.Array, length: jax.Array, answer_start: jax.Array, min_answer_len: int) -> jax.Array:
  """bool[B, S]: positions of last answers long enough (>= min_answer_len tokens) to be judged."""
  long_enough = (length - answer_start) >= min_answer_len
  inside = (positions >= answer_start[:, None]) & (positions < length[:, None])
  return inside & long_enough[:, None]
