"""Where gates of their own judge generated tokens (`methods.gate`): one by one as they are fed, or all again without a cache.

Axes: B batch, S sequence, T generated tokens, D width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax import cache as kv
from dynllava_jax import methods
from dynllava_jax.config import ConfigError
from dynllava_jax.methods.gate import Fed, GateState, judge, new_state
from dynllava_jax.models import reduction
from dynllava_jax.models.batch import Prompt
from dynllava_jax.ops import layout

FOR_EVER = jnp.iinfo(jnp.int32).max


def start(model: Any, rows: int, spec: kv.CacheSpec) -> GateState | None:
  """Of prompts in a new cache; None for a run without such a gate. ConfigError if its guard is more than the cache holds."""
  if model.gate_stage is None:
    return None
  stage = model.stages[model.gate_stage]
  gate, options = methods.bound(stage.gate, 'gate')
  budget, guarded = kv.generated_budget(True, stage.text_keep_budget, spec), options.sinks + options.window
  if stage.text_keep_budget < 1 and budget <= guarded:
    raise ConfigError(
      f'stage at layer {stage.start}: gate {stage.gate.name} guards {guarded} tokens, but text_keep_budget '
      f'{stage.text_keep_budget} leaves room for {budget} of {spec.max_new_tokens}; raise it, or lower sinks and window'
    )
  size = max(spec.max_new_tokens, spec.given_tokens)
  return new_state(gate, options, rows, size, model.cfg.llama.hidden_size)


def window(model: Any, index: int) -> int:
  """Newest generated tokens that stage `index` does not judge yet."""
  if model.gate_stage is None or index < model.gate_stage:
    return 0
  return methods.bound(model.stages[model.gate_stage].gate, 'gate')[1].window


def feed(
  model: Any, hidden: jax.Array, token: jax.Array, told: jax.Array | None, state: GateState, active: jax.Array
) -> tuple[jax.Array, jax.Array, GateState]:
  """`methods.gate.judge` of float[B, D] hidden states that enter the gated stage, and int32[B] tokens."""
  gate, options = methods.bound(model.stages[model.gate_stage].gate, 'gate')
  margin = methods.get('dynamic').text_margin(hidden, model.text_predictor) if gate.needs_predictor else None
  return judge(gate, options, Fed(hidden=hidden, token=token, told=told, margin=margin), state, active)


def replay(
  model: Any, state: reduction.State, prompt: Prompt, answer_start: jax.Array, told: jax.Array | None
) -> tuple[reduction.State, jax.Array]:
  """Judges all generated tokens of a sequence again, as if they were fed one after the other.

  Args:
    model: the `DynLlava`; state: what reaches the gated stage.
    prompt: prompt and generated tokens; answer_start: int32[B], position of the first of these.
    told: float32[B, S, 2], `Fed.told` by position.

  Returns:
    (the state with their `Judgement`; int32[B, S], by position in the full sequence, the last position that sees a token).
  """
  batch, size = prompt.tokens.shape
  gate, options = methods.bound(model.stages[model.gate_stage].gate, 'gate')
  rows, numbers = jnp.arange(batch)[:, None], jnp.arange(size)
  here = jnp.minimum(answer_start[:, None] + numbers, size - 1)
  real = jnp.arange(state.x.shape[1]) < state.length[:, None]
  at = (
    jnp.zeros((batch, size), jnp.int32)
    .at[rows, jnp.where(real, state.positions, size)]
    .set(jnp.broadcast_to(jnp.arange(state.x.shape[1]), state.positions.shape), mode='drop')
  )
  hidden = layout.gather_rows(state.x, layout.gather_rows(at, here))
  margin = methods.get('dynamic').text_margin(hidden, model.text_predictor) if gate.needs_predictor else None
  every = Fed(
    hidden=hidden,
    token=layout.gather_rows(prompt.tokens, here),
    told=None if told is None else layout.gather_rows(told, here),
    margin=margin,
  )
  fed = jnp.arange(size)[:, None] < prompt.length - answer_start

  def step(state, inputs):
    one, active = inputs
    _, _, state = judge(gate, options, one, state, active)
    return state, None

  by_number = jax.tree.map(lambda x: x.swapaxes(0, 1), every)
  begin = new_state(gate, options, batch, size, hidden.shape[-1])
  end, _ = jax.lax.scan(step, begin, (by_number, fed))
  place = jnp.where(fed.T, answer_start[:, None] + numbers, size)
  judged = numbers < end.fed[:, None] - options.window
  last = jnp.where(end.kept, FOR_EVER, answer_start[:, None] + numbers + options.window)
  until = jnp.full((batch, size), FOR_EVER, jnp.int32).at[rows, place].set(last, mode='drop')
  old = state.judgement
  margins = jnp.where(judged & (numbers >= options.sinks), end.scores, jnp.inf)
  judgement = reduction.Judgement(
    old.keep.at[rows, place].set(end.kept, mode='drop'), old.margin.at[rows, place].set(margins, mode='drop')
  )
  return dataclasses.replace(state, judgement=judgement), until
