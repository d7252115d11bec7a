"""FastV (arXiv 2403.06764): image tokens that the last prompt token looks at least, in the layer before, leave.

`Stage(start=K, selector='fastv', image_keep_rate=1 - R)` is the authors' K and R. Kept tokens keep their positions. With and
without a cache the set is that of the prompt; the authors choose it anew for every token when they have no cache.
"""

from dynllava_jax.methods.base import Chosen, Selector, SelectorInputs
from dynllava_jax.ops.selection import top_indices


def select(inputs: SelectorInputs, budget: int, options) -> Chosen:
  """The `budget` image tokens with the largest attention, averaged over heads."""
  scores = inputs.attention.mean(1)
  return Chosen(index=top_indices(scores, budget), details={'scores': scores})


SELECTOR = Selector(
  select=select,
  attention='previous',
  source='arXiv 2403.06764, pkunlp-icler/FastV d165972, its llava-hf fork with a cache',
  verified="the authors' code: scores, sets, positions, cache lengths, logits and tokens",
)
