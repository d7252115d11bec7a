"""Parameter groups that methods bring beside those of a LLaVA: which models and runs have a use for them, how fast they learn.

What each is made of says `models/groups.py`, under the same names. Whoever makes, cuts, trains, freezes, loads or checks parameters
walks these tables and names no method.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from dynllava_jax.config.model import ModelConfig
from dynllava_jax.config.run import Stage, judges_instructions

LLAVA = ('vision', 'projector', 'llama')  # groups of every model
STORED_ALONG = ('vision_tail', 'clip_text')  # groups that checkpoints carry and only some reducers look at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """A method's parameters, `params[name]`.

  Attributes:
    field: of `ModelConfig`, which describes them; a model where it is None has none.
    what: what they are, for messages.
    asked: whether a run of these stages computes with them. What is not asked need not be there.
    trained: whether training of these stages moves them; None for `asked`. What is not trained is left as it is.
    option: field of the description without which it has no such group; '' if all have it.
    rate: whose learning rate it has, 'predictor' or 'model'.
    layered: whether it holds weights of decoder layers, which are stacked and cut into stages as the decoder's own are.
  """

  field: str
  what: str
  asked: Callable[[tuple[Stage, ...]], bool]
  trained: Callable[[tuple[Stage, ...]], bool] | None = None
  option: str = ''
  rate: str = 'predictor'
  layered: bool = False

  def of(self, model: ModelConfig) -> Any:
    """The description of a model's group; None if it has no such group."""
    described = getattr(model, self.field)
    return described if described is not None and (not self.option or getattr(described, self.option)) else None

  def learns(self, stages: tuple[Stage, ...]) -> bool:
    """Whether training of these stages moves it."""
    return (self.trained or self.asked)(stages)


def _chooses_image(stages: tuple[Stage, ...]) -> bool:
  return any(s.selector == 'dynamic' for s in stages)


def _judges_text(stages: tuple[Stage, ...]) -> bool:
  return _chooses_image(stages) or any(s.gate is not None and s.gate.name == 'predictor' for s in stages)


def _always(stages: tuple[Stage, ...]) -> bool:
  return True


def _routes(stages: tuple[Stage, ...]) -> bool:
  return any(s.layers is not None and s.layers.name in ROUTING for s in stages)


def _by_reducer(stages: tuple[Stage, ...]) -> bool:
  return False  # a run's stages say nothing of its reducer


PREDICTORS = 'predictors'
ROUTING = ('pmod', 'videollm_mod')
GROUPS: dict[str, Group] = {
  'image_predictor': Group(field='predictor', what=PREDICTORS, asked=_chooses_image, trained=_always),
  'text_predictor': Group(field='predictor', what=PREDICTORS, asked=_judges_text, trained=_always),
  'instruct_predictor': Group(field='predictor', what=PREDICTORS, asked=judges_instructions, option='instruct'),
  'routers': Group(field='routers', what='routers', asked=_routes, layered=True),
  'dpn': Group(field='dpn', what='pooling routers', asked=lambda stages: any(s.selector in ('dpn', 'dpn_routed') for s in stages)),
  'exit_head': Group(field='exit_head', what='exit head', asked=lambda stages: any(s.exit for s in stages), rate='model'),
  'memory': Group(field='memory', what='memory tokens', asked=_by_reducer, trained=_always),
  'memory_adapter': Group(field='memory', what='memory tokens', asked=_by_reducer, trained=_always, layered=True),
  'pruning': Group(
    field='pruning',
    what='weights by which layers vote on their context',
    asked=lambda stages: any(s.layers is not None and s.layers.name == 'dynamic_context_pruning' for s in stages),
    layered=True,
  ),
  'relevance': Group(field='relevance', what='score of image tokens', asked=lambda stages: any(s.revisit for s in stages)),
}


def groups_of(model: ModelConfig) -> dict[str, Group]:
  """Those that a model has, by name."""
  return {name: group for name, group in GROUPS.items() if group.of(model) is not None}


def idle(stages: tuple[Stage, ...]) -> tuple[str, ...]:
  """Groups that training of these stages has no use for."""
  return tuple(name for name, group in GROUPS.items() if not group.learns(stages))


def layered() -> tuple[str, ...]:
  """Groups with weights of decoder layers."""
  return tuple(name for name, group in GROUPS.items() if group.layered)


def without_methods(model: ModelConfig) -> ModelConfig:
  """The same model without what methods bring."""
  return dataclasses.replace(model, **{group.field: None for group in GROUPS.values()})


def grown(theirs: ModelConfig, ours: ModelConfig) -> dict[str, tuple[str, Any]]:
  """What `ours` describes otherwise than `theirs`: by field, what it is and what they have. What they lack may be added."""
  other = {}
  for group in GROUPS.values():
    old, new = (getattr(m, group.field) for m in (theirs, ours))
    options = {g.option: False for g in GROUPS.values() if g.field == group.field and g.option}
    if old is not None and new is not None and old not in (new, dataclasses.replace(new, **options)):
      other[group.field] = group.what, old
  return other
