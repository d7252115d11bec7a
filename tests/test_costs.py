"""FLOPs of a prefill by the formula and by the compiler, and bytes of its cache, of every method.

Not for layer kinds: of a `cond` the compiler counts the dearest branch. What hollow attention saves is tested in tests/ops.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dynllava_jax import costs, methods, sharding
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import (
  DENSE,
  ClipTextConfig,
  EvalRun,
  LlamaConfig,
  ModelConfig,
  Piece,
  Stage,
  VisionConfig,
  from_config_dict,
)
from dynllava_jax.evals import budgets
from dynllava_jax.models.dynllava import DynLlava, Prompt
from dynllava_jax.models.params import abstract_params, cut_params

# The compiler counts the body of a loop once: no loop here has more than one layer. Wide, so that matrix products are most of it.
MODEL = ModelConfig(
  vision=VisionConfig(image_size=112, hidden_size=256, mlp_dim=512, num_layers=2, num_heads=4),
  llama=LlamaConfig(vocab_size=256, hidden_size=512, mlp_dim=1024, num_layers=2, num_heads=4, num_kv_heads=4),
  clip_text=ClipTextConfig(vocab_size=64, hidden_size=256, mlp_dim=512, num_layers=1, num_heads=4, num_positions=16, embed_dim=64),
)
TEXT = 16
TWO = (Stage(), Stage(start=1))
RUNS = {
  'dense': (TWO, None),
  'visionzip': (TWO, Piece('visionzip', {'dominant': 12, 'contextual': 4})),
  'fastv': ((Stage(), Stage(start=1, selector='fastv', image_tokens=16)), None),
  'snapkv': (tuple(Stage(start=s.start, compressor=Piece('snapkv', {'ratio': 0.75, 'window': 4})) for s in TWO), None),
}


def every_method() -> dict[str, tuple[ModelConfig, EvalRun]]:
  """All of them at 14 of 64 image tokens, on a decoder that has as many layers as the method has stages."""
  found = {}
  for layers in (1, 2, 4):
    model = dataclasses.replace(MODEL, llama=dataclasses.replace(MODEL.llama, num_layers=layers))
    without = ('redundancylens',) if layers == 4 else ('redundancylens', 'pyramiddrop')  # which needs a layer for each cut
    rows = budgets.rows(budgets.Setting(model=model, cut=1, average=False), (14,), without)
    pictures = {name: row for name, row in rows.items() if 'image_size' not in row}
    found |= {n: (model, row) for n, row in pictures.items() if [s['start'] for s in row['stages']] == list(range(layers))}
  return {name: (model, from_config_dict(EvalRun, row, name)) for name, (model, row) in found.items()}


EVERY = every_method()


@pytest.mark.parametrize('name', RUNS)
def test_the_compiler_counts_what_the_formula_says(name):
  check_costs(MODEL, *RUNS[name])


@pytest.mark.slow
@pytest.mark.parametrize('name', EVERY)
def test_the_compiler_counts_what_the_formula_says_of_other_methods(name):
  model, run = EVERY[name]
  check_costs(model, run.stages, run.reducer)


def test_no_method_is_left_out_of_the_count():
  assert {run.method for _, run in EVERY.values()} == {*budgets.registered(), 'dense'} - {*budgets.NO_BUDGET}


def check_costs(config: ModelConfig, stages: tuple[Stage, ...], reducer: Piece | None) -> None:
  """Compares FLOPs of a compiled prefill within 5 %, and the bytes of its cache exactly."""
  methods.check_run(config, stages, reducer)
  model, spec = DynLlava(config, stages, reducer=reducer), CacheSpec(max_new_tokens=4)
  array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
  size = TEXT + methods.num_image_tokens(config, reducer)
  prompt = Prompt(array(1, size), array(1), array(1), array(1, dtype=jnp.uint32), question=array(1, 1, 16))
  tail = methods.needs_tail(config, reducer)
  params = jax.eval_shape(lambda p: cut_params(p, stages), sharding.unboxed(abstract_params(config, with_tail=tail)))

  def prefill(params, prompt, pixels):
    call = lambda method, *args: model.apply({'params': params}, *args, method=method)
    image = call('reduce_images', pixels, prompt.question)
    hidden, _, cache = call('prefill', prompt, image.tokens, spec, image.group)
    return call('logits', hidden[:, -1]), cache

  pixels = array(1, 112, 112, 3, dtype=jnp.float32)
  lowered = jax.jit(prefill).lower(params, prompt, pixels)
  held = sum(x.size * x.dtype.itemsize for s in lowered.out_info[1].stages for x in (s.k, s.v))
  assert held == sum(costs.cache_bytes(config, stages, TEXT, spec, 4, reducer))
  counted = lowered.compile().cost_analysis()['flops']
  assert costs.sample_flops(config, stages, TEXT, [], spec, reducer=reducer) == pytest.approx(counted, rel=0.05)


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
  assert whole < costs.sample_flops(MODEL, stages, TEXT, [], spec) < 1.001 * whole  # it looks at four rows
  assert sum(costs.cache_bytes(MODEL, stages, TEXT, spec, 4)) < 0.6 * sum(costs.cache_bytes(MODEL, TWO, TEXT, spec, 4))
