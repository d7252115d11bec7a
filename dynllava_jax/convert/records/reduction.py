"""Runs a reducer, and a decoder behind it, on recorded prompts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import methods
from dynllava_jax.config import DENSE, Piece, Stage
from dynllava_jax.convert.records.bases import Base, Sample
from dynllava_jax.convert.records.runs import Answer, Asked, Runner
from dynllava_jax.methods.base import TowerOutput
from dynllava_jax.models.batch import question_segments

Project = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Row:
  """What the reducer saw and made of a prompt, by the names of the record, and what the decoder answered."""

  seen: dict[str, np.ndarray]
  answer: Answer


class Reduction:
  """One model, reducer and stage list, run on recorded prompts."""

  def __init__(
    self,
    base: Base,
    reducer: Piece,
    arrays: Callable[[TowerOutput, Project, Any], dict[str, jax.Array]] = lambda tower, project, options: {},
    stages: tuple[Stage, ...] = DENSE,
  ):
    """Cuts the base's parameters; ConfigError if the base cannot be run so."""
    methods.check_run(base.info.model, stages, reducer)
    self.decoder = Runner(base.info.model, base.params, stages, reducer)
    options = methods.options_of(reducer, 'reducer')

    def look(pixels, question=None):
      apply = lambda method: self.decoder.model.apply({'params': self.decoder.params}, pixels, question, method=method)
      reduced = apply('reduce_images')
      made = {'kept_image_index': reduced.index, 'projected': reduced.tokens}
      return reduced, made | apply(lambda model, *seen: arrays(model.look(*seen), model.projector, options))

    self.look = jax.jit(look)

  def pixels(self, prompts: list[Sample]) -> jax.Array:
    """float32[B, R, R, 3], zeros for prompts without image."""
    blank = np.zeros((self.decoder.model.cfg.vision.image_size,) * 2 + (3,), np.float32)
    return jnp.asarray(np.stack([blank if p.pixels is None else p.pixels for p in prompts]))

  def questions(self, prompts: list[Sample]) -> np.ndarray | None:
    """What is asked, see `Prompt.question`; None if nothing of it was recorded."""
    text = self.decoder.model.cfg.clip_text
    return question_segments([p.question for p in prompts], text.num_positions) if text else None

  def tower(self, prompts: list[Sample]) -> TowerOutput:
    """What the tower gives to the reducer."""
    apply = jax.jit(lambda pixels: self.decoder.model.apply({'params': self.decoder.params}, pixels, method='look'))
    return apply(self.pixels(prompts))

  def __call__(self, prompts: list[Sample], steps: list[int]) -> list[Row]:
    """What becomes of each prompt, and `steps` tokens after it; one row per number of steps."""
    reduced, seen = jax.device_get(self.look(self.pixels(prompts), self.questions(prompts)))
    groups = [None] * len(prompts) if reduced.group is None else reduced.group
    answers = self.decoder.answer([Asked(p.ids, *of_image) for p, *of_image in zip(prompts, reduced.tokens, groups)], max(steps))
    return [Row({name: array[i] for name, array in seen.items()}, answer) for i, (answer, _) in enumerate(zip(answers, steps))]
