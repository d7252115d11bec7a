"""Runs a Dynamic-LLaVA model on recorded prompts: prefill and greedy decoding step by step, with all that its records hold."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import methods
from dynllava_jax.arrangement import best_for
from dynllava_jax.cache import CacheSpec
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.models.dynllava import DynLlava, Prompt
from dynllava_jax.models.params import cut_params
from dynllava_jax.ops import layout


class DynamicRunner:
  """One model with the stage list of its description; programs are compiled once per shape of the batch."""

  def __init__(self, info: CheckpointInfo, params: dict[str, Any]):
    """`params` in checkpoint form. Records are of float32; a gradient in bfloat16 would be rounded."""
    self.info = info
    arrangement = best_for(params)
    self.model = DynLlava(info.model, info.stages, arrangement=arrangement)
    self.whole = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    self.params = cut_params(self.whole, info.stages, arrangement)
    self.num_image = methods.num_image_tokens(info.model)
    self.sparse = next(i for i, s in enumerate(info.stages) if s.selector == 'dynamic')
    self.instruct = info.model.predictor.instruct
    self.prefilled = jax.jit(self._prefill, static_argnums=2)
    self.extended = jax.jit(self._extend, static_argnums=3)

  def training(self) -> tuple[DynLlava, dict[str, Any]]:
    """The model and its parameters as training has them."""
    return DynLlava(self.info.model, self.info.stages), cut_params(self.whole, self.info.stages)

  def apply(self, *args, method):
    """A method of the model, with these parameters."""
    return self.model.apply({'params': self.params}, *args, method=method)

  def _prefill(self, prompt: Prompt, pixels, spec: CacheSpec):
    """(logits, traces, cache, logits of the image predictor and, if there is one, the instruction predictor) of a prompt."""
    image = self.apply(pixels, method='encode_images')
    hidden, traces, cache = self.apply(prompt, image, spec, method='prefill')
    entry = traces[self.sparse].entry
    rows = layout.take_image_rows(entry, prompt.image_start, self.num_image)
    alone = lambda name, x: self.apply(x, method=lambda model, x: getattr(model, name)(x))
    judged = alone('image_predictor', rows), alone('instruct_predictor', entry) if self.instruct else None
    return self.apply(hidden, method='logits'), traces, cache, judged

  def _extend(self, tokens, count, cache, judge):
    """(logits, cache, judgement, logits of the text predictor or, for chunks, the instruction predictor) of new tokens."""
    hidden, after, judgement = self.apply(tokens, count, cache, judge, method='extend')
    return self.apply(hidden, method='logits'), after, judgement, self._judged(tokens, cache, judge)

  def _judged(self, tokens, cache, judge):
    """Predictor logits of the tokens: the dense stages alone, then the predictor."""

    def entry(model: DynLlava):
      x = model.llama.embed(tokens)
      positions = cache.position[:, None] + jnp.arange(tokens.shape[1])
      for i in range(self.sparse):
        old = cache.stages[i]
        x, _ = model.llama.run_stage(i, x, positions, cache=(old,))
      return model.instruct_predictor(x) if self.instruct and not judge else model.text_predictor(x)

    return self.apply(method=entry)

  def greedy(self, prompt: Prompt, pixels, steps: int | np.ndarray, later: int = 0):
    """Prefill and greedy decoding of `steps` tokens: everything a record holds, by its names, and the cache.

    Args:
      prompt: the batch; pixels: float[B, R, R, 3], normalised.
      steps: or int[B], rows that have had theirs wait.
      later: tokens of later turns, and as many generated after them, that the cache has room for.
    """
    spec = CacheSpec(max_new_tokens=int(np.max(steps)) + later, later_tokens=later)
    logits, traces, cache, (image_logits, instruct_logits) = self.prefilled(prompt, pixels, spec)
    last = logits[jnp.arange(len(logits)), traces[-1].length - 1]
    record, cache = self.go_on(last, cache, steps)
    trace = traces[self.sparse]
    record |= {'kept_image_index': trace.kept_image, 'image_predictor_logits': image_logits}
    record |= {'prefill_logits': logits, 'position_ids': trace.positions, 'rows': trace.length}
    record |= {'entry_instruct_logits': instruct_logits} if self.instruct else {}
    return {k: np.asarray(v) for k, v in record.items()}, cache

  def lengths(self, cache) -> tuple[np.ndarray, np.ndarray]:
    """int32[B] of the dense and of the sparse layers."""
    dense = cache.position if self.sparse == 0 else cache.stages[0].length
    return np.asarray(dense), np.asarray(cache.stages[self.sparse].length)

  def go_on(self, last, cache, steps: int | np.ndarray):
    """Greedy decoding of `steps` tokens, or int[B], after logits float[B, V]: (what a record holds, cache)."""
    steps = np.broadcast_to(steps, last.shape[:1])
    record = {'tokens': [], 'logits': [last], 'text_keep': [], 'text_predictor_logits': [], 'position': []}
    lengths = [self.lengths(cache)]
    for step in range(int(steps.max())):
      token = jnp.argmax(last, -1).astype(jnp.int32)
      record['tokens'].append(token)
      if step + 1 == steps.max():
        break
      record['position'].append(cache.position)
      count = jnp.asarray(step + 1 < steps, jnp.int32)
      logits, cache, judgement, text_logits = self.extended(token[:, None], count, cache, True)
      last = logits[:, 0]
      record['logits'].append(last)
      record['text_keep'].append(judgement.keep)
      record['text_predictor_logits'].append(text_logits[:, 0])
      lengths.append(self.lengths(cache))
    stacked = {k: np.stack([np.asarray(x) for x in v], 1) for k, v in record.items()}
    dense, sparse = map(np.stack, zip(*lengths))
    return stacked | {'cache_len_dense': dense, 'cache_len_sparse': sparse}, cache


def row_of(result: dict[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
  """What one row of a batch gave, in the shapes that it would have alone."""
  return {k: v[:, row] if k.startswith('cache_len') else v[row : row + 1] for k, v in result.items()}
