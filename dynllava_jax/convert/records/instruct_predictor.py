"""Recomputes what was recorded of Dynamic-LLaVA with its instruction predictor: prefill, decoding, a later turn, a training step.

Every prompt runs alone and in a batch with all others, right-padded to one length; each row decodes as many tokens as its record
has, waits for the others, and then all later turns are appended at once. Decoding without a cache is compared with cached decoding:
the authors' own judges generated tokens by another predictor (`nocache/` of a record shows that, and is not what is wanted).
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import IMAGE_ID
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import (
  EXACT,
  LOGITS,
  Quantity,
  compare,
  given,
  in_range,
  load_case,
  prompt_from_ids,
  token_ids,
)
from dynllava_jax.convert.records.bases import Record, with_weights
from dynllava_jax.convert.records.described import NAME, NUMBER, WHOLE
from dynllava_jax.convert.records.dynamic_runs import DynamicRunner, row_of
from dynllava_jax.convert.records.training import compare_training
from dynllava_jax.models.batch import Prompt

MOST = 2**20  # places of a prompt
METHOD = 'dynamic-llava, use_instruct_predictor'
DECODED = ('tokens', 'logits', 'text_keep', 'text_predictor_logits', 'position')
LENGTHS = ('cache_len_dense', 'cache_len_sparse')


@dataclasses.dataclass(frozen=True)
class Asked:
  """A recorded prompt: `ids` int[L], -200 for the image; its `picture`; `start` of the judged span, None where nothing is judged.

  `steps` tokens are decoded, then `chunk` int[C] is appended, and `more` tokens are decoded; both may be empty.
  """

  ids: np.ndarray
  picture: int
  start: int | None
  steps: int
  chunk: np.ndarray
  more: int


def verify(record: Record) -> Iterator[Quantity]:
  """Every quantity of the record."""
  names = [k.removesuffix('/decode/tokens') for k in record.case if k.endswith('/decode/tokens')]
  if not names:
    raise ConversionError(f'{record.at}: no group PROMPT/decode/tokens; expected a record of {METHOD}')
  runner = DynamicRunner(*model(record))
  size, vocab = runner.info.model.vision.image_size, runner.info.model.llama.vocab_size
  pixels = jnp.asarray(given(*record.base_case(), 'pixel_values', (None, 3, size, size))).transpose(0, 2, 3, 1)
  prompts = {name: asked(record, name, vocab, len(pixels)) for name in names}
  run = Run(runner, pixels, list(prompts.values()))
  together = run(range(len(names)))
  for row, (name, prompt) in enumerate(prompts.items()):
    for where, found in (('', run([row])), ('in a batch: ', [row_of(part, row) for part in together])):
      yield from compare_prompt(record, name, prompt, where, *found)
  yield from uncached(record, prompts, run)
  if 'train/input_ids' in record.case:
    numbers = in_range(record.at, 'train/image_index', record.given('train/image_index', (None,), whole=True), 0, len(pixels))
    yield from compare_training(runner, record.at, record.case, pixels[jnp.asarray(numbers)])


def model(record: Record) -> tuple[CheckpointInfo, dict]:
  """The base with the record's predictor, judging as the authors' code does."""
  told = lambda name, kind: record.setting('sparse_config', name, kind=kind)

  def describe(info: CheckpointInfo) -> CheckpointInfo:
    predictor = dataclasses.replace(info.model.predictor, instruct=True)
    stages = tuple(dataclasses.replace(s, options={'instruct': True}) if s.selector == 'dynamic' else s for s in info.stages)
    sparsity = dataclasses.replace(
      info.sparsity,
      instruct_keep_rate=told('instruct_keep_rate', NUMBER),
      min_instruct_len=told('instruct_len_for_training', WHOLE),
      judge_last_instruct_token=True,
    )
    return dataclasses.replace(info, model=dataclasses.replace(info.model, predictor=predictor), stages=stages, sparsity=sparsity)

  return with_weights(record, record.setting('base_model', kind=NAME), load_case(record.folder / 'weights.npz'), describe)


def asked(record: Record, name: str, vocab: int, images: int) -> Asked:
  """The prompt called so, of a vocabulary, with one of so many images; ConversionError if its arrays are none of a prompt's."""
  there = lambda key: f'{name}/{key}' in record.case
  ids = token_ids(record.at, record.case, f'{name}/input_ids', vocab)
  start, chunk, more = None, np.zeros(0, np.int32), 0
  if there('last_instruct'):
    span = record.given(f'{name}/last_instruct', (2,), whole=True)
    start = int(in_range(record.at, f'{name}/last_instruct', span, 0, MOST)[0])
  if there('round2/chunk_ids') or there('round2/tokens'):
    chunk = record.given(f'{name}/round2/chunk_ids', (1, None), whole=True)[0]
    in_range(record.at, f'{name}/round2/chunk_ids', chunk, 0, vocab)
    more = record.steps(f'{name}/round2/tokens', 1)
  picture = record.number(f'{name}/image_index', 0, images)
  return Asked(ids, picture, start, record.steps(f'{name}/decode/tokens', 1), chunk, more)


