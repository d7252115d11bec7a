"""Recomputes a recorded training step of a method that cuts the sequence in training: sets, labels, logits, loss, gradients."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import IGNORE, IMAGE_ID, Objective, Stage
from dynllava_jax.convert.records.base import EXACT, LOGITS, LOSS, Quantity, compare, given, in_range, prompt_from_ids, token_rows
from dynllava_jax.convert.records.bases import Base, Record
from dynllava_jax.convert.records.decoded import PROJECTED, Group
from dynllava_jax.convert.records.described import GROUP
from dynllava_jax.convert.records.training import compare_gradients, row_of
from dynllava_jax.losses import remaining, training_losses
from dynllava_jax.models import trained
from dynllava_jax.models.batch import Prompt, TrainInputs, TrainOutput
from dynllava_jax.models.dynllava import DynLlava
from dynllava_jax.models.params import cut_params, join_params

SPARE = 3  # positions of padding behind the rows of a batch
USED = ('vision', 'projector', 'llama')


def training_groups(record: Record) -> list[Group]:
  """The groups `BASE/CONFIG/` of a record that hold a training step: those with labels, by base and config."""
  names = record.setting('base_models', kind=GROUP, default={'': None})
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
  rows = len(record.array(f'{at}input_ids'))
  for i, stage in enumerate(stages):
    if (name := f'kept_image_index_{stage.start}') in {k.removeprefix(at) for k in record.case}:
      yield compare(where + at + name, out.kept_image[i][:rows], array(name), EXACT)
  yield from _rows(record, group, prompt, labels, out, where)
  yield compare(f'{where}{at}loss', loss, array('loss'), LOSS, relative=True)
  for quantity in compare_gradients(base.info.model, record.at, record.case, f'{at}grad/', join_params(gradients)):
    yield dataclasses.replace(quantity, name=where + quantity.name)


def _batch(record: Record, group: Group, base: Base, num_image: int, others: bool) -> tuple[Prompt, jax.Array, jax.Array]:
  """(prompts, labels int32[B, S] of the full sequences, image tokens float[B, P, D])."""
  llama, at = base.info.model.llama, group.at
  ids, valid = token_rows(record.at, record.case, at, None, llama.vocab_size)
  labels = in_range(record.at, f'{at}labels', record.given(f'{at}labels', ids.shape, whole=True), IGNORE, llama.vocab_size)
  projected = given(base.at, base.case, PROJECTED, (None, num_image, llama.hidden_size))
  numbers = np.arange(len(ids))
  if f'{at}image_index' in record.case:
    numbers = record.given(f'{at}image_index', (len(ids),), whole=True)
  in_range(record.at, f'{at}image_index', numbers, 0, len(projected))
  if others:  # the last text of another row, without image
    text = ids[0][ids[0] != IMAGE_ID][::-1]
    more = np.zeros((1, ids.shape[1]), ids.dtype)
    more[0, : len(text)] = text
    ids, labels = np.concatenate([ids, more]), np.concatenate([labels, np.full_like(more, IGNORE)])
    valid, numbers = np.concatenate([valid, np.arange(ids.shape[1])[None] < len(text)]), np.append(numbers, 0)
  prompt = prompt_from_ids(ids, num_image, valid, SPARE if others else 0)
  return prompt, full_labels(ids, labels, valid, num_image, prompt.tokens.shape[1]), jnp.asarray(projected[numbers])


def full_labels(ids: np.ndarray, labels: np.ndarray, valid: np.ndarray, num_image: int, size: int) -> jax.Array:
  """Labels int32[B, size] of rows in which `num_image` tokens stand for each -200 of int[B, L] `ids`; `valid`: real entries."""
  full = np.full((len(ids), size), IGNORE, np.int32)
  for row, (tokens, own, ok) in enumerate(zip(ids, labels, valid)):
    places = np.cumsum(np.where(tokens[ok] == IMAGE_ID, num_image, 1)) - 1
    text = tokens[ok] != IMAGE_ID
    full[row, places[text]] = own[ok][text]
  return jnp.asarray(full)


def _rows(record: Record, group: Group, prompt: Prompt, labels: jax.Array, out: TrainOutput, where: str) -> Iterator[Quantity]:
  """What is left of each recorded row: its labels, and its logits behind the image."""
  reduced, tail = (record.case.get(group.at + name) for name in ('reduced_labels', 'logits_tail'))
  ours, left = np.asarray(remaining(labels, out.places)), np.asarray((out.places >= 0).sum(-1))
  rows = len(record.array(f'{group.at}labels'))
  ragged = lambda name, row, count: row_of(record.at, record.case, f'{group.at}{name}', (rows, row), count)
  for row in range(rows):
    if reduced is not None:
      theirs = ragged('reduced_labels', row, left[row])
      yield compare(f'{where}{group.at}reduced_labels[{row}]', ours[row, : left[row]], theirs, EXACT)
    if tail is not None:
      first = int(prompt.image_start[row]) + out.kept_image[-1].shape[1]
      number = left[row] - first
      theirs = ragged('logits_tail', row, number)
      yield compare(f'{where}{group.at}logits_tail[{row}]', out.logits[row, first : first + number], theirs, LOGITS)
