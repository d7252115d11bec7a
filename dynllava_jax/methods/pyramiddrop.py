"""PyramidDrop (arXiv 2410.17247): at several layers, image tokens that the last prompt token looks at least leave.

A layer list (8, 16, 24) with ratios (0.5, 0.25, 0.125) is one stage per layer, `Stage(start=8, selector='pyramiddrop',
image_keep_rate=0.5)` and so on: ratios are of all image tokens of the run. The attention is that of the layer that is entered, on
what reaches it. Positions are numbered anew after every cut; with `renumber=False`, not of the authors, tokens keep theirs.
"""

import dataclasses

from dynllava_jax.methods import fastv
from dynllava_jax.methods.base import Selector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """`renumber`: whether rotary positions are 0, 1, 2, ... again for what stays."""

  renumber: bool = True


SELECTOR = Selector(
  select=fastv.select,
  attention='entering',
  renumbers=lambda options: options.renumber,
  options=Options,
  source='arXiv 2410.17247, Cooperx521/PyramidDrop 6444f30',
  verified="the authors' code: scores, sets, positions per layer, cache lengths, logits and tokens; not its training",
)
