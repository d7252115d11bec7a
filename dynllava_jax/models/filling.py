"""What the layers of a stage give of a prompt, as the cache that new tokens are run on."""

from typing import Any

import jax.numpy as jnp

from dynllava_jax import cache as kv
from dynllava_jax import methods, pruned_cache
from dynllava_jax.models import gating
from dynllava_jax.models.batch import Prompt
from dynllava_jax.models.layer_types import LayerOutput
from dynllava_jax.models.reduction import State


def stage_cache(
  model: Any, index: int, state: State, stream: Any, out: LayerOutput, prompt: Prompt, spec: kv.CacheSpec
) -> kv.StageCache | pruned_cache.PrunedCache:
  """The cache of stage `index`.

  Args:
    model: the `DynLlava`; state: the sequence behind the stage's layers.
    stream: float[B, S, D], the sequence that entered them; out: what they gave, with room as `kv.room_behind` says.
    prompt: the batch; spec: what the cache has room for.
  """
  length, shift, candidates = state.places, state.shift, None
  if out.held is not None:
    kind, options = methods.bound(model.stages[index].layers, 'layers')
    settings = dict(tokens=kind.voting.holds(options), spec=spec, shift=shift, arrangement=model.arrangement)
    return pruned_cache.from_prompt(out.k, out.v, out.held, state.positions, length, **settings)
  if choosing := model.chooser_of(index):
    rows = state.rows(prompt.image_start)
    candidates = choosing.candidates(out.candidates, stream, state.rotary, rows)
    length = length - jnp.where(candidates.present, rows.num_image, 0)
  if out.length is not None:  # compressed
    length, shift = out.length[0], shift if out.shift is None else out.shift[0] + (0 if shift is None else shift)
  gated, budget = model.gate(index)
  settings = dict(gated=gated, text_keep_budget=budget, spec=spec, arrangement=model.arrangement, candidates=candidates)
  return kv.from_prompt(out.k, out.v, length, shift=shift, first=out.first, window=gating.window(model, index), **settings)
