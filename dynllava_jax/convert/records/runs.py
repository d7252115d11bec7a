"""Runs a base model in one way on recorded prompts, alone or together: prefill, greedy decoding step by step, and without a cache.

Records of methods that act in the decoder hold what their authors' code computed for one prompt at a time. Here a batch of such
prompts, right-padded, is run at once; every row must equal its record whatever its neighbours are.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import cache as kv
from dynllava_jax import methods
from dynllava_jax.arrangement import best_for
from dynllava_jax.cache import Cache, CacheSpec, Left, StageCache
from dynllava_jax.config import IMAGE_ID, ModelConfig, Piece, Stage
from dynllava_jax.config.groups import GROUPS
from dynllava_jax.convert.records.base import EXACT, LOGITS, Quantity, compare, in_range, prompt_from_ids
from dynllava_jax.convert.records.bases import Base, Record
from dynllava_jax.convert.records.decoded import Asked, Group, asked
from dynllava_jax.models.dynllava import DynLlava, Prompt, StageTrace
from dynllava_jax.models.params import cut_params
from dynllava_jax.models.stacks import stacks_of


@dataclasses.dataclass(frozen=True)
class Answer:
  """What one row of a batch gave, as numpy arrays without its padding.

  Attributes:
    image_start: place of the image in the full sequence, -1 without.
    prefill_logits: [S', V] of what is left of the prompt in the last stage; hidden: [S', D], before the final norm.
    traces: one `StageTrace` per stage, of this row.
    k, v: [L, C, K, H] per stack of layers, after the prefill, slots in use; where layers hold different numbers of them, zeros
      behind the fewer.
    tokens: [T]; logits: [T, V], those that each token was drawn from.
    position: [T - 1, L], rotary position of each fed token in every layer.
    cache_len: [T, L], slots in use after the prefill and after each fed token.
    left: `cache.Left` of this row, each number with one for every token that was drawn, [T] and [T, I]; None without exits.
  """

  image_start: int
  prefill_logits: np.ndarray
  hidden: np.ndarray
  traces: tuple[StageTrace, ...]
  k: tuple[np.ndarray, ...]
  v: tuple[np.ndarray, ...]
  tokens: np.ndarray
  logits: np.ndarray
  position: np.ndarray
  cache_len: np.ndarray
  left: Left | None = None


def _groups(asked: Sequence[Asked]) -> jax.Array | None:
  """int32[B, P] of all rows, None if no row has any."""
  some = next((a.group for a in asked if a.group is not None), None)
  return None if some is None else jnp.asarray(np.stack([np.zeros_like(some) if a.group is None else a.group for a in asked]))


class Runner:
  """One model, reducer and stage list; programs are compiled once per shape of the batch."""

  def __init__(self, model: ModelConfig, params: dict[str, Any], stages: tuple[Stage, ...], reducer: Piece | None = None):
    """`params` in checkpoint form; computation is in float32, in which records are compared."""
    arrangement = best_for(params)
    self.model = DynLlava(dataclasses.replace(model, predictor=None), stages, reducer=reducer, arrangement=arrangement)
    self.num_image = self.model.num_image
    unused = {name for name, group in GROUPS.items() if group.field == 'predictor'}
    used = {name: group for name, group in params.items() if name not in unused}
    methods.check_tail(model, reducer, 'vision_tail' in used)
    self.params = cut_params(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), used), stages, arrangement)
    self._prefill = jax.jit(self._prefill_impl, static_argnums=2)
    self._extend = jax.jit(self._extend_impl)
    self._later = jax.jit(self._later_impl)
    self._recompute = jax.jit(self._recompute_impl, static_argnums=3)
    self.stacks = stacks_of(stages, model.llama.num_layers)

  def _apply(self, *args, method):
    return self.model.apply({'params': self.params}, *args, method=method)

  def _prefill_impl(self, prompt, image, spec, group):
    hidden, traces, cache = self._apply(prompt, image, spec, group, method='prefill')
    return self._apply(hidden, method='logits'), hidden, traces, cache

  def _extend_impl(self, tokens, count, cache):
    hidden, cache, _ = self._apply(tokens, count, cache, True, method='extend')
    return self._apply(hidden, method='logits')[:, 0], cache

  def _later_impl(self, tokens, count, cache):
    hidden, cache, _ = self._apply(tokens, count, cache, False, method='extend')
    return self._apply(hidden, method='logits'), cache

  def _recompute_impl(self, prompt, image, answer_start, text_slots):
    hidden, _ = self._apply(prompt, image, answer_start, text_slots, method='recompute')
    return self._apply(hidden, method='logits')

  def lay_out(self, asked: Sequence[Asked], text: int = 0) -> tuple[Prompt, jax.Array]:
    """The prompts as a batch with room for `text` text tokens, and float[B, P, D] image tokens, zeros where there is no image."""
    longest = max(text, *(a.text_tokens for a in asked)) + 1
    ids, valid = np.zeros((len(asked), longest), np.int64), np.zeros((len(asked), longest), bool)
    for row, a in enumerate(asked):
      ids[row, : len(a.ids)], valid[row, : len(a.ids)] = a.ids, True
    prompt = prompt_from_ids(ids, self.num_image, valid)
    nothing = np.zeros((self.num_image, self.model.cfg.llama.hidden_size), np.float32)
    return prompt, jnp.asarray(np.stack([nothing if a.image is None else a.image for a in asked]))

  def answer(self, asked: Sequence[Asked], steps: int, text: int = 0) -> list[Answer]:
    """Greedy decoding of `steps` tokens; rows do not stop. `text`: at least so many text positions."""
    prompt, image = self.lay_out(asked, text)
    prefill_logits, hidden, traces, cache = self._prefill(prompt, image, CacheSpec(max_new_tokens=steps), _groups(asked))
    after_prefill = [jax.device_get(kv.stacked(s, self.model.cfg.llama.num_kv_heads)) for s in cache.stages]
    last = prefill_logits[jnp.arange(len(asked)), traces[-1].length - 1]
    ones = jnp.ones(len(asked), jnp.int32)
    tokens, logits, position, length, left = [], [last], [], [self._slots_in_use(cache)], [cache.left]
    for step in range(steps):
      token = jnp.argmax(last, -1).astype(jnp.int32)
      tokens.append(token)
      if step + 1 == steps:
        break
      shift = self._per_layer(cache, 'shift')
      position.append(np.asarray(cache.position)[:, None] - shift)
      last, cache = self._extend(token[:, None], ones, cache)
      logits.append(last)
      length.append(self._slots_in_use(cache))
      left.append(cache.left)
    stack = lambda x: (
      np.stack([np.asarray(a) for a in x], 1) if x else np.zeros((len(asked), 0, self.model.cfg.llama.num_layers), np.int32)
    )
    tokens, logits, position, length = map(stack, (tokens, logits, position, length))
    hidden, prefill_logits, traces, left = jax.device_get((hidden, prefill_logits, traces, left))
    left = None if left[0] is None else jax.tree.map(lambda *x: np.stack(x, 1), *left)
    answers = []
    for row in range(len(asked)):
      mine = tuple(_row_of_trace(t, row) for t in traces)
      real = int(traces[-1].length[row])
      k, v = (tuple(_in_use(getattr(s, name), s, row) for s in after_prefill) for name in ('k', 'v'))
      of_row = tokens[row], logits[row], position[row], length[row]
      of_row = prefill_logits[row, :real], hidden[row, :real], mine, k, v, *of_row, jax.tree.map(lambda x, row=row: x[row], left)
      answers.append(Answer(int(prompt.image_start[row]), *of_row))
    return answers

  def _per_layer(self, cache: Cache, name: str) -> np.ndarray:
    """[B, L] of a number that every stage's cache has, int32[B] or for its layers int32[L, B]; 0 where it has none."""
    found = np.zeros((self.model.cfg.llama.num_layers, cache.position.shape[0]), np.int32)
    for held, stack in zip(cache.stages, self.stacks):
      value = getattr(held, name)
      found[np.asarray(stack.layers)] = 0 if value is None else value
    return found.T

  def _slots_in_use(self, cache: Cache) -> np.ndarray:
    """[B, L]."""
    return self._per_layer(cache, 'length') - self._per_layer(cache, 'first')

  def later(self, asked: Sequence[Asked], chunks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Chunks int[B, T] one after the other on top of the prompts: (logits [B, T, V] of the last, slots in use [B, L] behind it)."""
    prompt, image = self.lay_out(asked)
    spec = CacheSpec(max_new_tokens=1, later_tokens=sum(chunk.shape[1] for chunk in chunks))
    _, _, _, cache = self._prefill(prompt, image, spec, _groups(asked))
    for chunk in chunks:
      count = jnp.full(len(asked), chunk.shape[1], jnp.int32)
      logits, cache = self._later(jnp.asarray(chunk, jnp.int32), count, cache)
    return np.asarray(logits), self._slots_in_use(cache)

  def uncached(self, asked: Sequence[Asked], tokens: np.ndarray) -> np.ndarray:
    """Logits [B, V] behind the prompts and int[B, T] generated tokens, recomputed as a whole."""
    prompt, image = self.lay_out(asked)
    slots, steps = prompt.tokens.shape[1], tokens.shape[1]
    whole = np.pad(np.asarray(prompt.tokens), [(0, 0), (0, steps)])
    for row, length in enumerate(np.asarray(prompt.length)):
      whole[row, length : length + steps] = tokens[row]
    now = dataclasses.replace(prompt, tokens=jnp.asarray(whole), length=prompt.length + steps)
    return np.asarray(self._recompute(now, image, prompt.length, slots - self.num_image + steps))


def _in_use(x: np.ndarray, stage: StageCache, row: int) -> np.ndarray:
  """A row's slots in use, [L, C, K, H]; where layers begin at different slots, zeros behind the fewer."""
  x = x[:, row, : int(stage.length[row])]
  if stage.first is None:
    return x
  moved = np.zeros_like(x)
  for layer, first in enumerate(stage.first[:, row]):
    moved[layer, : x.shape[1] - first] = x[layer, first:]
  return moved[:, : x.shape[1] - int(stage.first[:, row].min())]


def _row_of_trace(trace: StageTrace, row: int) -> StageTrace:
  """The trace of one row."""
  of_layers = jax.tree.map(lambda x: x[:, row], trace.of_layers)
  return dataclasses.replace(jax.tree.map(lambda x: x[row], dataclasses.replace(trace, of_layers=())), of_layers=of_layers)


# (name of an array, the array, what a row gave) -> (ours, tolerance); None for arrays that the method does not know.
Own = Callable[[str, np.ndarray, Answer], tuple[Any, float] | None]


def neighbours(prompts: Sequence[Asked]) -> list[Asked]:
  """Other rows for a batch: one without image, and a longer one that has its image elsewhere."""
  with_image = next((a for a in prompts if a.image is not None), None)
  if with_image is None:
    return []
  text = with_image.ids[with_image.ids != IMAGE_ID]
  longer = np.concatenate([text[:1], [IMAGE_ID], text[::-1], text[1:4]])
  return [Asked(text[::-1][: len(text) // 2 + 2], None), Asked(longer, with_image.image[::-1])]


def compare_group(record: Record, group: Group, answer: Answer, where: str, own: Own) -> Iterator[Quantity]:
  """Every array of a group next to what a row of a batch gave, which may have decoded more tokens than the group.

  Args:
    record, group, answer: what is compared.
    where: put in front of the names.
    own: the method's own arrays.
  """
  answer = cut(answer, record.steps(f'{group.at}tokens'))
  for key, recorded in record.case.items():
    name = key.removeprefix(group.at)
    if not key.startswith(group.at) or '/' in name:
      continue
    found = own(name, recorded, answer)
    if found is None and name in ('tokens', 'logits'):
      found = getattr(answer, name), EXACT if name == 'tokens' else LOGITS
    elif found is None and name == 'prefill_logits':
      found = tail(answer.prefill_logits, recorded), LOGITS
    if found is not None:
      yield compare(where + key, found[0], recorded, found[1])


def cut(answer: Answer, steps: int) -> Answer:
  """The answer as it was after `steps` tokens."""
  lists = {'tokens': steps, 'logits': steps, 'position': steps - 1, 'cache_len': steps}
  return dataclasses.replace(answer, **{name: getattr(answer, name)[:count] for name, count in lists.items()})


def tail(ours: np.ndarray, recorded: np.ndarray) -> np.ndarray:
  """The last rows of [S, V], as many as were recorded: some records hold those behind the image, or one."""
  return ours[max(len(ours) - len(recorded), 0) :] if recorded.ndim else ours


def compare_run(
  record: Record,
  groups: Sequence[Group],
  runner: 'Runner',
  base: Base,
  own: Own,
  alone: bool = True,
  needed: Sequence[str] = (),
) -> Iterator[Quantity]:
  """The groups of one config: each prompt alone, and all in one batch with a text-only row and a longer one.

  With `alone` the two other rows must also equal what they give alone. Right padding is as wide alone as in the batch.
  ConversionError if a prompt with an image lacks one of the `needed` arrays.
  """
  prompts = [asked(record, base, group) for group in groups]
  for group, prompt in zip(groups, prompts):
    for name in needed if prompt.image is not None else ():
      record.array(group.at + name)
  everyone = [*prompts, *neighbours(prompts)]
  text = max(a.text_tokens for a in everyone)
  steps = max(record.steps(f'{group.at}tokens') for group in groups)
  together = runner.answer(everyone, steps, text)
  for group, prompt, answer in zip(groups, prompts, together):
    if alone:
      yield from compare_group(record, group, runner.answer([prompt], steps, text)[0], '', own)
    yield from compare_group(record, group, answer, 'in a batch: ', own)
  for what, row, answer in zip(('text-only row', 'longer row'), everyone[len(prompts) :], together[len(prompts) :]):
    if alone:
      single = runner.answer([row], steps, text)[0]
      at = f'{groups[0].setting}, {what}, in a batch and alone: '
      yield compare(f'{at}tokens', answer.tokens, single.tokens, EXACT)
      yield compare(f'{at}logits', answer.logits, single.logits, LOGITS)


def compare_uncached(record: Record, groups: Sequence[Group], runner: 'Runner', base: Base) -> Iterator[Quantity]:
  """The logits behind the last recorded token, recomputed without a cache."""
  prompts = [asked(record, base, group) for group in groups]
  everyone = [*prompts, *neighbours(prompts)]
  vocab = base.info.model.llama.vocab_size
  tokens = [in_range(record.at, f'{g.at}tokens', record.given(f'{g.at}tokens', (None,), whole=True), 0, vocab) for g in groups]
  fed = min(map(len, tokens)) - 1
  forced = np.stack([*(t[:fed] for t in tokens), *[tokens[0][:fed]] * (len(everyone) - len(tokens))])
  logits = runner.uncached(everyone, forced)
  for row, group in enumerate(groups):
    recorded = record.given(f'{group.at}logits', (len(tokens[row]), vocab))[fed]
    yield compare(f'without a cache: {group.at}logits', logits[row], recorded, LOGITS)


def per_layer(ours: np.ndarray, recorded: np.ndarray) -> np.ndarray:
  """[T, L] as it was recorded: [T, L], [T, 2] of the first and the last layer, or [T] of the last."""
  if recorded.ndim == 1:
    return ours[:, -1]
  return ours[:, [0, -1]] if recorded.shape[1:] == (2,) else ours
