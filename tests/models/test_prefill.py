"""A prefill makes its cache once: every layer's keys and values are stacked as long as the cache is."""

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import methods, presets
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import Stage
from dynllava_jax.models.dynllava import DynLlava, Prompt
from dynllava_jax.models.params import abstract_params, cut_params
from dynllava_jax.sharding import unboxed

CFG = presets.TINY
STAGES = (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.25, text_keep_budget=0.5))
SPEC = CacheSpec(max_new_tokens=9, later_tokens=3)


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, jax.extend.core.ClosedJaxpr)):
      if isinstance(value, jax.extend.core.ClosedJaxpr):
        yield from equations(value.jaxpr)


def test_the_cache_is_not_padded_as_a_whole():
  image = methods.num_image_tokens(CFG)
  slots = image + 6
  model = DynLlava(CFG, STAGES)
  params = jax.eval_shape(lambda p: cut_params(p, STAGES), unboxed(abstract_params(CFG)))
  prompt = Prompt(jnp.zeros((2, slots), jnp.int32), jnp.full(2, slots), jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.uint32))
  features = jnp.zeros((2, image, CFG.llama.hidden_size))
  run = lambda p: model.apply({'params': p}, prompt, features, SPEC, method='prefill')[2]
  cache = jax.eval_shape(run, params)
  assert [s.k.shape[2] for s in cache.stages] == [slots + 9 + 3, 4 + 6 + 5 + 3 + 1]
  size = min(np.prod(s.k.shape) for s in cache.stages)
  whole = [e for e in equations(jax.make_jaxpr(run)(params).jaxpr) if e.primitive.name in ('pad', 'concatenate')]
  assert whole and not [e for e in whole if e.outvars[0].aval.size >= size and e.outvars[0].aval.ndim == 5]
