"""Recomputes what was recorded of ICAE on text: slots, both objectives with their gradients, tokens; alone and in a batch.

The context is the record's text in the place of image tokens. Slots and the task's vector are image rows of the run that decodes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.arrangement import best_for
from dynllava_jax.config import DENSE, IGNORE, IMAGE_ID, MemoryConfig, ModelConfig, Objective, Piece
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records import text_decoder
from dynllava_jax.convert.records.base import EXACT, LOGITS, LOSS, Quantity, compare, in_range, prompt_from_ids, token_ids
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.decoded import Asked
from dynllava_jax.convert.records.described import NUMBER, WHOLE, Kind, every
from dynllava_jax.convert.records.runs import Runner
from dynllava_jax.convert.records.training import compare_gradients
from dynllava_jax.losses import training_losses
from dynllava_jax.methods import icae
from dynllava_jax.models import memory
from dynllava_jax.models.batch import TrainInputs
from dynllava_jax.models.dynllava import DynLlava
from dynllava_jax.models.params import cut_params, join_params
from dynllava_jax.models.trained import parts

METHOD = 'ICAE (arXiv 2307.06945)'
TARGETS = {f'{name}_proj': name for name in ('q', 'k', 'v', 'o', 'gate', 'up', 'down')}


def model_of(record: Record) -> ModelConfig:
  """The record's decoder with its memory tokens."""
  told = lambda name, kind=WHOLE: record.setting('config', name, kind=kind)
  known = every(Kind('', lambda name: isinstance(name, str) and name in TARGETS), f'a list of some of {", ".join(TARGETS)}')
  targets = tuple(TARGETS[name] for name in told('lora_targets', known))
  sizes = dict(slots=told('mem_size'), rate=told('mean_compression_rate'), rank=told('lora_r'))
  sizes |= dict(alpha=float(told('lora_alpha', NUMBER)))
  return text_decoder.model_of(record, memory=MemoryConfig(targets=targets, **sizes))


def context_of(record: Record, model: ModelConfig) -> np.ndarray:
  """int[P], what is compressed."""
  return token_ids(record.at, record.case, 'context_ids', model.llama.vocab_size)


def marked(record: Record, model: ModelConfig, name: str, first: int) -> tuple[np.ndarray, int]:
  """(ids int[L] of a sequence, how many of them at its beginning are behind the vocabulary: those of memory tokens and tasks)."""
  ids, vocab = record.given(name, (None,), whole=True), model.llama.vocab_size
  in_range(record.at, name, ids, 0, vocab + 1 + model.memory.slots + len(icae.TASKS))
  count = int((ids >= vocab).sum())
  if not (ids[:count] > vocab).all() or count < first:
    raise ConversionError(f'{record.at}: {name} does not begin with {first} or more memory tokens and tasks alone')
  return ids, count


def verify(record: Record, alone: bool = True) -> Iterator[Quantity]:
  """Every quantity of the record; `alone` too."""
  model = model_of(record)
  params, context = text_decoder.params_of(record, model), context_of(record, model)
  parts_of = icae.segments(len(context), model.memory)
  yield compare('segment_length', len(parts_of[0]), record.array('segment_length'), EXACT)
  slots = {}
  for batch in (1, 2):  # a row is what it is alone
    ids = np.stack([context, context[::-1]])[:batch]
    arrangement = best_for(params)  # where layers lie apart too
    found = jax.jit(lambda p, ids, a=arrangement: filled(DynLlava(model, arrangement=a), p, ids))
    slots[batch] = found(cut_params(params, DENSE, arrangement), ids)
    yield compare('in a batch: slots' if batch > 1 else 'slots', slots[batch][0], record.array('slots'), LOGITS)
  for objective in ('ae', 'lm'):
    yield from trained(record, model, params, objective)
  yield from decoded(record, model, params, slots[2], alone)


def filled(model: DynLlava, params: dict[str, Any], ids: np.ndarray) -> jax.Array:
  """Slots float[B, M, D] of contexts int[B, P]."""
  return model.apply({'params': params}, jnp.asarray(ids), method=lambda m, ids: memory.compress(m, m.llama.embed(ids)))


