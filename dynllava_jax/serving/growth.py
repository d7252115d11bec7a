"""How many slots of keys and values a request takes up, stage by stage."""

from dynllava_jax import cache, costs, methods
from dynllava_jax.config import ModelConfig, Stage


def slots(model: ModelConfig, stages: tuple[Stage, ...], text: int, image: int, generated: int, kept: int) -> list[int]:
  """Slots in use in each stage, summed over its layers.

  Args:
    model, stages: what is run.
    text, image: tokens of the prompt.
    generated: tokens that were fed after it, and kept: of these, what the gate kept and did not give up.
  """
  ends = [s.start for s in stages[1:]] + [model.llama.num_layers]
  gated, share, out = False, 1.0, []
  for stage, end, image_tokens in zip(stages, ends, methods.stage_image_tokens(stages, image)):
    if methods.judges(stage):
      gated, share = True, stage.text_keep_budget
    most = cache.generated_budget(gated, share, cache.CacheSpec(max_new_tokens=max(generated, 1)))
    answer = min(kept, most) if gated else generated
    out.append(sum(min(n + answer, costs.most_held(stage)) for n in costs.stage_slots(model, stage, end, text, image_tokens)))
  return out
