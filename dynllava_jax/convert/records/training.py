"""Recomputes a recorded training step, forward and backward, with the recorded noise: masks, logits, losses, gradients."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import IGNORE, ModelConfig, Objective
from dynllava_jax.convert.records.base import EXACT, GRADIENT, LOGITS, LOSS, Quantity, compare, prompt_from_ids
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


def compare_training(runner: DynamicRunner, case: dict[str, np.ndarray], pixels: jax.Array) -> Iterator[Quantity]:
  """Every quantity of the group `train/`; `pixels` float[B, R, R, 3] of its rows, normalised."""
  array = lambda name: case[AT + name]
  sparsity = runner.info.sparsity
  objective = Objective(sparsity=sparsity)
  prompt = prompt_from_ids(array('input_ids'), runner.num_image, array('attention_mask').astype(bool))
  labels, spans = array('expanded_labels'), array('answer_span')
  starts = jnp.asarray(last_answer_start(labels, np.asarray(prompt.length)))
  noise = [array('gumbel_image'), spread(array('gumbel_text'), spans, labels.shape[1])]
  if runner.instruct:
    judged = array('instruct_span')
    noise.append(spread(array('gumbel_instruct'), judged, labels.shape[1]))
    fields = (prompt.tokens, prompt.length, prompt.image_start, prompt.seed)
    prompt = Prompt(*fields, instruct_start=jnp.asarray(judged[:, 0], jnp.int32))
    yield compare(AT + 'instruct_span', jnp.stack([prompt.instruct_start, starts], 1), judged, EXACT)
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
    drawn = Drawn(noise=noise, told={'tau': jnp.asarray(array('tau'))})
    inputs = TrainInputs(starts, jnp.asarray(labels), {trained_masks.NAME: drawn})
    out = apply(prompt, image, inputs, objective, method='train_forward')
    return training_losses(out, prompt, inputs, objective, trained.parts(model.cfg, model.stages)), out

  result, out = jax.jit(losses)(params)
  yield compare(AT + 'image_predictor_logits', out.image_logits, array('image_predictor_logits'), LOGITS)
  yield compare(AT + 'image_mask', out.image_mask, array('image_mask'), EXACT)
  places = jnp.arange(labels.shape[1])[None]
  judged = answer_mask(places, prompt.length, starts, sparsity.min_answer_len)
  yield from masks(case, 'text', spans, out.text_logits, out.text_mask, judged)
  yield from logits(case, out, spans)
  scalars = {'loss': result.total, 'ce_loss': result.ce}
  scalars |= {f'{kind}_mask_loss': result.shown[f'{kind}_mask'] for kind in ('image', 'text')}
  if runner.instruct:
    judged = instruct_rule(sparsity).mask(places, prompt.instruct_start, starts)
    yield from masks(case, 'instruct', array('instruct_span'), out.instruct_logits, out.instruct_mask, judged)
    for i, end in enumerate(spans[:, 1]):
      yield compare(f'{AT}policy[{i}]', out.policy[i, :end], array('policy')[i, :end], EXACT)
    scalars['instruct_mask_loss'] = result.shown['instruct_mask']
  for name, ours in scalars.items():
    yield compare(AT + name, ours, array(name), LOSS, relative=True)
  yield compare(AT + 'mask_loss_weight', sparsity.mask_loss_weight, array('mask_loss_weight'), 1e-6, relative=True)
  for group, pick in zip(GRADIENTS, (lambda r: r.total, lambda r: r.ce)):
    gradients = join_params(jax.jit(jax.grad(lambda p, pick=pick: pick(losses(p)[0])))(params))
    yield from compare_gradients(runner.info.model, case, group, gradients)


def spread(noise: np.ndarray, spans: np.ndarray, size: int) -> np.ndarray:
  """Noise float[B, A, 2] of spans int[B, 2] at their places: float32[B, size, 2]."""
  out = np.zeros((len(noise), size, 2), np.float32)
  for row, (start, end) in enumerate(spans):
    out[row, start:end] = noise[row, : end - start]
  return out


def masks(case: dict[str, np.ndarray], kind: str, spans: np.ndarray, predicted, sampled, judged) -> Iterator[Quantity]:
  """Predictor, sample and mask of the spans of one kind of text, row by row: what lies beyond a span was recorded of padding."""
  used = np.where(judged, sampled, 1.0)
  for i, (start, end) in enumerate(spans):
    of_row = (
      (f'{kind}_predictor_logits', predicted, LOGITS),
      (f'{kind}_mask_sampled', sampled, EXACT),
      (f'{kind}_mask', used, EXACT),
    )
    for name, ours, tolerance in of_row:
      yield compare(f'{AT}{name}[{i}]', np.asarray(ours)[i, start:end], case[AT + name][i, : end - start], tolerance)


def logits(case: dict[str, np.ndarray], out: TrainOutput, spans: np.ndarray) -> Iterator[Quantity]:
  """Of all positions behind the image, or those that predict the answers."""
  for i, (start, end) in enumerate(spans):
    if f'{AT}answer_logits_{i}' in case:
      yield compare(f'{AT}answer_logits_{i}', out.logits[i, start - 1 : end - 1], case[f'{AT}answer_logits_{i}'], LOGITS)
    else:
      first = int(case[AT + 'logits_from'])
      yield compare(f'{AT}logits_tail[{i}]', out.logits[i, first:end], case[AT + 'logits_tail'][i, : end - first], LOGITS)


def compare_gradients(model: ModelConfig, case: dict[str, np.ndarray], at: str, gradients) -> Iterator[Quantity]:
  """Gradients in checkpoint form next to the arrays `at`PARAMETER."""
  rules = llava_rules(model)
  for key in (k for k in case if k.startswith(at)):
    name, recorded = key.removeprefix(at), case[key]
    if name == ROW_NORMS:
      ours = jnp.linalg.norm(gradients['llama']['embedding'], axis=-1)
    else:
      ((rule, index),) = [(r, i) for r in rules if (i := r.match(name)) is not None]
      leaf = gradients
      for step in rule.path:
        leaf = leaf[step]
      ours, recorded = leaf[index], rule.transform.apply(recorded, leaf[index].shape)
    yield compare(key, ours, recorded, GRADIENT, relative=True)


def last_answer_start(labels: np.ndarray, length: np.ndarray) -> np.ndarray:
  """int32[B]: where the last answer begins, after the last ignored label of each row's real positions."""
  real = np.arange(labels.shape[1]) < length[:, None]
  ignored = (labels == IGNORE) & real
  last = labels.shape[1] - 1 - np.argmax(ignored[:, ::-1], axis=1)
  return np.where(ignored.any(1), last + 1, 0).astype(np.int32)
