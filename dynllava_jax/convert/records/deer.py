"""Recomputes what was recorded of DeeR: thresholds and distances of the authors' code, and this project's form of it for text.

The text form is decided per question and per token: exits, what was measured, tokens and logits; alone, and in a batch with prompts
of other lengths. Then the losses of its training and their gradients.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.config import IGNORE, ExitHeadConfig, ModelConfig, Objective, Piece, Stage
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records import text_decoder
from dynllava_jax.convert.records.base import EXACT, LOGITS, LOSS, Quantity, compare, in_range, prompt_from_ids, token_ids
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.decoded import Asked
from dynllava_jax.convert.records.described import GROUP, WHOLES
from dynllava_jax.convert.records.runs import Answer, Runner
from dynllava_jax.convert.records.training import compare_gradients
from dynllava_jax.losses import training_losses
from dynllava_jax.methods import deer
from dynllava_jax.methods.exits import NEVER, QUESTION, TOKEN, shares, solve, taken
from dynllava_jax.methods.training import Drawn
from dynllava_jax.models import trained_exits
from dynllava_jax.models.batch import TrainInputs
from dynllava_jax.models.dynllava import DynLlava
from dynllava_jax.models.llama import head_logits
from dynllava_jax.models.params import cut_params, join_params
from dynllava_jax.models.trained import parts

METHOD = 'DeeR-VLA early exit (arXiv 2411.02359), language part'
DISTANCES = {'L2': 'rms', 'mean': 'mean', 'max': 'max', 'cosine': 'cosine'}
GROUPS = {QUESTION: 'text/sequence/', TOKEN: 'text/token/'}
MEASURED = 1e-5  # of numbers near 0.01


def verify(record: Record, alone: bool = True) -> Iterator[Quantity]:
  """Every quantity of the record; `alone` too."""
  yield from thresholds(record)
  for name, ours in DISTANCES.items():
    a = record.given('delta/a', (None, None))
    b = record.given('delta/b', a.shape)
    yield compare(f'delta/{name}', deer.DISTANCES[ours](a, b), record.array(f'delta/{name}'), MEASURED)
  model = text_decoder.model_of(record, exit_head=ExitHeadConfig())
  params = text_decoder.params_of(record, model)
  yield from calibration(record, model, params)
  for per in GROUPS:
    yield from decoded(record, model, params, per, alone)
  yield from trained(record, model, params)


def thresholds(record: Record) -> Iterator[Quantity]:
  """The authors' solver, with ties, exits that are never used, and fewer exits than there are values of."""
  for at in (key.removesuffix('values') for key in record.case if key.startswith('threshold_') and key.endswith('/values')):
    values, wanted = record.given(f'{at}values', (None, None)), record.given(f'{at}target', (None,))
    if len(wanted) > len(values):
      raise ConversionError(f'{record.at}: {at}target has {len(wanted)} exits, and there are values of {len(values)}')
    told = record.setting('array_meanings', kind=GROUP, default={}).get(f'{at}*', '')
    kind, ratio = 'gauss' if 'gauss' in str(told) else 'exp', float(record.given(f'{at}ratio', ()))
    yield compare(f'{at}target', shares(ratio, len(wanted), kind), wanted, 1e-6)
    found = solve(values, wanted)
    yield compare(f'{at}thresholds', found, record.array(f'{at}thresholds'), EXACT)
    yield compare(f'{at}exit_index', taken(values, found), record.array(f'{at}exit_index'), EXACT)


def stages_of(record: Record, per: str, limits: np.ndarray) -> tuple[Stage, ...]:
  """A stage up to each exit, the first of them cut once more: it is compared with the layer before."""
  exits, layers = record.setting('config', 'exits_after_layer', kind=WHOLES), record.setting('config', 'num_hidden_layers')
  if list(exits) != sorted(set(exits)) or len(exits) != len(limits) or exits[0] < 1 or exits[-1] != layers - 1:
    raise ConversionError(
      f'{record.described}: exits_after_layer is {list(exits)}, expected {len(limits)} layers that rise from 1 or above to the last'
    )
  starts = [0, exits[0], *(i + 1 for i in exits[:-1])]
  piece = lambda limit: Piece('deer', {'threshold': float(limit), 'per': per})
  return (Stage(), *(Stage(start=start, exit=piece(limit)) for start, limit in zip(starts[1:], limits)))


def limits_of(record: Record) -> np.ndarray:
  """The recorded thresholds of the text form."""
  return record.given('text/thresholds', (len(record.setting('config', 'exits_after_layer', kind=WHOLES)),))


def calibration(record: Record, model: ModelConfig, params: dict[str, Any]) -> Iterator[Quantity]:
  """What the exits measure at the last positions of the calibration rows, each as the end of a prompt; the thresholds of that."""
  limits, ids = limits_of(record), record.given('text/calibration_ids', (None, None), whole=True)
  in_range(record.at, 'text/calibration_ids', ids, 0, model.llama.vocab_size)
  values = record.given('text/calibration_values', (len(limits), None))
  positions = values.shape[1] // len(ids)
  if positions * len(ids) != values.shape[1] or not 0 < positions < ids.shape[1]:
    raise ConversionError(f'{record.at}: text/calibration_values has {values.shape[1]} entries, of {ids.shape} tokens')
  asked = [Asked(row[:end], None) for row in ids for end in range(ids.shape[1] - positions + 1, ids.shape[1] + 1)]
  never = np.full(len(limits), NEVER)
  answers = Runner(model, params, stages_of(record, QUESTION, never)).answer(asked, 1)
  yield compare('text/calibration_values', np.stack([a.left.value[0, 1:] for a in answers], 1), values, MEASURED)
  # The ratio is not told; the shares are those that the recorded thresholds give.
  reached = np.bincount(taken(values, limits), minlength=len(limits))
  yield compare('text/thresholds', solve(values, (reached + 0.5) / values.shape[1]), limits, EXACT)