def sized(model: ModelConfig, rows: int) -> tuple[ModelConfig, Piece]:
  """A model and a reducer with so many image rows: only their number is of interest, neither tower nor reducer is run."""
  vision = dataclasses.replace(model.vision, image_size=model.vision.patch_size * rows)
  return dataclasses.replace(model, vision=vision), Piece('fastervlm', {'tokens': rows})


def task_rows(params: dict[str, Any], model: ModelConfig, ids: np.ndarray) -> jax.Array:
  """float[T, D], the vectors of ids behind those of the memory tokens."""
  return params['memory']['embedding'][ids - model.llama.vocab_size - 1]


def trained(record: Record, model: ModelConfig, params: dict[str, Any], objective: str) -> Iterator[Quantity]:
  """Loss, logits and gradients of one objective: the decoder reads slots, task and text, without the adapter."""
  context = context_of(record, model)
  slots = len(icae.segments(len(context), model.memory)) * model.memory.slots
  ids, count = marked(record, model, f'{objective}/prompt_answer_ids', slots)
  labels = record.given(f'{objective}/labels', ids.shape, whole=True)
  in_range(record.at, f'{objective}/labels', labels[labels != IGNORE], 0, model.llama.vocab_size)
  wide, reducer = sized(model, count)
  runner = DynLlava(wide, reducer=reducer)
  prompt = prompt_from_ids(np.concatenate([[IMAGE_ID], ids[count:]])[None], count)
  inputs = TrainInputs(prompt.length, jnp.asarray(labels[None]))

  def losses(params):
    image = jnp.concatenate([filled(runner, params, context[None])[0], task_rows(params, model, ids[slots:count])])[None]
    out = runner.apply({'params': params}, prompt, image, inputs, method='train_forward')
    return training_losses(out, prompt, inputs, Objective(), parts(wide, DENSE)).total, out

  (loss, out), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(cut_params(params, DENSE))
  yield compare(f'{objective}/loss', loss, record.array(f'{objective}/loss'), LOSS, relative=True)
  recorded = record.given(f'{objective}/logits', (None, model.llama.vocab_size))
  yield compare(f'{objective}/logits', out.logits[0, -len(recorded) :], recorded, LOGITS)
  yield from compare_gradients(model, record.at, record.case, f'{objective}/grad/', join_params(gradients))


def decoded(record: Record, model: ModelConfig, params: dict[str, Any], slots: jax.Array, alone: bool) -> Iterator[Quantity]:
  """Greedy decoding behind the slots float[2, M, D], which are made once: with a cache and without, and beside other rows."""
  for at in sorted(key.removesuffix('tokens') for key in record.case if key.startswith('decode_') and key.endswith('/tokens')):
    ids, special = marked(record, model, f'{at}prompt_ids', 0)
    tokens = token_ids(record.at, record.case, f'{at}tokens', model.llama.vocab_size)
    image = lambda i, ids=ids, special=special: np.concatenate([slots[i], task_rows(params, model, ids[:special])])
    asked = Asked(np.concatenate([[IMAGE_ID], ids[special:]]), image(0))
    wide, reducer = sized(model, len(asked.image))
    runner = Runner(wide, {name: params[name] for name in ('llama',)}, DENSE, reducer)
    others = [Asked(np.asarray([IMAGE_ID, 5, 9, 11]), image(1)), Asked(np.asarray([7, 3, 8]), None)]
    together = runner.answer([asked, *others], len(tokens))
    answers = {'in a batch: ': together[0]} | ({'': runner.answer([asked], len(tokens))[0]} if alone else {})
    for where, answer in answers.items():
      yield compare(f'{where}{at}tokens', answer.tokens, tokens, EXACT)
      yield compare(f'{where}{at}logits', answer.logits, record.array(f'{at}logits'), LOGITS)
    if alone:
      logits = runner.uncached([asked], tokens[None, :-1])
      yield compare(f'without a cache: {at}logits', logits[0], record.array(f'{at}logits')[-1:].reshape(-1), LOGITS)
