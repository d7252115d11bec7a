"""Early exit where the exit head is sure: 1 - the probability of its favourite is at most the threshold. The oldest of criteria
(BranchyNet, arXiv 1709.01686, by entropy; CALM, arXiv 2207.07061, by the softmax), beside that of DeeR."""

from dynllava_jax.methods.exits import Exit

EXIT = Exit(measure=lambda here, before, options: 1 - here.max(-1), source='after CALM, arXiv 2207.07061')
