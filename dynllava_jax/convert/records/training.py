"""Recomputes a recorded training step, forward and backward, with the recorded noise: masks, logits, losses, gradients."""

import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import IGNORE, ModelConfig, Objective
from dynllava_jax.convert.inputs import ConversionError
from dynllava_jax.convert.records.base import (
  EXACT,
  GRADIENT,
  LOGITS,
  LOSS,
  Quantity,
  compare,
  given,
  in_range,
  prompt_from_ids,
  token_rows,
)
from dynllava_jax.convert.records.dynamic_runs import DynamicRunner
from dynllava_jax.convert.tables import llava_rules
from dynllava_jax.losses import training_losses
from dynllava_jax.methods.training import Drawn
from dynllava_jax.models import trained, trained_masks
from dynllava_jax.models.batch import Prompt, TrainInputs, TrainOutput, answer_mask
from dynllava_jax.models.params import join_params
from dynllava_jax.models.trained_masks import instruct_rule

AT = 'train/'
GRADIENTS = ('train/grad_total/', 'train/grad_ce/')  # of the whole loss, of cross entropy alone
ROW_NORMS = 'embed_tokens_row_norms'  # recorded instead of the embedding's gradient


def compare_training(
  runner: DynamicRunner, at: str | pathlib.Path, case: dict[str, np.ndarray], pixels: jax.Array
) -> Iterator[Quantity]:
  """Every quantity of the group `train/` of the file `at`; `pixels` float[B, R, R, 3] of its rows, normalised.

  Raises:
    ConversionError: an array that something is computed from is missing or none of a training step.
  """
  rows, sparsity, vocab = len(pixels), runner.info.sparsity, runner.info.model.llama.vocab_size
  objective = Objective(sparsity=sparsity)
  of_rows = lambda name, *shape, whole=False: given(at, case, AT + name, (rows, *shape), whole)
  ids, valid = token_rows(at, case, AT, rows, vocab)
  prompt = prompt_from_ids(ids, runner.num_image, valid)
  size = prompt.tokens.shape[1]
  labels = in_range(at, f'{AT}expanded_labels', of_rows('expanded_labels', size, whole=True), IGNORE, vocab)
  spans = spans_of(at, f'{AT}answer_span', of_rows('answer_span', 2, whole=True), size)
  starts = jnp.asarray(last_answer_start(labels, np.asarray(prompt.length)))
  noise = [of_rows('gumbel_image', runner.num_image, 2), spread(at, 'gumbel_text', of_rows('gumbel_text', None, 2), spans, size)]
  if runner.instruct:
    judged = spans_of(at, f'{AT}instruct_span', of_rows('instruct_span', 2, whole=True), size)
    noise.append(spread(at, 'gumbel_instruct', of_rows('gumbel_instruct', None, 2), judged, size))
    fields = (prompt.tokens, prompt.length, prompt.image_start, prompt.seed)
    prompt = Prompt(*fields, instruct_start=jnp.asarray(judged[:, 0], jnp.int32))
    yield compare(AT + 'instruct_span', jnp.stack([prompt.instruct_start, starts], 1), judged, EXACT)
  array = lambda name: output(at, case, AT + name)
  ragged = lambda name, row, count: row_of(at, case, AT + name, (rows, row), count)
  yield compare(AT + 'valid_len', prompt.length, array('valid_len'), EXACT)
  yield compare(AT + 'answer_span', jnp.stack([starts, prompt.length], 1), spans, EXACT)
  if AT + 'image_span' in case and runner.instruct:
    image_spans = jnp.stack([prompt.image_start, prompt.image_start + runner.num_image], 1)
    yield compare(AT + 'image_span', image_spans, array('image_span'), EXACT)
  noise = tuple(map(jnp.asarray, noise))
  model, params = runner.training()

  def losses(params):
    apply = lambda *args, method: model.apply({'params': params}, *args, method=method)
    image = apply(pixels, method='encode_images')
    drawn = Drawn(noise=noise, told={'tau': jnp.asarray(given(at, case, f'{AT}tau', ()))})
    inputs = TrainInputs(starts, jnp.asarray(labels), {trained_masks.NAME: drawn})
    out = apply(prompt, image, inputs, objective, method='train_forward')
    return training_losses(out, prompt, inputs, objective, trained.parts(model.cfg, model.stages)), out

  result, out = jax.jit(losses)(params)
  yield compare(AT + 'image_predictor_logits', out.image_logits, array('image_predictor_logits'), LOGITS)
  yield compare(AT + 'image_mask', out.image_mask, array('image_mask'), EXACT)
  places = jnp.arange(labels.shape[1])[None]
  judged = answer_mask(places, prompt.length, starts, sparsity.min_answer_len)
  yield from masks(ragged, 'text', spans, out.text_logits, out.text_mask, judged)
  yield from logits(at, case, out, spans)
  scalars = {'loss': result.total, 'ce_loss': result.ce}
  scalars |= {f'{kind}_mask_loss': result.shown[f'{kind}_mask'] for kind in ('image', 'text')}
  if runner.instruct:
    judged = instruct_rule(sparsity).mask(places, prompt.instruct_start, starts)
    yield from masks(ragged, 'instruct', array('instruct_span'), out.instruct_logits, out.instruct_mask, judged)
    for i, end in enumerate(spans[:, 1]):
      yield compare(f'{AT}policy[{i}]', out.policy[i, :end], ragged('policy', i, end), EXACT)
    scalars['instruct_mask_loss'] = result.shown['instruct_mask']
  for name, ours in scalars.items():
    yield compare(AT + name, ours, array(name), LOSS, relative=True)
  yield compare(AT + 'mask_loss_weight', sparsity.mask_loss_weight, array('mask_loss_weight'), 1e-6, relative=True)
  for group, pick in zip(GRADIENTS, (lambda r: r.total, lambda r: r.ce)):
    gradients = join_params(jax.jit(jax.grad(lambda p, pick=pick: pick(losses(p)[0])))(params))
    yield from compare_gradients(runner.info.model, at, case, group, gradients)


