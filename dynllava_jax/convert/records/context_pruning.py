"""Recomputes what was recorded of Dynamic Context Pruning, in the authors' GPT-2 (`pruning_gpt`) and in a LLaMA.

The LLaMA's prompt is read and continued with a cache, alone and in a batch with others, and without one; then the whole sequence
takes a training step. Rows beside the recorded one must give what they give alone.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.arrangement import best_for
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import (
  IGNORE,
  ConfigError,
  ModelConfig,
  Objective,
  Piece,
  PruningConfig,
  PruningTraining,
  Stage,
  VisionConfig,
)
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records import pruning_gpt
from dynllava_jax.convert.records.base import EXACT, LOGITS, LOSS, Quantity, compare, in_range, load_case
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.decoder import llama_of, params_of
from dynllava_jax.convert.records.described import NUMBER, WHOLE
from dynllava_jax.convert.records.training import compare_gradients
from dynllava_jax.losses import training_losses
from dynllava_jax.methods.training import Drawn
from dynllava_jax.models import trained, trained_votes
from dynllava_jax.models.batch import TrainInputs
from dynllava_jax.models.dynllava import DynLlava, Prompt
from dynllava_jax.models.params import cut_params, join_params

METHOD = 'Dynamic Context Pruning / adaptively sparse attention (arXiv 2305.15805)'
STAGES = (Stage(layers=Piece('dynamic_context_pruning')),)
SCORE = 1e-4
LAST = 6  # positions whose logits of a training step were recorded


def verify(record: Record) -> Iterator[Quantity]:
  """Every quantity of the record."""
  weights = load_case(record.folder / 'weights.npz')
  part = lambda name: {k.removeprefix(f'{name}/'): v for k, v in weights.items() if k.startswith(f'{name}/')}
  yield from pruning_gpt.verify(record, part('gpt'))
  yield from verify_llama(record, part('llama'))


def llama_model(record: Record) -> ModelConfig:
  """A model with the recorded decoder; the tower is there for the form. ConversionError if `llama_config` describes none."""
  try:
    llama = llama_of(record, 'llama_config')
    vision = VisionConfig(image_size=28, hidden_size=16, mlp_dim=16, num_layers=2, num_heads=2)
    return ModelConfig(vision=vision, llama=llama, pruning=PruningConfig(dim=record.setting('llama_config', 'int_dim', kind=WHOLE)))
  except (ConfigError, TypeError, ValueError) as e:
    raise ConversionError(f'{record.described}: llama_config: {e}') from None


@dataclasses.dataclass(frozen=True)
class Read:
  """What a row of a batch gave.

  Attributes:
    tokens: [T]; logits: [T, V] that they were drawn from.
    alive: [L, T], entries of each layer's cache behind the prompt and behind each fed token.
    survival, scores: [L, S, S], of the prompt's rows.
  """

  tokens: np.ndarray
  logits: np.ndarray
  alive: np.ndarray
  survival: np.ndarray
  scores: np.ndarray


class Runner:
  """The recorded decoder on rows of token ids."""

  def __init__(self, model: ModelConfig, params: dict[str, Any]):
    arrangement = best_for(params)
    self.model = DynLlava(model, STAGES, arrangement=arrangement)
    self.params = {'params': cut_params(params, STAGES, arrangement)}
    apply = lambda *args, method: self.model.apply(self.params, *args, method=method)
    with_logits = lambda hidden, *rest: (apply(hidden, method='logits'), *rest)
    self._prefill = jax.jit(lambda *a: with_logits(*apply(*a, method='prefill')), static_argnums=2)
    self._extend = jax.jit(lambda *a: with_logits(*apply(*a, True, method='extend')))
    self._recompute = jax.jit(lambda *a: with_logits(*apply(*a, method='recompute'))[0], static_argnums=3)

  def lay_out(self, rows: Sequence[np.ndarray], size: int) -> tuple[Prompt, jax.Array]:
    """Rows of text, right-padded to `size`, and image tokens that none of them has."""
    tokens = np.stack([np.pad(row, (0, size - len(row))) for row in rows])
    length = jnp.asarray([len(row) for row in rows], jnp.int32)
    nothing = jnp.zeros((len(rows), self.model.num_image, self.model.cfg.llama.hidden_size))
    return Prompt(jnp.asarray(tokens), length, jnp.full(len(rows), -1, jnp.int32), jnp.zeros(len(rows), jnp.uint32)), nothing

  def __call__(self, rows: Sequence[np.ndarray], steps: int, size: int) -> list[Read]:
    """Greedy continuations of `steps` tokens."""
    prompt, image = self.lay_out(rows, size)
    logits, (trace,), cache = self._prefill(prompt, image, CacheSpec(max_new_tokens=steps))
    last = logits[jnp.arange(len(rows)), prompt.length - 1]
    tokens, every, alive = [], [last], [self._alive(cache)]
    for step in range(steps):
      tokens.append(jnp.argmax(last, -1).astype(jnp.int32))
      if step + 1 < steps:
        last, cache, _ = self._extend(tokens[-1][:, None], jnp.ones(len(rows), jnp.int32), cache)
        last = last[:, 0]
        every.append(last)
        alive.append(self._alive(cache))
    of_row = lambda parts, row: np.stack([np.asarray(x)[row] for x in parts])
    counts = np.stack(alive, -1)
    inside = lambda name, row: np.asarray(trace.of_layers[0][name])[:, row, : len(rows[row]), : len(rows[row])]
    return [
      Read(of_row(tokens, i), of_row(every, i), counts[:, i], inside('survival', i), inside('scores', i)) for i in range(len(rows))
    ]

  def _alive(self, cache) -> np.ndarray:
    return np.asarray((cache.stages[0].position >= 0).sum(-1))

  def uncached(self, rows: Sequence[np.ndarray], given: int, size: int) -> np.ndarray:
    """Logits [B, V] behind rows whose last tokens from `given` on are generated ones, computed without a cache."""
    prompt, image = self.lay_out(rows, size)
    return np.asarray(self._recompute(prompt, image, jnp.full(len(rows), given, jnp.int32), size - self.model.num_image))


def verify_llama(record: Record, weights: dict[str, np.ndarray]) -> Iterator[Quantity]:
  """The arrays `llama/...`."""
  array = lambda name: record.array(f'llama/{name}')
  model = llama_model(record)
  params = params_of(record, model, ('llama', 'pruning'), weights)
  runner = Runner(model, params)
  tokens = record.given('llama/tokens', (None,), whole=True).astype(np.int32)
  in_range(record.at, 'llama/tokens', tokens, 0, model.llama.vocab_size)
  given = record.number('llama/prompt_len', 2, len(tokens))
  steps, prompt = len(tokens) - given, tokens[:given]
  others = [prompt[::-1][: given // 2], np.concatenate([prompt[:1], prompt[::-1], prompt[:3]])]
  size = len(tokens) + runner.model.num_image
  everyone = [prompt, *others]
  together = runner(everyone, steps, size)
  for where, read in (('', runner([prompt], steps, size)[0]), ('in a batch: ', together[0])):
    yield compare(f'{where}llama/tokens', np.concatenate([prompt, read.tokens]), tokens, EXACT)
    yield compare(f'{where}llama/logits', read.logits, array('logits'), LOGITS)
    seen = np.tril(read.survival).sum(-1).astype(np.int32)
    yield compare(f'{where}llama/alive', np.concatenate([seen, read.alive[:, 1:]], 1), array('alive')[:, :-1], EXACT)
    yield compare(f'{where}llama/prompt held', read.alive[:, 0], seen[:, -1], EXACT)
  for name, row, read in zip(('shorter row', 'longer row'), others, together[1:]):
    alone = runner([row], steps, size)[0]
    yield compare(f'{name}, in a batch and alone: tokens', read.tokens, alone.tokens, EXACT)
    yield compare(f'{name}, in a batch and alone: logits', read.logits, alone.logits, LOGITS)
    yield compare(f'{name}, in a batch and alone: alive', read.alive, alone.alive, EXACT)
  whole = runner([tokens], 1, size)[0]
  yield compare('llama/survival', whole.survival > 0, array('survival'), EXACT)
  yield compare('llama/raw', np.tril(whole.scores, -1), np.tril(array('raw'), -1), SCORE)
  yield compare('llama/alive', np.tril(whole.survival).sum(-1).astype(np.int32), array('alive'), EXACT)
  again = runner.uncached([tokens[:-1]], given, size)[0]
  yield compare('without a cache: llama/logits', again, array('logits')[-1], LOGITS)
  yield from _train(record, model, params)


def _train(record: Record, model: ModelConfig, params: dict[str, Any]) -> Iterator[Quantity]:
  """The whole sequence as a training row, alone and beside a shorter one that is run without votes."""
  array = lambda name: record.array(f'llama/{name}')
  tokens = array('tokens').astype(np.int32)
  targets = record.given('llama/train_targets', tokens.shape, whole=True)
  in_range(record.at, 'llama/train_targets', targets, 0, model.llama.vocab_size)
  objective = Objective(pruning=PruningTraining(gamma=record.setting('gamma', kind=NUMBER)))
  alpha = {'alpha': jnp.float32(record.setting('llama_train_alpha', kind=NUMBER))}
  dyn, parts = DynLlava(model, STAGES), trained.parts(model, STAGES)
  size = len(tokens) + dyn.num_image
  labels = np.full((2, size), IGNORE, np.int32)
  labels[0, 1 : len(targets)] = targets[:-1]
  labels[0, len(tokens)] = targets[-1]  # what the last token is to predict stands behind the row

  def losses(params: dict[str, Any], rows: int):
    row = jnp.asarray(np.stack([np.pad(x, (0, size - len(x))) for x in (tokens, tokens[: len(tokens) // 2])]))[:rows]
    length = jnp.asarray([len(tokens), len(tokens) // 2], jnp.int32)[:rows]
    prompt = Prompt(row, length, jnp.full(rows, -1, jnp.int32), jnp.zeros(rows, jnp.uint32))
    drawn = Drawn(dense=jnp.asarray([False, True])[:rows], told=alpha)
    inputs = TrainInputs(length, jnp.asarray(labels)[:rows], {trained_votes.NAME: drawn})
    image = jnp.zeros((rows, dyn.num_image, model.llama.hidden_size))
    out = dyn.apply({'params': params}, prompt, image, inputs, objective, method='train_forward')
    found = training_losses(out, prompt, inputs, objective, parts)
    return found.total, (found, out.logits[0], out.seen['of_keys/0'][:, 0])

  for where, rows in (('', 1), ('in a batch: ', 2)):
    compute = jax.jit(jax.value_and_grad(losses, has_aux=True), static_argnums=1)
    (_, (found, logits, survival)), gradients = compute(cut_params(params, STAGES), rows)
    n = len(tokens)
    yield compare(f'{where}llama/train_survival', survival[:, :n, :n], array('train_survival'), LOGITS)
    yield compare(f'{where}llama/train_ce', found.ce, array('train_ce'), LOSS, relative=True)
    yield compare(f'{where}llama/train_sparsity', found.shown['sparsity'], array('train_sparsity'), LOSS, relative=True)
    yield compare(f'{where}llama/train_logits', logits[n - LAST : n], array('train_logits'), LOGITS)
    for quantity in compare_gradients(model, record.at, record.case, 'llama/grad/', join_params(gradients)):
      yield dataclasses.replace(quantity, name=where + quantity.name)
