"""Rungs of a checkpoint: the stage lists that the rules give, cut alike so that all run on one set of weights, and their bytes."""

import dataclasses
from collections.abc import Mapping

from dynllava_jax import costs, methods
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import DENSE, ConfigError, ModelConfig, Piece, Stage
from dynllava_jax.controller.ladder import Need, Rung
from dynllava_jax.controller.rules import Rules

Stages = tuple[Stage, ...]


def cut(own: Stages, image: float, text: float, model: ModelConfig) -> Stages:
  """Dense up to a layer, then shares of image and text: where the checkpoint cuts, by predictors if it has them.

  Args:
    own: the checkpoint's stage list.
    image, text: shares that are kept, as `Stage.image_keep_rate` and `text_keep_budget`.
    model: what is run. Without predictors FastV ranks the image tokens, and no text is dropped.
  """
  if image == 1 and text == 1:
    return DENSE
  start = next((s.start for s in own if s.start), min(2, model.llama.num_layers - 1))
  trained = next((s for s in own if s.selector == 'dynamic'), None)
  if trained is None:
    return (Stage(), Stage(start=start, selector='fastv', image_keep_rate=image))
  # The predictor's threshold keeps less than it was trained to; a share that is followed uses the room (docs/controller.md).
  gate = Piece('predictor', {'share': text, 'gain': 0.25}) if text < 1 else None
  return (
    Stage(),
    dataclasses.replace(trained, start=start, image_tokens=0, image_keep_rate=image, text_keep_budget=text, gate=gate),
  )


def by_rules(own: Stages, model: ModelConfig, rules: Rules, phase: str, cached: bool = True) -> dict[str, Stages]:
  """Stage lists by name, one for each of `rules.levels`; those that come out alike are there once."""
  lists: dict[str, Stages] = {}
  for scarcity in rules.levels:
    image, text = rules.kept(phase, cached, scarcity)
    stages = cut(own, image, text, model)
    if stages not in lists.values():
      lists['dense' if stages == DENSE else name_of(stages)] = stages
  return lists


def name_of(stages: Stages) -> str:
  """`image 20 %, text 50 %` of the sparsest shares."""
  image, text = min(s.image_keep_rate for s in stages), min(s.text_keep_budget for s in stages)
  return f'image {100 * image:.0f} %' + (f', text {100 * text:.0f} %' if any(s.selector == 'dynamic' for s in stages) else '')


def cut_alike(lists: Mapping[str, Stages]) -> dict[str, Stages]:
  """The same runs, all with stages that begin at the same layers: then one set of cut weights serves them all.

  Raises:
    ConfigError: a list would have to be cut behind a layer where its image tokens have become fewer.
  """
  starts = sorted({s.start for stages in lists.values() for s in stages})
  return {name: _cut_at(name, stages, starts) for name, stages in lists.items()}


def _cut_at(name: str, stages: Stages, starts: list[int]) -> Stages:
  out: list[Stage] = []
  for start in starts:
    own = next((s for s in stages if s.start == start), None)
    if own is None and any(s.selector != 'all' for s in out):
      raise ConfigError(
        f'ladder: {name} drops tokens before layer {start}, where another rung begins a stage; let all rungs cut at the same layers'
      )
    out.append(own or dataclasses.replace(out[-1], start=start))
  return tuple(out)


def rungs(model: ModelConfig, lists: Mapping[str, Stages], width: float, reducer: Piece | None = None) -> tuple[Rung, ...]:
  """Rungs of stage lists, cut alike. `width`: bytes of a number in the cache. ConfigError if the model cannot be run so."""
  made = []
  for name, stages in cut_alike(lists).items():
    methods.check_run(model, stages, reducer)

    def size(need: Need, stages: Stages = stages) -> int:
      return sum(costs.cache_bytes(model, stages, need.text, CacheSpec(max_new_tokens=need.new), width, reducer))

    made.append(Rung(name, stages, size))
  return tuple(made)