def decoded(record: Record, model: ModelConfig, params: dict[str, Any], per: str, alone: bool) -> Iterator[Quantity]:
  """One way to decide: alone, in a batch of other lengths, and without a cache."""
  at, limits, ids = GROUPS[per], limits_of(record), token_ids(record.at, record.case, 'text/prompt', model.llama.vocab_size)
  runner = Runner(model, params, stages_of(record, per, limits))
  never = Runner(model, params, stages_of(record, per, np.full(len(limits), NEVER)))
  others = [Asked(np.concatenate([ids, ids[::-1], ids[:2]]), None), Asked(ids[::-1][:4], None)]
  tokens = token_ids(record.at, record.case, f'{at}tokens', model.llama.vocab_size)
  steps = len(tokens)
  together = runner.answer([Asked(ids, None), *others], steps)
  whole = never.answer([Asked(ids, None), *others], 1)[0].left.value[0]
  yield from compare_answer(record, at, 'in a batch: ', together[0], whole, per)
  if not alone:
    return
  yield from compare_answer(record, at, '', runner.answer([Asked(ids, None)], steps, 20)[0], whole, per)
  for row, answer in zip(others, together[1:]):
    single = runner.answer([row], steps)[0]
    yield compare(f'{at}other row, in a batch and alone: tokens', answer.tokens, single.tokens, EXACT)
    yield compare(f'{at}other row, in a batch and alone: logits', answer.logits, single.logits, LOGITS)
  fed = tokens[:-1]
  logits = runner.uncached([Asked(ids, None), *others], np.stack([fed, *(a.tokens[:-1] for a in together[1:])]))
  for row, (ours, cached) in enumerate(zip(logits, together)):
    recorded = record.array(f'{at}logits')[-1:].reshape(-1) if row == 0 else cached.logits[-1]
    yield compare(f'without a cache, row {row}: {at}logits', ours, recorded, LOGITS)


def compare_answer(record: Record, at: str, where: str, answer: Answer, whole: np.ndarray, per: str) -> Iterator[Quantity]:
  """An answer next to its record; `whole` float[I], what was measured of the prompt where nobody leaves."""
  delta = record.array(f'{at}delta').astype(np.float64)
  yield compare(f'{where}{at}tokens', answer.tokens, record.array(f'{at}tokens'), EXACT)
  yield compare(f'{where}{at}exit', answer.left.stage - 1, record.array(f'{at}exit'), EXACT)
  yield compare(f'{where}{at}logits', answer.logits, record.array(f'{at}logits'), LOGITS)
  ours = answer.left.value[:, 1:].copy()
  ours[0] = whole[1:]  # the record's prompt runs through all layers
  if per == QUESTION:
    ours[1:] = np.nan  # kept from the prompt, not measured again
  yield compare(f'{where}{at}delta, where measured', np.isnan(ours), np.isnan(delta), EXACT)
  yield compare(f'{where}{at}delta', np.nan_to_num(ours), np.nan_to_num(delta), MEASURED)


def trained(record: Record, model: ModelConfig, params: dict[str, Any]) -> Iterator[Quantity]:
  """The three losses with the recorded draws, what the exit head said, and the gradients of the sum."""
  ids = record.given('train/ids', (None, None), whole=True)
  in_range(record.at, 'train/ids', ids, 0, model.llama.vocab_size)
  limits = limits_of(record)
  labels, two, random = (record.given(f'train/{name}', ids.shape, whole=True) for name in ('labels', 'two_exit', 'random_exit'))
  in_range(record.at, 'train/labels', labels[labels != IGNORE], 0, model.llama.vocab_size)
  for name, drawn in (('two_exit', two), ('random_exit', random)):
    in_range(record.at, f'train/{name}', drawn, 0, len(limits))
  stages = stages_of(record, QUESTION, np.full(len(limits), NEVER))
  exits, prompt = len(stages) - 1, prompt_from_ids(ids, 1)
  size, more = prompt.tokens.shape[1], [(0, 0), (0, prompt.tokens.shape[1] - ids.shape[1])]  # there is a place for an image
  share = lambda number: (number + 0.5) / exits
  noise = {
    'exit_random': share(np.pad(random, more)),
    'exit_two': share(two[:, [0, -1]]),
    'cut': np.full(len(ids), (record.number('train/cut', 1, ids.shape[1] + 1) - 0.5) / size),
  }
  drawn = {trained_exits.NAME: Drawn(noise=jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), noise))}
  inputs = TrainInputs(prompt.length, jnp.asarray(np.pad(labels, more, constant_values=IGNORE)), drawn)
  image = jnp.zeros((len(ids), 1, model.llama.hidden_size))
  runner = DynLlava(model, stages)

  def losses(params):
    out = runner.apply({'params': params}, prompt, image, inputs, method='train_forward')
    found = training_losses(out, prompt, inputs, Objective(), parts(model, stages))
    return found.total, (found, head_logits(out.seen['exit_random'], out.seen['exit_matrix']))

  (loss, (found, said)), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(cut_params(params, stages))
  for name, ours in {'final': found.ce, **found.shown, 'loss': loss}.items():
    yield compare(f'train/{name}', ours, record.array(f'train/{name}'), LOSS, relative=True)
  recorded = record.given('train/exit_logits', (len(ids), None, None))
  yield compare('train/exit_logits', said[:, ids.shape[1] - recorded.shape[1] : ids.shape[1]], recorded, LOGITS)
  yield from compare_gradients(model, record.at, record.case, 'train/grad/', join_params(gradients))
