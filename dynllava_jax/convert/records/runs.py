"""Runs a base model in one way on recorded prompts, alone or together: prefill, greedy decoding step by step, and without a cache.

Records of methods that act in the decoder hold what their authors' code computed for one prompt at a time. Here a batch of such
prompts, right-padded, is run at once; every row must equal its record whatever its neighbours are.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import IMAGE_ID, ModelConfig, Piece, Stage
from dynllava_jax.convert.records.base import prompt_from_ids
from dynllava_jax.models.dynllava import DynLlava, Prompt, StageTrace
from dynllava_jax.models.params import cut_params


@dataclasses.dataclass(frozen=True)
class Asked:
  """One prompt: token ids int[L], in which -200 stands for the image, and the image's tokens float[P, D], None without image."""

  ids: np.ndarray
  image: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Answer:
  """What one row of a batch gave, as numpy arrays without its padding.

  Attributes:
    prefill_logits: [S', V] of what is left of the prompt in the last stage; hidden: [S', D], before the final norm.
    traces: one `StageTrace` per stage, of this row.
    k, v: [L, C, K, H] per stage, after the prefill, slots in use.
    tokens: [T]; logits: [T, V], those that each token was drawn from.
    position: [T - 1, L], rotary position of each fed token in every layer.
    cache_len: [T, L], slots in use after the prefill and after each fed token.
  """

  prefill_logits: np.ndarray
  hidden: np.ndarray
  traces: tuple[StageTrace, ...]
  k: tuple[np.ndarray, ...]
  v: tuple[np.ndarray, ...]
  tokens: np.ndarray
  logits: np.ndarray
  position: np.ndarray
  cache_len: np.ndarray


class Runner:
  """One model, reducer and stage list; programs are compiled once per shape of the batch."""

  def __init__(self, model: ModelConfig, params: dict[str, Any], stages: tuple[Stage, ...], reducer: Piece | None = None):
    """`params` in checkpoint form; computation is in float32, in which records are compared."""
    self.model = DynLlava(dataclasses.replace(model, predictor=None), stages, reducer=reducer)
    self.num_image = self.model.num_image
    used = {name: params[name] for name in ('vision', 'projector', 'llama')}
    self.params = cut_params(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), used), stages)
    self._prefill = jax.jit(self._prefill_impl, static_argnums=2)
    self._extend = jax.jit(self._extend_impl)
    self._recompute = jax.jit(self._recompute_impl, static_argnums=3)
    ends = [s.start for s in stages[1:]] + [model.llama.num_layers]
    self.stage_of_layer = np.concatenate([np.full(end - s.start, i) for i, (s, end) in enumerate(zip(stages, ends))])

  def _apply(self, *args, method):
    return self.model.apply({'params': self.params}, *args, method=method)

  def _prefill_impl(self, prompt, image, spec):
    hidden, traces, cache = self._apply(prompt, image, spec, method='prefill')
    return self._apply(hidden, method='logits'), hidden, traces, cache

  def _extend_impl(self, tokens, count, cache):
    hidden, cache, _ = self._apply(tokens, count, cache, True, method='extend')
    return self._apply(hidden, method='logits')[:, 0], cache

  def _recompute_impl(self, prompt, image, answer_start, text_slots):
    hidden, _ = self._apply(prompt, image, answer_start, text_slots, method='recompute')
    return self._apply(hidden, method='logits')

  def lay_out(self, asked: Sequence[Asked]) -> tuple[Prompt, jax.Array]:
    """The prompts as a batch, and float[B, P, D] image tokens, zeros where there is no image."""
    longest = max(len(a.ids) - int((a.ids == IMAGE_ID).any()) for a in asked) + 1
    ids, valid = np.zeros((len(asked), longest), np.int64), np.zeros((len(asked), longest), bool)
    for row, a in enumerate(asked):
      ids[row, : len(a.ids)], valid[row, : len(a.ids)] = a.ids, True
    prompt = prompt_from_ids(ids, self.num_image, valid)
    nothing = np.zeros((self.num_image, self.model.cfg.llama.hidden_size), np.float32)
    return prompt, jnp.asarray(np.stack([nothing if a.image is None else a.image for a in asked]))

  def answer(self, asked: Sequence[Asked], steps: int) -> list[Answer]:
    """Greedy decoding of `steps` tokens; rows do not stop."""
    prompt, image = self.lay_out(asked)
    prefill_logits, hidden, traces, cache = self._prefill(prompt, image, CacheSpec(max_new_tokens=steps))
    after_prefill = jax.device_get(cache)
    last = prefill_logits[jnp.arange(len(asked)), traces[-1].length - 1]
    ones = jnp.ones(len(asked), jnp.int32)
    tokens, logits, position, length = [], [last], [], [self._per_layer(cache, 'length')]
    for step in range(steps):
      token = jnp.argmax(last, -1).astype(jnp.int32)
      tokens.append(token)
      if step + 1 == steps:
        break
      shift = self._per_layer(cache, 'shift')
      position.append(np.asarray(cache.position)[:, None] - shift)
      last, cache = self._extend(token[:, None], ones, cache)
      logits.append(last)
      length.append(self._per_layer(cache, 'length'))
    stack = lambda x: np.stack([np.asarray(a) for a in x], 1) if x else np.zeros((len(asked), 0), np.int32)
    tokens, logits, position, length = map(stack, (tokens, logits, position, length))
    hidden, prefill_logits, traces = jax.device_get((hidden, prefill_logits, traces))
    answers = []
    for row in range(len(asked)):
      mine = tuple(_row_of_trace(t, row) for t in traces)
      real = int(traces[-1].length[row])
      k, v = (tuple(getattr(s, name)[:, row, : int(s.length[row])] for s in after_prefill.stages) for name in ('k', 'v'))
      of_row = tokens[row], logits[row], position[row], length[row]
      answers.append(Answer(prefill_logits[row, :real], hidden[row, :real], mine, k, v, *of_row))
    return answers

  def _per_layer(self, cache, name: str) -> np.ndarray:
    """[B, L] of a number that every stage's cache has; 0 where it has none."""
    values = [getattr(s, name) for s in cache.stages]
    zero = np.zeros(cache.position.shape, np.int32)
    return np.stack([zero if v is None else np.asarray(v) for v in values], 1)[:, self.stage_of_layer]

  def uncached(self, asked: Sequence[Asked], tokens: np.ndarray) -> np.ndarray:
    """Logits [B, V] behind the prompts and int[B, T] generated tokens, recomputed as a whole."""
    prompt, image = self.lay_out(asked)
    slots, steps = prompt.tokens.shape[1], tokens.shape[1]
    whole = np.pad(np.asarray(prompt.tokens), [(0, 0), (0, steps)])
    for row, length in enumerate(np.asarray(prompt.length)):
      whole[row, length : length + steps] = tokens[row]
    now = dataclasses.replace(prompt, tokens=jnp.asarray(whole), length=prompt.length + steps)
    return np.asarray(self._recompute(now, image, prompt.length, slots - self.num_image + steps))


def _row_of_trace(trace: StageTrace, row: int) -> StageTrace:
  """The trace of one row."""
  of_layers = jax.tree.map(lambda x: x[:, row], trace.of_layers)
  return dataclasses.replace(jax.tree.map(lambda x: x[row], dataclasses.replace(trace, of_layers={})), of_layers=of_layers)
