"""Do the ways to run the model compile to the same programs as in another checkout? Asked of the compilers for CPU and for TPU.

    git worktree add ../before COMMIT
    python benchmarks/programs.py                      # figures of this checkout
    python benchmarks/programs.py --against=../before  # and of the other one beside them
    python benchmarks/programs.py --tiny               # what tests/models/test_compiled_programs.py compares with
    pip install libtpu==0.0.51; python benchmarks/programs.py --device=v5p --against=../before

Compiles prefill, a later turn's chunk, a decoding step, uncached decoding and the gradient, dense and dynamic, of a 7B model that
is never made (for TPU of one an eighth as wide, whose programs compile in a tenth of the time), and compares the compiler's FLOPs,
bytes accessed and temporaries. Cost analysis counts the layers of a stage once, so a difference in a layer is not thinned by what
surrounds it. Nothing is run or timed. Exit status 1 if a figure of this checkout is larger than the other's by more than --at_most.
Results go to benchmarks/results/programs-DEVICE.json.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = ROOT / 'tests' / 'golden' / 'programs.json'
FIGURES = {'flops': 'FLOPs', 'bytes accessed': 'bytes accessed', 'temporaries': 'bytes of temporaries'}
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'DYNLLAVA_JAX_COMPILATION_CACHE': 'off',
}


def programs(cfg, stages, dtype, batch: int, text: int, new: int):
  """(name, function, arguments as shapes) of every way to run a stage list; of checkouts of any age."""
  import jax
  import jax.numpy as jnp

  from dynllava_jax.cache import CacheSpec
  from dynllava_jax.models.dynllava import DynLlava, Prompt
  from dynllava_jax.sharding import unboxed

  try:
    from dynllava_jax.models.params import abstract_params, cut_params
  except ImportError:  # before models/params.py
    from dynllava_jax.models.dynllava import abstract_params, cut_params
  try:
    from dynllava_jax.methods.training import Drawn
    from dynllava_jax.models.batch import TrainInputs

    train_inputs = lambda start, noise, tau: (TrainInputs(start, drawn={'masks': Drawn(noise=noise, told={'tau': tau})}),)
  except ImportError:  # before methods/training.py
    train_inputs = lambda start, noise, tau: (start, 50, noise, tau)

  model = DynLlava(cfg, stages, dtype)
  num_image, size = cfg.vision.num_patches, text + cfg.vision.num_patches
  shape = lambda dims, kind=jnp.int32: jax.ShapeDtypeStruct((batch, *dims), kind)
  params = jax.eval_shape(lambda p: cut_params(p, stages), unboxed(abstract_params(cfg)))
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
  pixels = shape((cfg.vision.image_size, cfg.vision.image_size, 3), dtype)
  prompt = lambda size: Prompt(shape((size,)), shape(()), shape(()), shape((), jnp.uint32))
  row, apply = shape(()), lambda params, *args, method: model.apply({'params': params}, *args, method=method)
  image = jax.eval_shape(functools.partial(apply, method='encode_images'), params, pixels)

  def prefill(params, prompt, image):
    hidden, _, cache = apply(params, prompt, image, CacheSpec(max_new_tokens=new, later_tokens=text), method='prefill')
    return hidden, cache

  def extend(params, tokens, count, cache, *, judge):
    return model.apply({'params': params}, tokens, count, cache, judge=judge, method='extend')

  def uncached(params, prompt, image, answer_start):
    return apply(params, prompt, image, answer_start, text + new, method='recompute')

  def gradient(params, prompt, image, answer_start, noise):
    def objective(trained):
      drawn = noise if len(stages) > 1 else None, jnp.float32(0.5)
      out = apply(params | {'llama': trained}, prompt, image, *train_inputs(answer_start, *drawn), method='train_forward')
      return jnp.square(out.logits).mean()

    return jax.grad(objective)(params['llama'])

  cache = jax.eval_shape(prefill, params, prompt(size), image)[1]
  noise = shape((num_image, 2), jnp.float32), shape((size, 2), jnp.float32)
  yield 'image', functools.partial(apply, method='encode_images'), (params, pixels)
  yield 'prefill', prefill, (params, prompt(size), image)
  yield 'chunk', functools.partial(extend, judge=False), (params, shape((text,)), row, cache)
  yield 'decode', functools.partial(extend, judge=True), (params, shape((1,)), row, cache)
  yield 'uncached', uncached, (params, prompt(size + new), image, row)
  yield 'gradient', gradient, (params, prompt(size), image, row, noise)


def figures(cfg, stages, dtype, place=None, **sizes) -> dict[str, dict[str, float]]:
  """What the compiler says of each program of a stage list, on `place` (a sharding; the default device if None)."""
  import jax

  found = {}
  for name, function, shapes in programs(cfg, stages, dtype, **sizes):
    on_device = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    compiled = jax.jit(function).lower(*on_device).compile()
    cost = compiled.cost_analysis()
    found[name] = {k: cost[k] for k in ('flops', 'bytes accessed')} | {'temporaries': compiled.memory_analysis().temp_size_in_bytes}
  return found


def before_compiling(cfg, stages, dtype, **sizes) -> dict[str, dict[str, float]]:
  """FLOPs and bytes of each program of a stage list as it goes to the compiler: other figures, but at hand in a moment."""
  import jax

  found = {}
  for name, function, shapes in programs(cfg, stages, dtype, **sizes):
    cost = jax.jit(function).lower(*shapes).cost_analysis()
    found[name] = {k: cost[k] for k in ('flops', 'bytes accessed')}
  return found


def of_tiny() -> dict[str, dict[str, dict[str, float]]]:
  """`before_compiling` of the tests' tiny model, dense and dynamic."""
  import jax.numpy as jnp

  from dynllava_jax import presets
  from dynllava_jax.config import Stage

  dynamic = Stage(start=2, selector='dynamic', image_keep_rate=0.25, text_keep_budget=0.5)
  return {
    name: before_compiling(presets.TINY, stages, jnp.float32, batch=2, text=8, new=4)
    for name, stages in (('dense', (Stage(),)), ('dynamic', (Stage(), dynamic)))
  }