class Run:
  """All prompts of a record, laid out with one padding whether alone or together, so that few programs are compiled."""

  def __init__(self, runner: DynamicRunner, pixels: jax.Array, prompts: Sequence[Asked]):
    self.runner, self.pixels, self.prompts = runner, pixels, prompts
    self.longest = max(len(p.ids) for p in prompts) + 1
    self.later = max(len(p.chunk) for p in prompts) + max(p.more for p in prompts)

  def lay_out(self, rows: Sequence[int]) -> tuple[Prompt, jax.Array]:
    """The prompts `rows` and their pixels."""
    chosen = [self.prompts[i] for i in rows]
    ids = np.stack([np.pad(p.ids, (0, self.longest - len(p.ids))) for p in chosen])
    valid = np.stack([np.arange(self.longest) < len(p.ids) for p in chosen])
    spare = 0 if (ids == IMAGE_ID).any() else self.runner.num_image - 1
    prompt = prompt_from_ids(ids, self.runner.num_image, valid, spare)
    start = [int(length) if p.start is None else p.start for p, length in zip(chosen, prompt.length)]
    pixels = self.pixels[jnp.asarray([p.picture for p in chosen])]
    return dataclasses.replace(prompt, instruct_start=jnp.asarray(start, jnp.int32)), pixels

  def __call__(self, rows: Sequence[int]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What prefill and decoding gave, and what the later turn gave."""
    prompt, pixels = self.lay_out(rows)
    chosen = [self.prompts[i] for i in rows]
    first, cache = self.runner.greedy(prompt, pixels, np.asarray([p.steps for p in chosen]), self.later)
    size = max(len(p.chunk) for p in self.prompts)
    first |= {'image_start': np.asarray(prompt.image_start)}
    if not any(len(p.chunk) for p in chosen):
      return first, {}
    chunk = jnp.asarray(np.stack([np.pad(p.chunk, (0, size - len(p.chunk))) for p in chosen]), jnp.int32)
    count = jnp.asarray([len(p.chunk) for p in chosen], jnp.int32)
    position = cache.position[:, None] + jnp.arange(size)
    logits, cache, judgement, instruct_logits = self.runner.extended(chunk, count, cache, False)
    last = logits[jnp.arange(len(chosen)), jnp.maximum(count - 1, 0)]
    second, _ = self.runner.go_on(last, cache, np.asarray([p.more for p in chosen]))
    of_chunk = {'position': position, 'logits': logits, 'keep': judgement.keep, 'instruct_logits': instruct_logits}
    return first, second | {f'chunk_{k}': np.asarray(v) for k, v in of_chunk.items()}


def compare_prompt(
  record: Record, name: str, prompt: Asked, where: str, first: dict[str, np.ndarray], second: dict[str, np.ndarray]
) -> Iterator[Quantity]:
  """One row next to the arrays of its prompt; its padding is cut off."""
  at, real = f'{name}/', int(first['rows'][0])

  def put(key: str, ours: np.ndarray) -> Iterator[Quantity]:
    if at + key in record.case:
      recorded = record.case[at + key]
      choice = recorded.dtype.kind in 'iub'
      yield compare(f'{where}{at}{key}', ours, recorded, EXACT if choice else LOGITS)

  yield from put('prefill_logits', first['prefill_logits'][:, :real])
  if prompt.start is not None:
    end = int(record.array(f'{at}last_instruct')[1])
    judged = first['entry_instruct_logits'][:, prompt.start : end - 1]
    positions = first['position_ids'][0, :real]
    kept = np.isin(np.arange(prompt.start, end - 1), positions)
    yield from put('image_start', first['image_start'][0])
    yield from put('last_instruct', np.asarray([prompt.start, int(first['position'][0, 0])]))
    yield from put('kept_image_index', first['kept_image_index'])
    yield from put('instruct_predictor_logits', judged)
    yield from put('instruct_keep', kept[None])
    yield from put('prefill_position_ids', positions[None])
  for part, result, steps in (('decode', first, prompt.steps), *([('round2', second, prompt.more)] if prompt.more else [])):
    for key in DECODED:
      yield from put(f'{part}/{key}', result[key][:, : steps if key in ('tokens', 'logits') else steps - 1])
    for key in LENGTHS:
      yield from put(f'{part}/{key}', result[key][:steps].reshape(-1))
  for key in ('position', 'logits', 'keep', 'instruct_logits') if prompt.more else ():
    yield from put(f'round2/chunk_{key}', second[f'chunk_{key}'][:, : len(prompt.chunk)])


def uncached(record: Record, prompts: dict[str, Asked], run: Run) -> Iterator[Quantity]:
  """The whole sequence computed again: decisions about the generated tokens, and the logits behind the last that is fed."""
  prompt, pixels = run.lay_out(range(len(prompts)))
  fed = np.asarray([p.steps - 1 for p in prompts.values()])
  tokens = np.pad(np.asarray(prompt.tokens), [(0, 0), (0, fed.max())])
  for row, (name, length) in enumerate(zip(prompts, np.asarray(prompt.length))):
    decoded = record.given(f'{name}/decode/tokens', (1, fed[row] + 1), whole=True)
    decoded = in_range(record.at, f'{name}/decode/tokens', decoded, 0, run.runner.info.model.llama.vocab_size)
    tokens[row, length : length + fed[row]] = decoded[0, : fed[row]]
  now = dataclasses.replace(prompt, tokens=jnp.asarray(tokens), length=prompt.length + fed)
  now = dataclasses.replace(now, instruct_start=jnp.where(now.image_start < 0, now.length, now.instruct_start))
  text_slots = tokens.shape[1] - run.runner.num_image

  @jax.jit
  def recompute(now, pixels):
    image = run.runner.apply(pixels, method='encode_images')
    hidden, judgement = run.runner.apply(now, image, prompt.length, text_slots, method='recompute')
    return run.runner.apply(hidden, method='logits'), judgement.keep

  logits, keep = jax.device_get(recompute(now, pixels))
  for row, (name, length) in enumerate(zip(prompts, np.asarray(prompt.length))):
    at = f'{name}/decode/'
    mine = keep[row, length : length + fed[row]]
    yield compare(f'without a cache: {at}text_keep', mine[None], record.array(f'{at}text_keep'), EXACT)
    last = record.given(f'{at}logits', (1, fed[row] + 1, logits.shape[-1]))[0, -1]
    yield compare(f'without a cache: {at}logits', logits[row], last, LOGITS)
