"""Recomputes a recorded training step of mixture of depths: choices, logits, loss, gradients."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import IGNORE, IMAGE_ID, Objective, Stage
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import (
  EXACT,
  GRADIENT,
  LOGITS,
  LOSS,
  Quantity,
  compare,
  in_range,
  prompt_from_ids,
  token_rows,
)
from dynllava_jax.convert.records.bases import PIXELS, Base, Record, picture
from dynllava_jax.convert.records.cut_training import SPARE, USED, full_labels
from dynllava_jax.convert.records.decoded import Group, asked, image_of
from dynllava_jax.convert.records.training import compare_gradients
from dynllava_jax.losses import training_losses
from dynllava_jax.models import trained
from dynllava_jax.models.batch import TrainInputs
from dynllava_jax.models.dynllava import DynLlava
from dynllava_jax.models.params import cut_params, join_params

AT = 'train/'
KEPT = re.compile(r'kept_image_index_(\d+)_(\d+)')
ROUTER = re.compile(r'grad/router_(\d+)')


@dataclasses.dataclass(frozen=True)
class Step:
  """Rows of one step.

  Attributes:
    ids: int[B, L] with -200 for the image; valid: bool[B, L].
    labels: int[B, L], or [B, S] of the expanded rows.
    images: int[B], the image of each row in the base's case.
  """

  ids: np.ndarray
  valid: np.ndarray
  labels: np.ndarray
  images: np.ndarray


def verify_training(record: Record, at: str, step: Step, base: Base, stages: tuple[Stage, ...], alone: bool) -> Iterator[Quantity]:
  """Every quantity of the step recorded below `at`: its rows as they are, and with a text-only row without labels and padding."""
  for others in (False, True) if alone else (True,):
    yield from _verify(record, at, with_text_only(step) if others else step, base, stages, SPARE if others else 0)


def recorded_step(record: Record, base: Base) -> Step:
  """The mixed batch of p-MoD's record."""
  vocab = base.info.model.llama.vocab_size
  ids, valid = token_rows(record.at, record.case, AT, None, vocab)
  labels = in_range(record.at, f'{AT}labels', record.given(f'{AT}labels', ids.shape, whole=True), IGNORE, vocab)
  return Step(ids, valid, labels, np.maximum(record.given(f'{AT}image_index', (len(ids),), whole=True), 0))


def prompt_step(record: Record, group: Group, base: Base) -> Step:
  """A prompt of VideoLLM-MoD's record, whose loss is that of its tokens after the first one behind the image."""
  ids = asked(record, base, group).ids[None]
  where = np.flatnonzero(ids[0] == IMAGE_ID)
  if not len(where):
    raise ConversionError(f'{record.at}: {group.at}loss is of a prompt without image, expected one with it')
  behind = np.arange(ids.shape[1]) > where[0] + 1
  return Step(ids, np.ones(ids.shape, bool), np.where(behind, ids, IGNORE), np.asarray([image_of(record, group.at, group)]))


def with_text_only(step: Step) -> Step:
  """Another row, of the first one's text backwards, without image and without labels."""
  text = step.ids[0][step.valid[0] & (step.ids[0] != IMAGE_ID)][::-1]
  row = np.zeros_like(step.ids[:1])
  row[0, : len(text)] = text
  valid = np.arange(row.shape[1])[None] < len(text)
  join = lambda a, b: np.concatenate([a, b])
  return Step(join(step.ids, row), join(step.valid, valid), join(step.labels, np.full_like(row, IGNORE)), np.append(step.images, 0))


def _verify(record: Record, at: str, step: Step, base: Base, stages: tuple[Stage, ...], spare: int) -> Iterator[Quantity]:
  where = 'in a batch: ' if spare else ''
  model = DynLlava(dataclasses.replace(base.info.model, predictor=None), stages)
  params = cut_params({name: base.params[name] for name in (*USED, 'routers')}, stages)
  prompt = prompt_from_ids(step.ids, model.num_image, step.valid, spare)
  labels = full_labels(step.ids, step.labels, step.valid, model.num_image, prompt.tokens.shape[1])
  pixels = jnp.stack([picture(base.at, base.case, PIXELS, int(i), base.info.model.vision.image_size) for i in step.images])

  def losses(params):
    inputs = TrainInputs(prompt.length, labels)
    image = model.apply({'params': params}, pixels, method='encode_images')
    out = model.apply({'params': params}, prompt, image, inputs, method='train_forward')
    return training_losses(out, prompt, inputs, Objective(), trained.parts(model.cfg, stages)).total, out

  (loss, out), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(params)
  gradients = join_params(gradients)
  yield compare(f'{where}{at}loss', loss, record.array(f'{at}loss'), LOSS, relative=True)
  for key in (key for key in record.case if key.startswith(at)):
    name, recorded = key.removeprefix(at), record.case[key]
    kept, row = KEPT.fullmatch(name), int(name.rpartition('_')[2]) if name.rpartition('_')[2].isdecimal() else len(step.ids)
    if kept and f'passes_{kept[1]}' in out.seen and row < len(step.ids):
      yield compare(where + key, np.flatnonzero(out.seen[f'passes_{kept[1]}'][row]), recorded, EXACT)
    elif name.startswith('answer_logits_') and row < len(step.ids):
      before = np.flatnonzero(np.asarray(labels)[row, 1:] != IGNORE)
      yield compare(where + key, np.asarray(out.logits)[row, before], recorded, LOGITS)
    elif router := ROUTER.fullmatch(name):
      kernel = gradients['routers']['layers']['kernel']
      if int(router[1]) >= len(kernel):
        raise ConversionError(f'{record.at}: array {key!r} is about a layer that the model does not have')
      ours = kernel[int(router[1])]
      yield compare(where + key, ours, recorded, GRADIENT, relative=True)
  others = {key: value for key, value in record.case.items() if not ROUTER.fullmatch(key.removeprefix(at))}
  for quantity in compare_gradients(base.info.model, record.at, others, f'{at}grad/', gradients):
    yield dataclasses.replace(quantity, name=where + quantity.name)


def steps_of(record: Record, groups: Sequence[Group], base: Base) -> Iterator[tuple[str, Step]]:
  """The steps of a config, each with the beginning of its arrays' names."""
  if f'{AT}loss' in record.case:
    yield AT, recorded_step(record, base)
  for group in groups:
    if f'{group.at}loss' in record.case:
      yield group.at, prompt_step(record, group, base)
