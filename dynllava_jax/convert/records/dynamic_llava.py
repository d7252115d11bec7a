"""Recomputes a recorded case of the authors' implementation and compares every quantity.

A case is one `.npz` file: inputs, and what the original computed from them for prefill, 40 decoding steps,
a second turn, a text-only prompt, uncached decoding, the policy softmax and a training step. All sizes are
read from the arrays. Where the original mishandles batches (decoding with B = 2), the truth is each sample alone.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax.cache import CacheSpec
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.convert.plan import slots_by_key
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import EXACT, LOGITS, Quantity, compare, prompt_from_ids
from dynllava_jax.convert.records.dynamic_runs import DynamicRunner, row_of
from dynllava_jax.convert.records.training import GRADIENTS, ROW_NORMS, compare_training
from dynllava_jax.ops.attention import policy_attention


class Verifier(DynamicRunner):
  """Runs one model against one case; the methods yield quantities."""

  def __init__(self, info: CheckpointInfo, params: dict[str, Any], case: dict[str, np.ndarray], file: str | pathlib.Path):
    super().__init__(info, params)
    self.case, self.file = case, file
    self.pixels = jnp.asarray(case['pixel_values']).transpose(0, 2, 3, 1)

  def run(self) -> list[Quantity]:
    """Every quantity of the case that this model can be compared on."""
    groups: tuple[Callable[[], Iterator[Quantity]], ...] = (
      self.vision,
      self.prefill,
      self.decode,
      self.text_only,
      self.uncached,
      self.softmax,
      self.train,
    )
    return [q for group in groups for q in group()]

  def vision(self) -> Iterator[Quantity]:
    """Tower features and projector output."""
    features = jax.jit(lambda p: self.apply(p, method='vision_features'))(self.pixels)
    projected = jax.jit(lambda p: self.apply(p, method='encode_images'))(self.pixels)
    yield compare('vision/clip_selected', features, self.case['vision/clip_selected'], LOGITS)
    yield compare('vision/projected', projected, self.case['vision/projected'], LOGITS)

  def prefill(self) -> Iterator[Quantity]:
    """Prefill of sample 0 alone and of both samples together."""
    for name in ('b1', 'b2'):
      prompt = prompt_from_ids(self.case[f'{name}/input_ids'], self.num_image)
      rows = prompt.length.shape[0]
      logits, traces, _, (image_logits, _) = self.prefilled(prompt, self.pixels[:rows], CacheSpec(max_new_tokens=1))
      trace, at = traces[self.sparse], f'prefill_{name}/'
      yield compare(at + 'hidden_at_sparse_layer', trace.entry, self.case[at + 'hidden_at_sparse_layer'], LOGITS)
      yield compare(at + 'image_predictor_logits', image_logits, self.case[at + 'image_predictor_logits'], LOGITS)
      yield compare(at + 'kept_image_index', trace.kept_image, self.case[at + 'kept_image_index'], EXACT)
      yield compare(at + 'position_ids', trace.positions, self.case[at + 'position_ids'], EXACT)
      yield compare(at + 'logits', logits, self.case[at + 'logits'], LOGITS)

  def decode(self) -> Iterator[Quantity]:
    """Cached decoding of each sample alone, both together against those, and the second turn of sample 0."""
    case = self.case
    alone = ('b1', 'b1s')
    ids = np.concatenate([case[f'{n}/input_ids'] for n in alone])
    for row, name in enumerate(alone):
      at = f'decode_{name}/'
      result, cache = self.greedy(
        prompt_from_ids(case[f'{name}/input_ids'], self.num_image),
        self.pixels[row : row + 1],
        case[at + 'tokens'].shape[1],
        later=case['round2/chunk_ids'].shape[1] + case['round2/tokens'].shape[1],
      )
      yield from self._compare_run(at, result, lambda key: case[at + key])
      if name == 'b1':
        round2 = list(self._second_turn(cache, at))
      if at + 'kept_image_index' in case:
        yield compare(at + 'kept_image_index', result['kept_image_index'], case[at + 'kept_image_index'], EXACT)
    both, _ = self.greedy(prompt_from_ids(ids, self.num_image), self.pixels[:2], case['decode_b1/tokens'].shape[1])
    for row, name in enumerate(alone):
      at = f'batch of two, row {row}: decode_{name}/'
      yield from self._compare_run(at, row_of(both, row), lambda key: case[f'decode_{name}/{key}'])
    yield from round2

  def _compare_run(self, at, result, recorded) -> Iterator[Quantity]:
    for key in ('tokens', 'text_keep', 'position', 'cache_len_dense', 'cache_len_sparse'):
      yield compare(at + key, result[key].reshape(recorded(key).shape), recorded(key), EXACT)
    for key in ('logits', 'text_predictor_logits'):
      yield compare(at + key, result[key], recorded(key), LOGITS)

  def _second_turn(self, cache, at) -> Iterator[Quantity]:
    case, at = self.case, 'round2/'
    chunk = jnp.asarray(case[at + 'chunk_ids'], jnp.int32)
    position = cache.position[:, None] + jnp.arange(chunk.shape[1])
    yield compare(at + 'chunk_position', position, case[at + 'chunk_position'], EXACT)
    logits, cache, _, _ = self.extended(chunk, jnp.full(len(chunk), chunk.shape[1], jnp.int32), cache, False)
    yield compare(at + 'chunk_logits', logits, case[at + 'chunk_logits'], LOGITS)
    result, _ = self.go_on(logits[:, -1], cache, case[at + 'tokens'].shape[1])
    yield from self._compare_without_first(at, result)

  def text_only(self) -> Iterator[Quantity]:
    """A prompt without image, run through the same program with a dummy image."""
    case, at = self.case, 'text_only/'
    ids = case[at + 'input_ids']
    prompt = prompt_from_ids(ids, self.num_image, spare=self.num_image)
    logits, _, cache, _ = self.prefilled(
      prompt, jnp.zeros_like(self.pixels[:1]), CacheSpec(max_new_tokens=case[at + 'tokens'].shape[1])
    )
    yield compare(at + 'prefill_logits', logits[:, : ids.shape[1]], case[at + 'prefill_logits'], LOGITS)
    result, _ = self.go_on(logits[:, ids.shape[1] - 1], cache, case[at + 'tokens'].shape[1])
    yield from self._compare_without_first(at, result)

  def _compare_without_first(self, at, result) -> Iterator[Quantity]:
    """As `_compare_run`, for records that hold no logits for the first token."""
    for key in ('tokens', 'text_keep', 'cache_len_dense', 'cache_len_sparse'):
      yield compare(at + key, result[key].reshape(self.case[at + key].shape), self.case[at + key], EXACT)
    yield compare(at + 'logits', result['logits'][:, 1:], self.case[at + 'logits'], LOGITS)
    yield compare(at + 'text_predictor_logits', result['text_predictor_logits'], self.case[at + 'text_predictor_logits'], LOGITS)

  def uncached(self) -> Iterator[Quantity]:
    """Uncached decoding on forced tokens: the predictor's decisions, and logits equal to those of cached decoding.

    The original ranks earlier tokens by another quantity and feeds the last prompt row twice in call 0, so its
    own uncached logits are comparable only in the calls whose visible set is the gate's.
    """
    case = self.case
    for name in ('b1', 'b2'):
      at = f'nocache_{name}/'
      forced, visible = case[at + 'tokens'], case[at + 'visible']
      rows, steps = forced.shape
      prompt = prompt_from_ids(case[f'{name}/input_ids'], self.num_image)
      start, slots = prompt.length, prompt.tokens.shape[1]
      buffer = jnp.concatenate([prompt.tokens, jnp.asarray(forced)], 1)
      text_slots = slots - self.num_image + steps

      @jax.jit
      def call(count):
        image = self.apply(self.pixels[:rows], method='encode_images')
        now = dataclasses.replace(prompt, tokens=buffer, length=start + count)
        hidden, judgement = self.apply(now, image, start, text_slots, method='recompute')
        return self.apply(hidden, method='logits'), judgement

      alone = [f'decode_{n}/' for n in ('b1', 'b1s')[:rows]]
      original, cached = [], []
      for j in range(1, steps + 1):
        logits, judgement = call(j)
        ours = np.array(judgement.keep)[:, slots : slots + j]
        ours[:, -1] = True
        for row, run in enumerate(alone):
          if (ours[row] == visible[j][row, :j]).all():
            original.append(np.abs(logits[row] - case[at + 'last_logits'][j, row]).max())
          if (forced[row, :j] == case[run + 'tokens'][0, :j]).all():
            cached.append(np.abs(logits[row] - case[run + 'logits'][0, j]).max())
      recorded = case[at + 'text_predictor_logits']
      margin = recorded[..., 0] - recorded[..., 1]
      generated = slice(slots, slots + steps - 1)
      yield compare(at + 'text_predictor_logits keep - drop', judgement.margin[:, generated], margin, 2 * LOGITS)
      yield compare(at + 'text keep', judgement.keep[:, generated], margin > 0, EXACT)
      for what, errors in (('last_logits, the same set kept', original), ('last_logits, against cached decoding', cached)):
        # In call 1 both sets hold the newest token alone, so there is always something to compare.
        error = float(np.max(errors)) if errors else float('nan')
        yield Quantity(f'{at}{what} ({len(errors)} of {rows * steps} rows)', error, LOGITS)

  def softmax(self) -> Iterator[Quantity]:
    """The policy softmax alone: one-hot keys make queries the scores, one-hot values make the output the weights."""
    scores = self.case['unit_softmax/scores']  # [B, N, T, S], -inf where attention masks anyway
    batch, heads, size, _ = scores.shape
    head_dim = 4 ** size.bit_length()  # its root, by which queries are scaled, is exact
    one_hot = jnp.broadcast_to(jnp.eye(size, head_dim)[:, None], (batch, size, heads, head_dim))
    queries = np.where(np.isfinite(scores), scores, 0).transpose(0, 2, 1, 3) * head_dim**0.5
    q = jnp.pad(queries, [(0, 0)] * 3 + [(0, head_dim - size)])
    out = policy_attention(q, one_hot, one_hot, jnp.asarray(self.case['unit_softmax/policy'])[..., 0])
    yield compare('unit_softmax/out', out[..., :size].transpose(0, 2, 1, 3), self.case['unit_softmax/out'], 1e-6)

  def train(self) -> Iterator[Quantity]:
    """The training forward with the recorded noise: masks, logits, losses, gradients."""
    yield from compare_training(self, self.file, self.case, self.pixels)


def check_case(info: CheckpointInfo, case: dict[str, np.ndarray], case_file: str | pathlib.Path) -> None:
  """ConversionError unless the case was recorded with a model of these sizes."""
  if all(s.selector != 'dynamic' for s in info.stages):
    raise ConversionError(f'{case_file}: the case needs a Dynamic-LLaVA checkpoint, this one has no predictors')
  vision, llama = info.model.vision, info.model.llama
  expected = {  # None stands for any size
    'pixel_values': (None, 3, vision.image_size, vision.image_size),
    'vision/clip_selected': (None, vision.num_patches, vision.hidden_size),
    'prefill_b1/hidden_at_sparse_layer': (None, None, llama.hidden_size),
    'prefill_b1/logits': (None, None, llama.vocab_size),
  }
  slots = slots_by_key(info)
  for at in GRADIENTS:
    names = [k.removeprefix(at) for k in case if k.startswith(at)]
    if not names:
      raise ConversionError(f'{case_file}: array {at}... is missing; expected a case of the recorded format')
    for name in names:
      if name == ROW_NORMS:
        expected[at + name] = (llama.vocab_size,)
      elif name in slots:
        rule, _, leaf = slots[name]
        expected[at + name] = rule.transform.torch_shape(leaf.slot_shape)
      else:
        raise ConversionError(
          f'{case_file}: {at}{name} is about a parameter that the model does not have; is it the case of another model?'
        )
  for name, shape in expected.items():
    if name not in case:
      raise ConversionError(f'{case_file}: array {name!r} is missing; expected a case of the recorded format')
    found = case[name].shape
    if len(found) != len(shape) or any(e not in (None, f) for e, f in zip(shape, found)):
      wanted = ', '.join('any' if e is None else str(e) for e in shape)
      raise ConversionError(
        f'{case_file}: {name} has shape {found}, the model asks for ({wanted}); is it the case of another model?'
      )