def spans_of(at: str | pathlib.Path, name: str, spans: np.ndarray, size: int) -> np.ndarray:
  """Spans int[B, 2] of rows of `size`; ConversionError for one that ends before it starts, or behind the row."""
  in_range(at, name, spans, 0, size + 1)
  if (spans[:, 0] > spans[:, 1]).any():
    raise ConversionError(f'{at}: array {name!r} has a span that ends before it starts')
  return spans


def spread(at: str | pathlib.Path, name: str, noise: np.ndarray, spans: np.ndarray, size: int) -> np.ndarray:
  """Noise float[B, A, 2] of spans int[B, 2] at their places: float32[B, size, 2]; ConversionError for too little of it."""
  if (longest := int((spans[:, 1] - spans[:, 0]).max())) > noise.shape[1]:
    raise ConversionError(f'{at}: array {AT + name!r} has noise for {noise.shape[1]} places, a span has {longest}')
  out = np.zeros((len(noise), size, 2), np.float32)
  for row, (start, end) in enumerate(spans):
    out[row, start:end] = noise[row, : end - start]
  return out


def output(at: str | pathlib.Path, case: dict[str, np.ndarray], name: str) -> np.ndarray:
  """An array that something is compared with; ConversionError if there is none."""
  if name not in case:
    raise ConversionError(f'{at}: array {name!r} is missing; expected a recorded training step')
  return case[name]


def row_of(at: str | pathlib.Path, case: dict[str, np.ndarray], name: str, row: tuple[int, int], count: int) -> np.ndarray:
  """The first `count` entries of a row, (of how many, which), of an array [B, A, ...]; behind them is what padding gave."""
  array, (rows, which) = output(at, case, name), row
  if array.ndim < 2 or len(array) != rows or array.shape[1] < count:
    raise ConversionError(f'{at}: array {name!r} has shape {array.shape}, expected {rows} rows of at least {count} entries')
  return array[which, :count]


# (name, row, count) -> the first entries of a recorded row
Ragged = Callable[[str, int, int], np.ndarray]


def masks(ragged: Ragged, kind: str, spans: np.ndarray, predicted, sampled, judged) -> Iterator[Quantity]:
  """Predictor, sample and mask of the spans of one kind of text, row by row."""
  used = np.where(judged, sampled, 1.0)
  for i, (start, end) in enumerate(spans):
    of_row = (
      (f'{kind}_predictor_logits', predicted, LOGITS),
      (f'{kind}_mask_sampled', sampled, EXACT),
      (f'{kind}_mask', used, EXACT),
    )
    for name, ours, tolerance in of_row:
      yield compare(f'{AT}{name}[{i}]', np.asarray(ours)[i, start:end], ragged(name, i, end - start), tolerance)


def logits(at: str | pathlib.Path, case: dict[str, np.ndarray], out: TrainOutput, spans: np.ndarray) -> Iterator[Quantity]:
  """Of all positions behind the image, or those that predict the answers."""
  for i, (start, end) in enumerate(spans):
    if f'{AT}answer_logits_{i}' in case:
      yield compare(f'{AT}answer_logits_{i}', out.logits[i, start - 1 : end - 1], case[f'{AT}answer_logits_{i}'], LOGITS)
    else:
      first = int(in_range(at, f'{AT}logits_from', given(at, case, f'{AT}logits_from', (), whole=True), 0, end))
      tail = row_of(at, case, f'{AT}logits_tail', (len(spans), i), end - first)
      yield compare(f'{AT}logits_tail[{i}]', out.logits[i, first:end], tail, LOGITS)


def compare_gradients(
  model: ModelConfig, file: str | pathlib.Path, case: dict[str, np.ndarray], at: str, gradients
) -> Iterator[Quantity]:
  """Gradients in checkpoint form next to the arrays `at`PARAMETER of a file."""
  rules = llava_rules(model)
  for key in (k for k in case if k.startswith(at)):
    name, recorded = key.removeprefix(at), case[key]
    if name == ROW_NORMS:
      ours = jnp.linalg.norm(gradients['llama']['embedding'], axis=-1)
    else:
      found = [(rule, index) for rule in rules if (index := rule.match(name)) is not None]
      leaf = gradients
      for step in found[0][0].path if found else ():
        leaf = leaf.get(step, {})
      if not found or not hasattr(leaf, 'shape') or any(i >= n for i, n in zip(found[0][1], leaf.shape)):
        raise ConversionError(f'{file}: array {key!r} is about a parameter that the model does not have, or is not trained')
      ((rule, index),) = found
      recorded = given(file, case, key, rule.transform.torch_shape(leaf[index].shape))
      ours, recorded = leaf[index], rule.transform.apply(recorded, leaf[index].shape)
    yield compare(key, ours, recorded, GRADIENT, relative=True)


def last_answer_start(labels: np.ndarray, length: np.ndarray) -> np.ndarray:
  """int32[B]: where the last answer begins, after the last ignored label of each row's real positions."""
  real = np.arange(labels.shape[1]) < length[:, None]
  ignored = (labels == IGNORE) & real
  last = labels.shape[1] - 1 - np.argmax(ignored[:, ::-1], axis=1)
  return np.where(ignored.any(1), last + 1, 0).astype(np.int32)
