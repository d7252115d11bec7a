"""Do prefill and decoding of the real models fit TPU chips, and training? Asked of the TPU compiler itself; no TPU is needed.

    pip install libtpu==0.0.51
    python benchmarks/tpu_fit.py                   # all programs, a few minutes each on two cores
    python benchmarks/tpu_fit.py lora_7b_v5p       # one

Prints, per device, what the program holds at most next to the memory of the chip, and the compiler's estimate of the time that one
run takes, without collectives; of decoding that of a token. Nothing is run. `training/ahead.py` compiles and reads, as it does for
`train.py --compile_for`; benchmarks/scale.py has training on pods. Results go to benchmarks/results/tpu_fit.json.
"""

# ruff: noqa: E402
import datetime
import importlib.metadata
import json
import pathlib
import sys

import checkout  # noqa: F401

from dynllava_jax.training import machines

machines.pretend(machines.read('v5p:1x1x1', 'benchmarks'))  # before jax

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from dynllava_jax import presets, sharding
from dynllava_jax.checkpoint import write_atomically
from dynllava_jax.config import DENSE, DataConfig, LoraConfig, ModelConfig, Stage, TrainConfig
from dynllava_jax.display import Terminal
from dynllava_jax.generate import Generator
from dynllava_jax.models.dynllava import Prompt
from dynllava_jax.models.params import abstract_params, cut_params
from dynllava_jax.training import ahead

RESULTS = pathlib.Path(__file__).parent / 'results' / 'tpu_fit.json'
DYNAMIC = (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.2, text_keep_budget=0.5))
CHIP = machines.read('v5p:1x1x1', 'CHIP')


def train(model: ModelConfig, lora: LoraConfig, frozen: tuple[str, ...] = ('vision',)) -> ahead.Compiled:
  """A training step of one row of 2,048 positions on one chip."""
  run = TrainConfig(
    model=model,
    stages=DYNAMIC if model.predictor else DENSE,
    data=DataConfig(text_length=1472),
    init_from='base',
    lora=lora,
    frozen=frozen,
    batch_size=1,
    dtype='bfloat16',
    remat='block',
  )
  return ahead.compile_step(run, sharding.make_mesh(run.mesh, ahead.devices(CHIP)), CHIP.chip.clock)


def generate(model: ModelConfig, stages: tuple[Stage, ...], batch: int, text: int, new: int, part: str) -> ahead.Compiled:
  """Prefill, or the decoding loop, of `Generator` on one chip, everything in bfloat16."""
  place = SingleDeviceSharding(ahead.devices(CHIP)[0])
  on_chip = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
  half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), sharding.unboxed(abstract_params(model)))
  params = on_chip(jax.eval_shape(lambda p: cut_params(p, stages), half))
  b = ahead.abstract_batch(TrainConfig(model=model, batch_size=batch), text, place)
  generator = Generator(model, stages, params, max_new_tokens=new, eos_id=2, dtype=jnp.bfloat16)
  prompt = Prompt(b.tokens, b.length, b.image_start, b.seed)
  if part == 'prefill':
    return ahead.compile_program(generator._prefill.lower(params, prompt, b.pixels), CHIP.chip.clock)
  turn, kept = on_chip(jax.eval_shape(generator._prefill, params, prompt, b.pixels))
  lowered = generator._decode.lower(params, turn.logits, cache=turn.cache, seed=b.seed, kept_image=kept)
  return ahead.compile_program(lowered, CHIP.chip.clock)


PROGRAMS = {
  'lora_7b_v5p': lambda: train(presets.LLAVA_1_5_7B, LoraConfig()),
  'lora_int8_7b_v5p': lambda: train(presets.LLAVA_1_5_7B, LoraConfig(base='int8')),
  'lora_dynamic_7b_v5p': lambda: train(presets.DYNAMIC_LLAVA_7B, LoraConfig(), ('vision', 'projector')),
}
for name, stages in (('dense', DENSE), ('dynamic', DYNAMIC)):
  for part in ('prefill', 'decode'):
    PROGRAMS[f'{part}_7b_v5p_{name}'] = lambda stages=stages, part=part: generate(
      presets.DYNAMIC_LLAVA_7B, stages, 16, 64, 256, part
    )


def main(names: list[str]) -> None:
  """Compiles the named programs, all of them by default."""
  unknown = set(names) - set(PROGRAMS)
  if unknown:
    sys.exit(f'error: no program {", ".join(sorted(unknown))}; expected {", ".join(PROGRAMS)}')
  for name in names or PROGRAMS:
    compiled = PROGRAMS[name]()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = {
      'gib_per_device': round(compiled.held / machines.GIB, 2),
      'arguments_gib': round(compiled.arguments / machines.GIB, 2),
      'temporaries_gib': round(compiled.temporaries / machines.GIB, 2),
      'chip_gib': CHIP.chip.memory / machines.GIB,
      'estimated_ms': round(1e3 * compiled.seconds, 1),
      'date': str(datetime.date.today()),
      'jax': jax.__version__,
      'libtpu': importlib.metadata.version('libtpu'),
    }
    write_atomically(RESULTS, (json.dumps(results, indent=1) + '\n').encode())
    Terminal().print(f'{name}: compiled in {compiled.compile_seconds:.0f} s; {json.dumps(results[name])}')


if __name__ == '__main__':
  main(sys.argv[1:])
