"""Steps that went wrong, named with their samples: labels that cannot be right, a loss that is no number, a spike.

    WORKDIR/bad_steps/STEP.npz    the batch, for `python -m dynllava_jax.data.inspect --batch`

Labels are looked at before a step. Loss and gradient norm stay on the devices until the run saves or logs; a run that skips bad
steps has left weights and moments as they were by then (`step.judge`).
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dynllava_jax.config import IGNORE, IMAGE_ID, TrainConfig
from dynllava_jax.data import conversation
from dynllava_jax.data.batches import Batch
from dynllava_jax.data.pipeline import LayOut, training_batches
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.saved_batch import save_batch
from dynllava_jax.data.sources import TrainingData
from dynllava_jax.display import printable

FOLDER = 'bad_steps'
NAMED = 8  # ids in a message
MOST_SKIPPED = 20  # bad steps in a row; then something else than a batch is wrong
WATCHED = ('loss', 'grad_norm', 'bad_step')  # and norms by group


class Watch:
  """What a run knows of its last steps."""

  def __init__(
    self, cfg: TrainConfig, training: TrainingData, layout: LayOut, workdir: pathlib.Path, say: Callable[[str], None], rows: slice
  ):
    """`rows`: of a global batch, those of this process; `say`: tells people."""
    self._cfg, self._training, self._layout, self._workdir, self._say, self._rows = cfg, training, layout, workdir, say, rows
    self._unseen: list[tuple[int, Mapping[str, jax.Array]]] = []
    self._in_a_row = 0
    self._captions = conversation.template(cfg.data.conversation).caption

  def check(self, batch: Batch, step: int) -> None:
    """DataError, with the sample, for a batch that must not be trained on: tokens or labels that cannot be right."""
    check_tokens(batch, self._cfg.model.llama.vocab_size, step)
    if found := wrong_labels(batch, self._layout.num_image, self._captions):
      row, what = found
      raise DataError(f'step {step}, sample {self._ids(step)[self._rows][row]}: {what}')

  def saw(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Notes a step that is being computed."""
    kept = {name: value for name, value in metrics.items() if name in WATCHED or name.startswith('grad_norm/')}
    self._unseen.append((step, kept))

  def look(self) -> None:
    """Waits for all steps since the last look.

    Raises:
      FloatingPointError: for the first bad one, unless the run skips such; or too many were skipped in a row.
    """
    seen, self._unseen = jax.device_get(self._unseen), []
    for step, values in seen:
      if not is_bad(values):
        self._in_a_row = 0
        continue
      self._in_a_row += 1
      message = f'step {step}: {described(values)}{self._left(step, values)}'
      if self._cfg.on_bad_step == 'stop':
        raise FloatingPointError(
          f'{message}; the last saved step is intact. Lower the learning rate, mend the samples, or leave such steps out with '
          '--config.on_bad_step=skip'
        )
      self._say(f'{message}; skipped')
      if self._in_a_row == MOST_SKIPPED:
        raise FloatingPointError(
          f'{MOST_SKIPPED} steps in a row up to {step} were bad and skipped, the last one with {described(values)}; the last saved '
          'step is intact. It is not the batches: lower the learning rate, or look at the weights'
        )

  def _ids(self, step: int) -> list[str]:
    return [self._training.source[i].id for i in self._training.order.batch(step - 1)]

  def _left(self, step: int, values: Mapping[str, Any]) -> str:
    """Samples and batch of a step, as text; the first host writes the batch, made again."""
    ids = self._ids(step)
    shown = ', '.join(map(printable, ids[:NAMED])) + (', ...' if len(ids) > NAMED else '')
    path = self._workdir / FOLDER / f'{step}.npz'
    if jax.process_index() == 0:
      alone = dataclasses.replace(self._layout, data=dataclasses.replace(self._layout.data, workers=0))
      made = training_batches(self._training, alone, batch_size=self._cfg.batch_size, step=step - 1)
      with contextlib.closing(made) as batches:
        numbers = {name: float(value) for name, value in values.items()}
        told = {name: value if np.isfinite(value) else str(value) for name, value in numbers.items()}
        save_batch(path, next(batches), ids, alone.tokenizer_files, alone.num_image, step=step, metrics=told)
    return f'; samples {shown}; `python -m dynllava_jax.data.inspect --batch={path}` shows the batch'


def is_bad(values: Mapping[str, float]) -> bool:
  """Whether a step's numbers are such that it must not count."""
  return not np.isfinite([values['loss'], values['grad_norm']]).all() or values.get('bad_step', 0) > 0


def described(values: Mapping[str, float]) -> str:
  """Loss and gradient norms of a step."""
  norms = ', '.join(f'{n.partition("/")[2]} {float(v):.3g}' for n, v in values.items() if n.startswith('grad_norm/'))
  return f'the loss is {float(values["loss"]):.4g}, the gradient norm {float(values["grad_norm"]):.4g} ({norms})'


def check_tokens(batch: Batch, vocab_size: int, step: int) -> None:
  """DataError if a batch holds tokens that the model has not, which would read another token's weights without a word."""
  for ids, apart in ((batch.tokens, IMAGE_ID), (batch.labels, IGNORE)):
    if wrong := ids[(ids != apart) & ((ids < 0) | (ids >= vocab_size))].tolist():
      raise DataError(
        f'step {step}: token {wrong[0]} in the batch, the model has {vocab_size}; is the tokenizer the one of the weights? Set '
        'config.model.llama.vocab_size, or give the tokenizer that belongs to them'
      )


def wrong_labels(batch: Batch, num_image: int, captions: bool) -> tuple[int, str] | None:
  """The first row whose labels cannot be right, and what is wrong with them.

  Args:
    batch: on the host.
    num_image: positions that an image takes.
    captions: the template supervises all text, as LLaVA's first stage does.
  """
  at = np.arange(batch.tokens.shape[1])
  start = batch.image_start[:, None]
  image = (start >= 0) & (at >= start) & (at < start + num_image)
  text = (at < batch.length[:, None]) & ~image
  supervised = batch.labels != IGNORE
  whole = (text & ~supervised).sum(1) <= 1  # nothing but the token that begins a sequence is left out
  for wrong, what in (
    (~supervised[:, 1:].any(1), 'no token is supervised, so there is nothing to learn; does it end with an answer?'),
    ((supervised & ~text).any(1), 'labels on image positions or padding; the mask lies beside the text'),
    ((supervised & (batch.labels != batch.tokens)).any(1), 'labels are not the tokens at their places; the mask is shifted'),
    (whole & (not captions), 'every token is supervised, the question too; the mask of the answers is missing'),
  ):
    if wrong.any():
      return int(np.argmax(wrong)), what
  return None
