"""Experts in training (MoE-LLaVA, arXiv 2401.15947), beside any forward pass: noise, room for so many tokens, a balanced load.

Axes: B batch, S sequence, L decoder layers, E experts.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dynllava_jax.config import Objective
from dynllava_jax.methods.training import Drawn, Shape, Training
from dynllava_jax.models.batch import Prompt, TrainInputs, TrainOutput
from dynllava_jax.models.experts import Learning
from dynllava_jax.models.layer_types import LayerOutput

NAME = 'experts'
NOISE = 2**31 + 3  # what the key of the noise is made with
OF_LAYERS = 'expert_'  # how what layers tell is called


def draw(key: jax.Array, shape: Shape, progress: jax.Array, objective: Objective) -> Drawn:
  """float32[B, L, S, E]: Gumbel noise for the second choice, or, of a single one, who keeps a place."""
  del progress, objective
  llama = shape.model.llama
  sizes = (shape.rows, llama.num_layers, shape.positions, llama.experts.count)
  of = jax.random.gumbel if llama.experts.top_k > 1 else jax.random.uniform
  return Drawn(noise=of(jax.random.fold_in(key, NOISE), sizes))


def learning(model: Any, inputs: TrainInputs, objective: Objective, length: jax.Array, size: int) -> dict[str, Any]:
  """What `DynLlava.run_layers` is given besides for sequences of `size` rows, of which int32[B] `length` are real."""
  if model.cfg.llama.experts is None:
    return {}
  real = jnp.arange(size) < length[:, None]
  return dict(drawn=inputs.of(NAME).noise, learning=Learning(real, objective.experts.capacity_factor))


def seen(outputs: Sequence[LayerOutput]) -> dict[str, jax.Array]:
  """What the layers with experts told, of all stages, one behind the other."""
  names = dict.fromkeys(n for out in outputs for n in out.details if n.startswith(OF_LAYERS))
  return {name: jnp.concatenate([out.details[name] for out in outputs if name in out.details]) for name in names}


def losses(
  out: TrainOutput, prompt: Prompt, inputs: TrainInputs, objective: Objective, counts: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Weighed, the balance of all layers; the fullest expert's share of first choices. Parts of a batch each have their capacity."""
  del prompt, inputs
  balance = counts.share * out.seen['expert_balance'].sum()
  load = counts.share * out.seen['expert_load'].max(-1).mean()
  return {NAME: objective.experts.balance_weight * balance}, {'expert_balance': balance, 'expert_load': load}


TRAINING = Training(name=NAME, draw=draw, losses=losses)
