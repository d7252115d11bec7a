"""What a model did inside while it answered one question, at several budgets of image tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import methods
from dynllava_jax.evals.benchmarks.base import Question
from dynllava_jax.evals.layout import Layout, Loaded
from dynllava_jax.generate import Generator
from dynllava_jax.models.lora import as_variables
from dynllava_jax.ops import layout
from dynllava_jax.ops.images import normalize
from dynllava_jax.ops.selection import keep_margin
from dynllava_jax.serving import growth

SETTING = '--text_lengths'


@dataclasses.dataclass(frozen=True)
class Answer:
  """One answer.

  Attributes:
    name: of the way the model was run.
    text: the words; tokens: ids of all T of them, the end included.
    kept: bool[T - 1], whether the gate kept each token that was fed, and margin: float32[T - 1], by how much; inf where none is.
    kept_image: int32[M], patches behind the last cut; empty without a picture.
    slots: int[T, stages], slots of keys and values in use, over the layers of each stage, before each token is fed.
  """

  name: str
  text: str
  tokens: np.ndarray
  kept: np.ndarray
  margin: np.ndarray
  kept_image: np.ndarray
  slots: np.ndarray

  @property
  def meta(self) -> dict[str, Any]:
    """As answer files have it, for `evals.figures`."""
    kept = ''.join('01'[int(k)] for k in self.kept)
    return dict(tokens=self.tokens.tolist(), kept=kept, given_up=[], kept_image=self.kept_image.tolist(), evicted=0)


@dataclasses.dataclass(frozen=True)
class Seen:
  """A question, its answers by budget, and `heat` float32[P], what the predictor says of each patch; None if there is none."""

  question: Question
  answers: tuple[Answer, ...]
  heat: np.ndarray | None


def look(question: Question, ways: Mapping[str, tuple[Loaded, Generator]], text_lengths: Sequence[int], seed: int = 0) -> Seen:
  """Asks a question in several ways.

  Args:
    question: what is asked.
    ways: by name, how the model is run.
    text_lengths: text buckets.
    seed: of what is drawn by chance.

  Raises:
    DataError: it cannot be asked.
  """
  answers, heat = [], None
  for name, (loaded, generator) in ways.items():
    rows = Layout(loaded, [question], text_lengths, 0, SETTING).rows([0]).seeded(seed)
    out = jax.device_get(generator(rows.prompt, rows.pixels))
    if not out.finite[0]:
      raise FloatingPointError(f'the logits of {loaded.path} are not finite; look at the weights, or compute in float32')
    length = int(out.length[0])
    kept, margin = out.kept[0, : length - 1], out.margin[0, : length - 1]
    image = loaded.num_image if question.image is not None else 0
    text = int(rows.prompt.length[0]) - image
    slots = [growth.slots(loaded.model, loaded.stages, text, image, fed, int(kept[:fed].sum())) for fed in range(length)]
    kept_image = out.kept_image[-1][0] if image else np.zeros(0, np.int32)
    tokens = out.tokens[0, :length]
    answers.append(Answer(name, loaded.tokenizer.decode(tokens), tokens, kept, margin, kept_image, np.asarray(slots)))
    if heat is None and image and any(s.selector == 'dynamic' for s in loaded.stages):
      heat = np.asarray(image_margins(generator, rows.prompt, rows.pixels))[0]
  return Seen(question, tuple(answers), heat)


def image_margins(generator: Generator, prompt: Any, pixels: np.ndarray) -> jax.Array:
  """float32[B, P]: keep minus drop logit that the predictor gives each image token that reaches it."""
  model = generator.model
  index = next(i for i, s in enumerate(model.stages) if s.selector == 'dynamic')
  reached = methods.stage_image_tokens(model.stages, model.num_image)[index - 1]

  @jax.jit
  def margins(params):
    apply = lambda *args, method: model.apply(as_variables(params, None, model.stages, None), *args, method=method)
    image = apply(normalize(pixels, model.cfg.vision), method='reduce_images')
    _, traces, _ = apply(prompt, image.tokens, generator.spec, image.group, method='prefill')
    hidden = layout.take_image_rows(traces[index].entry, prompt.image_start, reached)
    return keep_margin(apply(hidden, method=lambda module, x: module.image_predictor(x))).astype(jnp.float32)

  return margins(generator.params)
