"""Which parts the training of a run has, by its stages and by what its model holds."""

from dynllava_jax import methods
from dynllava_jax.config import ModelConfig, Stage
from dynllava_jax.methods.training import Training
from dynllava_jax.models import (
  trained_choices,
  trained_cuts,
  trained_exits,
  trained_experts,
  trained_masks,
  trained_routes,
  trained_votes,
)

FORWARD: dict[str, Training] = {  # by `methods.trained_by`
  '': trained_cuts.DENSE,
  'choices': trained_choices.TRAINING,
  'exits': trained_exits.TRAINING,
  'gathers': trained_cuts.TRAINING,
  'masks': trained_masks.TRAINING,
  'routes': trained_routes.TRAINING,
  'votes': trained_votes.TRAINING,
}


def parts(model: ModelConfig, stages: tuple[Stage, ...]) -> tuple[Training, ...]:
  """The first has the forward pass."""
  more = (trained_experts.TRAINING,) if model.llama.experts else ()
  return (FORWARD[methods.trained_by(stages)], *more)
