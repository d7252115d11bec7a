"""Layers that are stacked together: those of a stage, or every n-th of them where layers of several kinds take turns.

A stage whose layers are alike is one stack. Where some have a router they see shorter sequences and keep smaller caches, so layers
of one kind are a stack of their own; the stage is then a scan over groups of layers, one of each stack.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from dynllava_jax import methods
from dynllava_jax.config import Piece, Stage
from dynllava_jax.models.layer_types import Context, LayerOutput
from dynllava_jax.models.layers import REMAT


@dataclasses.dataclass(frozen=True)
class Stack:
  """Some layers of a decoder: `stage` is the number of the stage that they are in."""

  stage: int
  layers: range


def stacks_of(stages: tuple[Stage, ...], num_layers: int) -> tuple[Stack, ...]:
  """The stacks of a decoder of `num_layers` layers, stage by stage; those of a stage in the order of their first layers."""
  found, ends = [], [s.start for s in stages[1:]] + [num_layers]
  for number, (stage, end) in enumerate(zip(stages, ends)):
    routing, options = methods.routing_of(stage)
    marks = (False,) * num_layers if routing is None else routing.layers(num_layers, options)
    marks = marks[stage.start : end]
    period = next(n for n in range(1, len(marks) + 1) if len(marks) % n == 0 and marks[n:] == marks[:-n])
    found += [Stack(number, range(first, end, period)) for first in range(stage.start, stage.start + period)]
  return tuple(found)


def routed_stages(piece: Piece, num_layers: int, together: int = 4) -> tuple[Stage, ...]:
  """A run of all layers with the routers of a piece.

  Layers that take turns are one stage. Where a run of layers has routers a few of them `together` are one, whose caches have room
  for what the first of them lets pass.
  """
  routing, options = methods.routing_of(Stage(layers=piece))
  marks = routing.layers(num_layers, options)
  changes = [i for i in range(1, num_layers) if marks[i] != marks[i - 1]]
  if len(changes) > 2:
    return (Stage(layers=piece),)
  bounds = itertools.pairwise([0, *changes, num_layers])
  starts = [i for first, end in bounds for i in (range(first, end, together) if marks[first] else [first])]
  return tuple(Stage(start=i, layers=piece if marks[i] else None) for i in starts)


def scan_groups(
  blocks: Sequence[nn.Module],
  variables: Any,
  remat: str,
  x: jax.Array,
  contexts: Sequence[Context],
  held: Sequence[Any] | None,
  flags: dict[str, jax.Array],
) -> tuple[jax.Array, tuple[LayerOutput, ...]]:
  """Runs a stage whose layers take turns.

  Args:
    blocks: a layer of each stack, unbound.
    variables: of all layers of the stage, [L, ...], unboxed: cut into groups where they lie.
    remat: as `layers.scan_layers` has it.
    x: float[B, T, D]; contexts: of each stack.
    held: of each stack what its layers cached, [L / stacks, ...]; None without a cache.
    flags: of all layers of the stage.

  Returns:
    (float[B, T, D], of each stack what its layers give).
  """
  by_group = lambda tree: jax.tree.map(lambda w: w.reshape(-1, len(blocks), *w.shape[1:]), tree)

  def group(x, of_group):
    weights, caches, marks = of_group
    outputs = []
    for j, (block, context) in enumerate(zip(blocks, contexts)):
      run = lambda weights, x, cache, marks, block=block, context=context: block.apply(weights, x, context, cache, marks)
      if remat != 'none':
        run = jax.checkpoint(run, prevent_cse=False, policy=REMAT[remat])
      mine, marked = jax.tree.map(lambda w: w[j], (weights, marks))
      x, output = run(mine, x, None if caches is None else caches[j], marked)
      outputs.append(output)
    return x, tuple(outputs)

  return jax.lax.scan(group, x, (by_group(variables), None if held is None else tuple(held), by_group(flags)))
