"""Recomputes a recorded training step of a Dynamic Pyramid Network with the recorded draws: labels, logits, losses, gradients."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import IGNORE, IMAGE_ID, ModelConfig, Objective, PyramidConfig, PyramidTraining, Stage
from dynllava_jax.convert.records.base import EXACT, LOGITS, LOSS, Quantity, compare, in_range, prompt_from_ids
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.cut_training import SPARE, full_labels
from dynllava_jax.convert.records.described import NUMBER
from dynllava_jax.convert.records.training import compare_gradients, row_of
from dynllava_jax.losses import remaining, training_losses
from dynllava_jax.methods.training import Drawn
from dynllava_jax.models import trained, trained_routes
from dynllava_jax.models.batch import TrainInputs
from dynllava_jax.models.dynllava import DynLlava
from dynllava_jax.models.params import cut_params, join_params

AT = 'train/'
PROBABILITY = 1e-5
OBJECTIVE = {'weight': 'routing_loss_weight', 'target': 'hinge_target', 'fewest': 'min_tokens_train'}


def verify_training(record: Record, model: ModelConfig, params: dict[str, Any], alone: bool) -> Iterator[Quantity]:
  """Every quantity of the step: its rows as they are, and with a text-only row without labels and padding behind."""
  for others in (False, True) if alone else (True,):
    yield from _verify(record, model, params, others)


def accepted_noise(record: Record, cfg: PyramidConfig, rows: int, recorded: int) -> np.ndarray:
  """float32[rows, K, E], the noise of the draw that was taken; zeros for rows beyond the `recorded` ones."""
  layers, kernels = len(cfg.layers), max(map(len, cfg.kernels))
  noise = record.given(f'{AT}gumbel', (layers, recorded, None, kernels))
  draws = in_range(record.at, f'{AT}draws', record.given(f'{AT}draws', (recorded, layers), whole=True), 0, noise.shape[2] + 1)
  taken = np.zeros((rows, layers, kernels), np.float32)
  for row, of_layers in enumerate(draws):
    for depth, number in enumerate(of_layers):
      taken[row, depth] = noise[depth, row, max(number - 1, 0)]
  return taken


def _verify(record: Record, cfg: ModelConfig, params: dict[str, Any], others: bool) -> Iterator[Quantity]:
  where, array = 'in a batch: ' if others else '', lambda name: record.array(f'{AT}{name}')
  vocab, num_image = cfg.llama.vocab_size, cfg.num_image_tokens
  ids = record.given('ids', (None, None), whole=True)
  in_range(record.at, 'ids', ids[ids != IMAGE_ID], 0, vocab)
  labels = in_range(record.at, 'labels', record.given('labels', ids.shape, whole=True), IGNORE, vocab)
  image = record.given('image_features', (len(ids), num_image, cfg.llama.hidden_size))
  valid = np.arange(ids.shape[1]) < ids.shape[1] - np.argmax(ids[:, ::-1] != 0, axis=1)[:, None]
  rows = len(ids)
  if others:
    text = ids[0][ids[0] != IMAGE_ID][::-1]
    more = np.zeros_like(ids[:1])
    more[0, : len(text)] = text
    ids, labels = np.concatenate([ids, more]), np.concatenate([labels, np.full_like(more, IGNORE)])
    valid, image = np.concatenate([valid, np.arange(ids.shape[1])[None] < len(text)]), np.concatenate([image, image[:1]])
  stages = (Stage(), *(Stage(start=layer, selector='dpn_routed') for layer in cfg.dpn.layers))
  model = DynLlava(cfg, stages)
  prompt = prompt_from_ids(ids, model.num_image, valid, SPARE if others else 0)
  full = full_labels(ids, labels, valid, model.num_image, prompt.tokens.shape[1])
  given = {ours: record.setting('config', theirs, kind=NUMBER) for ours, theirs in OBJECTIVE.items()}
  objective = Objective(dpn=PyramidTraining(**given))
  drawn = Drawn(noise=jnp.asarray(accepted_noise(record, cfg.dpn, len(ids), rows)))
  inputs = TrainInputs(prompt.length, full, {trained_routes.NAME: drawn})

  def losses(params):
    out = model.apply({'params': params}, prompt, jnp.asarray(image), inputs, objective, method='train_forward')
    return training_losses(out, prompt, inputs, objective, trained.parts(cfg, stages)), out

  cut = cut_params(params, stages)
  (total, (result, out)), gradients = jax.jit(jax.value_and_grad(lambda p: _first(losses(p)), has_aux=True))(cut)
  routing = jax.jit(jax.grad(lambda p: losses(p)[0].shown['routing']))(cut)
  depths = range(len(cfg.dpn.layers))
  yield compare(f'{where}{AT}route', jnp.stack([out.seen[f'route_{d}'][:rows] for d in depths], 1), array('route'), EXACT)
  for depth in depths:
    recorded = array('probs')[:, depth, : len(cfg.dpn.kernels[depth])]
    yield compare(f'{where}{AT}probs[{depth}]', out.seen[f'probabilities_{depth}'][:rows], recorded, PROBABILITY)
  lengths = np.asarray((out.places >= 0).sum(-1))[:rows]
  yield compare(f'{where}{AT}valid_len', lengths, array('valid_len'), EXACT)
  text = np.asarray(prompt.length)[:rows] - model.num_image
  yield compare(f'{where}{AT}vision_tokens_after', lengths - text, array('vision_tokens_after'), EXACT)
  left = np.asarray(remaining(full, out.places))
  for row, length in enumerate(lengths):
    recorded = row_of(record.at, record.case, f'{AT}labels_after', (rows, row), length)
    yield compare(f'{where}{AT}labels_after[{row}]', left[row, :length], recorded, EXACT)
    shown = len(array(f'logits_{row}'))
    yield compare(f'{where}{AT}logits_{row}', out.logits[row, max(length - shown, 0) : length], array(f'logits_{row}'), LOGITS)
  scalars = {'loss': total, 'ce_loss': result.ce, 'routing_loss_per_layer_mean': result.shown['routing']}
  for name, ours in scalars.items():
    yield compare(f'{where}{AT}{name}', ours, array(name), LOSS, relative=True)
  if not others:
    yield compare(f'{AT}routing_loss', one_hinge(out.seen, objective.dpn.target), array('routing_loss'), LOSS, relative=True)
  for group, found in (('grad_total', gradients), ('grad_routing', routing)):
    for quantity in compare_gradients(cfg, record.at, record.case, f'{AT}{group}/', join_params(found)):
      yield dataclasses.replace(quantity, name=where + quantity.name)


def _first(found: tuple[Any, Any]) -> tuple[jax.Array, Any]:
  return found[0].total, found


def one_hinge(seen: dict[str, jax.Array], target: float) -> float:
  """The routing loss as the authors' code has it: one hinge of the mean over layers and rows."""
  names = [name for name in seen if name.startswith('scale_')]
  scales = np.concatenate([np.asarray(seen[name]) for name in names])
  pooled = np.concatenate([np.asarray(seen[name.replace('scale', 'route')]) >= 0 for name in names])
  return max(target - float(scales[pooled].mean()), 0.0)
