"""A decoder layer whose rows vote on what stands before them (`methods.voting`): what its attention sees, and what it leaves.

Axes: B batch, T new tokens, S sequence, N heads, K kv heads, H head dim.
"""

import dataclasses
from typing import Any

import jax

from dynllava_jax import methods, pruned_cache
from dynllava_jax.arrangement import Arrangement
from dynllava_jax.config import Stage
from dynllava_jax.methods import LayerKind
from dynllava_jax.models.layer_types import Context, LayerOutput
from dynllava_jax.ops.pruning import Ballot, Survival, Votes, pruned_attention, vote


def votes_of(stage: Stage, y: jax.Array, flags: Any, seen_by_pieces: bool) -> Votes | None:
  """Of normalised rows float[B, T, D]; None where nobody votes, as in passes that are of no use to the stage's pieces."""
  kind, options = methods.bound(stage.layers, 'layers', LayerKind())
  return kind.voting.votes(y, flags, options) if kind.voting and seen_by_pieces else None


def over_cache(votes: Votes, voted: tuple[jax.Array, ...], context: Context) -> tuple[dict[str, jax.Array], Ballot]:
  """(what new tokens see, as `cached_attention` takes it; what their votes come to). `voted`: what is scored, slots in use."""
  ballot = vote(votes, *voted, context.count)
  return dict(seen=ballot.seen, among=ballot.among), dataclasses.replace(ballot, seen=None, among=None)


def over_rows(q, k, v, votes: Votes, context: Context) -> tuple[jax.Array, Survival, dict[str, jax.Array]]:
  """Of a sequence: (`pruned_attention`, what is left, details)."""
  y, survival = pruned_attention(q, k, v, votes, context.rows.length, context.softness)
  return y, survival, {'survival': survival.of_keys, 'survival_total': survival.total, 'scores': survival.scores}


def left_of_prompt(
  output: LayerOutput, stage: Stage, votes: Votes, survival: Survival, context: Context, lies: Arrangement
) -> LayerOutput:
  """`output` with keys and values as a `PrunedCache` has them, with `Context.room`."""
  kind, options = methods.bound(stage.layers, 'layers')
  size = pruned_cache.limit(kind.voting.holds(options), output.k.shape[1], context.room)
  k, v, held = pruned_cache.of_prompt(output.k, output.v, votes.k, survival, size, lies)
  return dataclasses.replace(output, k=k, v=v, held=held)
