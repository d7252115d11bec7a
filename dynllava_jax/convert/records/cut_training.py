"""Recomputes a recorded training step of a method that cuts the sequence in training: sets, labels, logits, loss, gradients."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import IGNORE, IMAGE_ID, Objective, Stage
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import EXACT, LOGITS, LOSS, Quantity, compare, prompt_from_ids
from dynllava_jax.convert.records.bases import Base, Record
from dynllava_jax.convert.records.runs import Group
from dynllava_jax.convert.records.training import compare_gradients
from dynllava_jax.losses import remaining, training_losses
from dynllava_jax.models import trained
from dynllava_jax.models.batch import Prompt, TrainInputs, TrainOutput
from dynllava_jax.models.dynllava import DynLlava
from dynllava_jax.models.params import cut_params, join_params

SPARE = 3  # positions of padding behind the rows of a batch
USED = ('vision', 'projector', 'llama')


def training_groups(record: Record) -> list[Group]:
  """The groups `BASE/CONFIG/` of a record that hold a training step: those with labels, by base and config."""
  names = record.meta.get('base_models') or {'': None}
  found = []
  for at in (key.removesuffix('labels') for key in record.case if key.endswith('/labels')):
    base = next((name for name in names if name and at.startswith(f'{name}/')), '')
    found.append(Group(base, at.removeprefix(base).strip('/'), ''))
  return found


def verify_training(record: Record, group: Group, base: Base, stages: tuple[Stage, ...], alone: bool) -> Iterator[Quantity]:
  """Every quantity of a recorded step: its rows as they are, and with a text-only row without labels and padding behind.

  Args:
    record, group, base: what is compared.
    stages: how it is run.
    alone: also without other rows.
  """
  if alone:
    yield from _step(record, group, base, stages, others=False)
  yield from _step(record, group, base, stages, others=True)


def _step(record: Record, group: Group, base: Base, stages: tuple[Stage, ...], others: bool) -> Iterator[Quantity]:
  where, at = 'in a batch: ' if others else '', group.at
  array = lambda name: record.array(f'{at}{name}')
  model = DynLlava(dataclasses.replace(base.info.model, predictor=None), stages)
  params = cut_params({name: base.params[name] for name in USED}, stages)
  prompt, labels, image = _batch(record, group, base, model.num_image, others)

  def losses(params: dict[str, Any]):
    inputs = TrainInputs(prompt.length, labels)
    out = model.apply({'params': params}, prompt, image, inputs, method='train_forward')
    return training_losses(out, prompt, inputs, Objective(), trained.parts(model.cfg, stages)).total, out

  (loss, out), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(params)
  rows = len(array('labels'))
  for i, stage in enumerate(stages):
    if (name := f'kept_image_index_{stage.start}') in {k.removeprefix(at) for k in record.case}:
      yield compare(where + at + name, out.kept_image[i][:rows], array(name), EXACT)
  yield from _rows(record, group, prompt, labels, out, where)
  yield compare(f'{where}{at}loss', loss, array('loss'), LOSS, relative=True)
  for quantity in compare_gradients(base.info.model, record.case, f'{at}grad/', join_params(gradients)):
    yield dataclasses.replace(quantity, name=where + quantity.name)


def _batch(record: Record, group: Group, base: Base, num_image: int, others: bool) -> tuple[Prompt, jax.Array, jax.Array]:
  """(prompts, labels int32[B, S] of the full sequences, image tokens float[B, P, D])."""
  ids, labels = (record.array(f'{group.at}{name}') for name in ('input_ids', 'labels'))
  valid = np.asarray(record.case.get(f'{group.at}attention_mask', np.ones(ids.shape)), bool)
  projected = base.case.get('vision/projected')
  numbers = np.asarray(record.case.get(f'{group.at}image_index', np.arange(len(ids)))).reshape(-1)
  if projected is None or numbers.max() >= len(projected):
    raise ConversionError(f"{record.folder}: {group.at} needs images 0 to {numbers.max()} of vision/projected in its base's case")
  if others:  # the last text of another row, without image
    text = ids[0][ids[0] != IMAGE_ID][::-1]
    more = np.zeros((1, ids.shape[1]), ids.dtype)
    more[0, : len(text)] = text
    ids, labels = np.concatenate([ids, more]), np.concatenate([labels, np.full_like(more, IGNORE)])
    valid, numbers = np.concatenate([valid, np.arange(ids.shape[1])[None] < len(text)]), np.append(numbers, 0)
  prompt = prompt_from_ids(ids, num_image, valid, SPARE if others else 0)
  full = np.full(prompt.tokens.shape, IGNORE, np.int32)
  for row, (tokens, own, ok) in enumerate(zip(ids, labels, valid)):
    places = np.cumsum(np.where(tokens[ok] == IMAGE_ID, num_image, 1)) - 1
    text = tokens[ok] != IMAGE_ID
    full[row, places[text]] = own[ok][text]
  return prompt, jnp.asarray(full), jnp.asarray(projected[numbers])


def _rows(record: Record, group: Group, prompt: Prompt, labels: jax.Array, out: TrainOutput, where: str) -> Iterator[Quantity]:
  """What is left of each recorded row: its labels, and its logits behind the image."""
  reduced, tail = (record.case.get(group.at + name) for name in ('reduced_labels', 'logits_tail'))
  ours, left = np.asarray(remaining(labels, out.places)), np.asarray((out.places >= 0).sum(-1))
  for row in range(len(record.array(f'{group.at}labels'))):
    if reduced is not None:
      yield compare(f'{where}{group.at}reduced_labels[{row}]', ours[row, : left[row]], reduced[row, : left[row]], EXACT)
    if tail is not None:
      first = int(prompt.image_start[row]) + out.kept_image[-1].shape[1]
      number = left[row] - first
      yield compare(f'{where}{group.at}logits_tail[{row}]', out.logits[row, first : first + number], tail[row, :number], LOGITS)