def of_checkout(device: str) -> dict[str, dict[str, dict[str, float]]]:
  """The figures of the package in the working directory, dense and dynamic."""
  import jax
  import jax.numpy as jnp

  from dynllava_jax import presets
  from dynllava_jax.config import Stage

  cfg, place, dtype = presets.DYNAMIC_LLAVA_7B, None, jnp.float32
  if device != 'cpu':
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform='tpu', topology_name=f'{device}:1x1' + ('x1' if device == 'v5p' else ''))
    place, dtype = jax.sharding.SingleDeviceSharding(described.devices[0]), jnp.bfloat16
    llama = dataclasses.replace(
      cfg.llama, hidden_size=512, mlp_dim=1376, num_heads=4, num_kv_heads=4, num_layers=8, vocab_size=4096
    )
    cfg = dataclasses.replace(cfg, llama=llama)
  dynamic = Stage(start=2, selector='dynamic', image_keep_rate=0.2, text_keep_budget=0.5)
  sizes = dict(batch=4, text=64, new=64)
  return {
    name: figures(cfg, stages, dtype, place, **sizes) for name, stages in (('dense', (Stage(),)), ('dynamic', (Stage(), dynamic)))
  }


def run_in(checkout: pathlib.Path, device: str) -> dict[str, dict[str, dict[str, float]]]:
  """The figures of a checkout, by a process of its own."""
  if not (checkout / 'dynllava_jax').is_dir():
    sys.exit(f'error: {checkout}: no checkout of this project (dynllava_jax/ is missing)')
  env = os.environ | ENVIRONMENT | {'PYTHONPATH': os.pathsep.join([str(checkout), os.environ.get('PYTHONPATH', '')])}
  command = [sys.executable, str(pathlib.Path(__file__).resolve()), '--worker', f'--device={device}']
  done = subprocess.run(command, cwd=checkout, env=env, stdout=subprocess.PIPE, text=True)
  if done.returncode:
    sys.exit(f'error: {checkout}: its programs did not compile')
  return json.loads(done.stdout.splitlines()[-1])


def ratio(now: float, before: float) -> float:
  """Of two figures, 1 if both are 0."""
  return 1.0 if now == before else now / before if before else float('inf')


def told(found: dict[str, float], before: dict[str, float] | None, key: str) -> str:
  """A figure in words, and beside another checkout's."""
  compared = f' ({ratio(found[key], before[key]):.4f} of {before[key]:.4g})' if before else ''
  return f'{FIGURES[key]} {found[key]:.4g}{compared}'


def costlier(this: dict, other: dict, at_most: float) -> list[str]:
  """The figures that are larger than the other's by more than the ratio `at_most`, each in words."""
  return [
    f'{kind} {name}: {told(found, other[kind][name], key)}'
    for kind, named in this.items()
    for name, found in named.items()
    for key in found
    if ratio(found[key], other[kind][name][key]) > at_most
  ]


def commit(checkout: pathlib.Path) -> str:
  """The commit of a checkout, short."""
  asked = ['git', '-C', str(checkout), 'rev-parse', '--short', 'HEAD']
  return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def main() -> None:
  """Prints and stores the figures, compared with those of another checkout if there is one."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--device', default='cpu', choices=['cpu', 'v5e', 'v6e', 'v5p'])
  parser.add_argument('--against', type=pathlib.Path, help='another checkout of this project')
  parser.add_argument('--at_most', type=float, default=1.001, help='largest ratio to the other checkout that is no failure')
  parser.add_argument(
    '--tiny', action='store_true', help='write what the everyday test compares with, after a change that is meant'
  )
  parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    print(json.dumps(of_checkout(args.device)))
    return
  sys.path.insert(0, str(ROOT))
  import jax

  from dynllava_jax.checkpoint import write_atomically

  if args.tiny:
    stored = {'jax': jax.__version__, 'figures': of_tiny()}
    write_atomically(TINY, (json.dumps(stored, indent=1) + '\n').encode())
    return

  this = run_in(ROOT, args.device)
  other = run_in(args.against.resolve(), args.device) if args.against else None
  for kind, named in this.items():
    for name, found in named.items():
      print(f'{kind:<8}{name:<9}' + ', '.join(told(found, other and other[kind][name], key) for key in found))
  stored = {'jax': jax.__version__, 'commit': commit(ROOT), 'figures': this}
  if other:
    stored |= {'against': commit(args.against), 'figures against': other}
  results = ROOT / 'benchmarks' / 'results' / f'programs-{args.device}.json'
  write_atomically(results, (json.dumps(stored, indent=1) + '\n').encode())
  if other and (larger := costlier(this, other, args.at_most)):
    sys.exit('error: larger than allowed: ' + '; '.join(larger))


if __name__ == '__main__':
  main()
