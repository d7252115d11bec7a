"""The formula of a prefill's FLOPs against the compiler's count, for a method of each site where tokens or keys leave.

Not for layer kinds: of a `cond` the compiler counts the dearest branch. What hollow attention saves is tested in tests/ops.
"""

import jax
import jax.numpy as jnp
import pytest

from dynllava_jax import methods, sharding
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import DENSE, LlamaConfig, ModelConfig, Piece, Stage, VisionConfig
from dynllava_jax.evals import costs
from dynllava_jax.models.dynllava import DynLlava, Prompt
from dynllava_jax.models.params import abstract_params, cut_params

# The compiler counts the body of a loop once: no loop here has more than one layer. Wide, so that matrix products are most of it.
MODEL = ModelConfig(
  vision=VisionConfig(image_size=112, hidden_size=256, mlp_dim=512, num_layers=2, num_heads=4),
  llama=LlamaConfig(vocab_size=256, hidden_size=512, mlp_dim=1024, num_layers=2, num_heads=4, num_kv_heads=4),
)
TEXT = 16
TWO = (Stage(), Stage(start=1))
RUNS = {
  'dense': (TWO, None),
  'visionzip': (TWO, Piece('visionzip', {'dominant': 12, 'contextual': 4})),
  'fastv': ((Stage(), Stage(start=1, selector='fastv', image_tokens=16)), None),
  'snapkv': (tuple(Stage(start=s.start, compressor=Piece('snapkv', {'ratio': 0.75, 'window': 4})) for s in TWO), None),
}


@pytest.mark.parametrize('name', RUNS)
def test_the_compiler_counts_what_the_formula_says(name):
  stages, reducer = RUNS[name]
  methods.check_run(MODEL, stages, reducer)
  model, spec = DynLlava(MODEL, stages, reducer=reducer), CacheSpec(max_new_tokens=4)
  array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
  size = TEXT + methods.num_image_tokens(MODEL, reducer)
  prompt = Prompt(array(1, size), array(1), array(1), array(1, dtype=jnp.uint32))
  params = jax.eval_shape(lambda p: cut_params(p, stages), sharding.unboxed(abstract_params(MODEL)))

  def prefill(params, prompt, pixels):
    call = lambda method, *args: model.apply({'params': params}, *args, method=method)
    hidden, _, cache = call('prefill', prompt, call('encode_images', pixels), spec)
    return call('logits', hidden[:, -1]), cache

  pixels = array(1, 112, 112, 3, dtype=jnp.float32)
  counted = jax.jit(prefill).lower(params, prompt, pixels).compile().cost_analysis()['flops']
  assert costs.sample_flops(MODEL, stages, TEXT, [], spec, reducer=reducer) == pytest.approx(counted, rel=0.05)


def test_every_registered_reduction_costs_less_by_both_conventions():
  """No method is counted as if it did nothing where it removes tokens from the decoder, nor as if it cost nothing."""
  dense, spec = costs.decoder_flops(MODEL, DENSE), CacheSpec(max_new_tokens=4)
  paper = lambda stages, reducer=None: costs.paper_flops(costs.paper_setting(MODEL, stages, reducer))
  whole = costs.sample_flops(MODEL, DENSE, TEXT, [], spec)
  for stages, reducer in (RUNS['visionzip'], RUNS['fastv']):
    assert 0.2 * dense < costs.decoder_flops(MODEL, stages, reducer) < 0.7 * dense
    assert paper(stages, reducer) < 0.7 * paper(DENSE)
    assert costs.sample_flops(MODEL, stages, TEXT, [], spec, reducer=reducer) < whole
  stages, _ = RUNS['snapkv']
  assert costs.sample_flops(MODEL, stages, TEXT, [], spec) == whole
  assert sum(costs.cache_bytes(MODEL, stages, TEXT, spec, 4)) < 0.6 * sum(costs.cache_bytes(MODEL, TWO, TEXT, spec, 4))
