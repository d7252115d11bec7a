"""What early exits measure of questions (`methods.exits`), by which thresholds are solved for."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import sharding
from dynllava_jax.config import EvalConfig
from dynllava_jax.data.pipeline import to_mesh
from dynllava_jax.evals.benchmarks.base import Question
from dynllava_jax.evals.exit_thresholds import limited
from dynllava_jax.evals.hosts import own_part
from dynllava_jax.evals.layout import Layout, Loaded, load_weights
from dynllava_jax.generate import Generator
from dynllava_jax.methods.exits import NEVER, TOKEN, decided_per


def measure(cfg: EvalConfig, loaded: Loaded, questions: Sequence[Question], mesh: jax.sharding.Mesh) -> np.ndarray:
  """float32[E, Q]: what each exit measures if nobody leaves, behind each prompt and, per token, behind each token of the answer.

  The last row is of the last layer, behind which all leave: zeros.
  """
  stages = tuple(s if s.exit is None else dataclasses.replace(s, exit=limited(s.exit, NEVER)) for s in loaded.stages)
  never = dataclasses.replace(loaded, stages=stages)
  layout = Layout(never, questions, cfg.text_lengths, cfg.seed)
  room = dict(max_new_tokens=cfg.max_new_tokens, later_tokens=layout.later_tokens())
  generator = Generator(
    loaded.model,
    stages,
    load_weights(never, mesh),
    eos_id=loaded.tokenizer.eos_id,
    dtype=jnp.dtype(cfg.dtype),
    reducer=loaded.reducer,
    **room,
  )
  exits = [i for i, s in enumerate(stages) if s.exit and i + 1 < len(stages)]
  found = []
  for chunk in layout.batches(range(len(questions)), cfg.batch_size):
    rows = to_mesh(layout.rows(own_part(chunk, cfg.batch_size, mesh)), sharding.batch_sharding(mesh))
    turn, _ = generator.start(rows.prompt, rows.pixels)
    active = np.arange(len(rows.prompt.length)) < len(chunk)  # the rest fills the batch
    found.append(np.asarray(turn.cache.left.value)[active][:, exits])
    for _ in range(cfg.max_new_tokens - 1 if decided_per(stages) == TOKEN else 0):
      tokens = np.asarray(turn.logits).argmax(-1).astype(np.int32)
      active &= tokens != loaded.tokenizer.eos_id
      if not active.any():
        break
      turn, _ = generator.step(turn, jnp.asarray(tokens), jnp.asarray(active))
      found.append(np.asarray(turn.cache.left.value)[active][:, exits])
  values = np.concatenate(found).T
  return np.concatenate([values, np.zeros_like(values[:1])])
