"""Gates: tokens stay that the model found unlikely (surprisal), or that stand where much was possible (entropy), both in nats.

Self-information as a measure of what context is worth is that of Selective Context (Li et al., arXiv 2304.12102); applied here to
generated tokens, one by one, as they are fed.
"""

from dynllava_jax.methods.gate import Gate

SURPRISAL = Gate(score=lambda fed, state, options: fed.told[:, 0], needs_told=True, source='after arXiv 2304.12102')
ENTROPY = Gate(score=lambda fed, state, options: fed.told[:, 1], needs_told=True)
