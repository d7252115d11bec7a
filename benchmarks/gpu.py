"""What sparsity saves on a GPU (or TPU) at full size: latency and memory of prefill and decoding, with and without a KV cache.

    pip install -c requirements.txt 'jax[cuda12]'
    python benchmarks/gpu.py                                  # 7B, batches of 1 and 8, 1,000 generated tokens
    python benchmarks/gpu.py --model 13b --rows 1 --new 256

The quantities of the efficiency tables of Dynamic-LLaVA (arXiv 2412.00876, Tables 4 and 14): prefill, decoding with and without a
cache, and memory, dense and dynamic. 20 % of the image tokens are kept; of the generated ones, as weights are random, the share
that is printed (`kept`), with room for half. bfloat16, `--text` tokens and 576 of the image per prompt.
Each run is a process of its own, whose peak of device memory is that of it alone. Writes benchmarks/results/gpu_MODEL.json.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent.parent))
MODELS = ('7b', '13b', 'tiny')
KINDS = ('dense', 'dynamic')
PARTS = ('prefill', 'decode', 'uncached')
LONGEST_UNCACHED = 64  # tokens that are generated without a cache; each costs a prefill


def measure(args: argparse.Namespace) -> dict:
  """One kind and part in this process: seconds of each repetition, and what the device held at most."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from dynllava_jax import presets, sharding
  from dynllava_jax.config import DENSE, Stage
  from dynllava_jax.generate import Generator
  from dynllava_jax.models.dynllava import Prompt
  from dynllava_jax.models.params import abstract_params, cut_params

  model = {'7b': presets.DYNAMIC_LLAVA_7B, '13b': presets.DYNAMIC_LLAVA_13B, 'tiny': presets.TINY}[args.model]
  stages = (
    DENSE if args.kind == 'dense' else (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.2, text_keep_budget=0.5))
  )
  shapes = jax.eval_shape(lambda p: cut_params(p, stages), sharding.unboxed(abstract_params(model)))
  draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
  keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.ones(x.shape, jnp.bfloat16) if path[-1].key == 'scale' else draw(next(keys), x.shape), shapes
  )
  new = min(args.new, LONGEST_UNCACHED) if args.part == 'uncached' else args.new
  generator = Generator(model, stages, params, max_new_tokens=new, eos_id=None, dtype=jnp.bfloat16)
  image, size = model.vision.num_patches, model.vision.image_size
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, model.llama.vocab_size, (args.rows, args.text + image)).astype(np.int32)
  full = lambda value, dtype: np.full(args.rows, value, dtype)
  prompt = Prompt(tokens, full(tokens.shape[1], np.int32), full(min(35, args.text), np.int32), full(0, np.uint32))
  pixels = rng.integers(0, 256, (args.rows, size, size, 3), np.uint8)
  prompt, pixels = jax.device_put((prompt, pixels))

  def once() -> tuple[float, dict]:
    start = time.perf_counter()
    if args.part == 'uncached':
      found = jax.block_until_ready(generator.generate_uncached(prompt, pixels))
      return time.perf_counter() - start, {'tokens': new, 'kept': float(found.kept.mean())}
    turn, kept = jax.block_until_ready(generator.start(prompt, pixels))
    if args.part == 'prefill':
      return time.perf_counter() - start, {}
    start = time.perf_counter()
    bytes_of_cache = sum(s.k.nbytes + s.v.nbytes for s in turn.cache.stages)
    found = jax.block_until_ready(generator.decode(turn, prompt.seed, kept)[0])
    seconds = time.perf_counter() - start
    return seconds, {'tokens': new - 1, 'cache_bytes': bytes_of_cache, 'kept': float(found.kept.mean())}

  once()  # compiles
  seconds, about = zip(*(once() for _ in range(args.repeats)))
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  low, median, high = statistics.quantiles(seconds, n=4, method='inclusive') if len(seconds) > 1 else seconds * 3
  result = {'kind': args.kind, 'part': args.part, 'rows': args.rows, 'device': device.device_kind}
  result |= {'seconds': round(median, 5), 'quartiles': [round(low, 5), round(high, 5)]} | about[-1]
  if 'tokens' in result:
    result['ms_per_token'] = round(1000 * median / max(1, result['tokens']), 3)
    result['tokens_per_second'] = round(args.rows * result['tokens'] / median, 1)
  return result | {'peak_bytes': stats.get('peak_bytes_in_use'), 'parameter_bytes': sum(x.nbytes for x in jax.tree.leaves(params))}


def main() -> None:
  """Runs every part of every kind in turn, or with --part one of them in this process."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', choices=MODELS, default='7b')
  parser.add_argument('--rows', type=int, nargs='+', default=[1, 8], help='batch sizes')
  parser.add_argument('--text', type=int, default=64, help='text tokens of a prompt')
  parser.add_argument('--new', type=int, default=1000, help='tokens generated with a cache')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--kind', choices=KINDS, help=argparse.SUPPRESS)
  parser.add_argument('--part', choices=PARTS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.part:
    args.rows = args.rows[0]
    print(json.dumps(measure(args)))
    return
  results = []
  for rows in args.rows:
    for part in PARTS:
      for kind in KINDS:
        settings = {'model': args.model, 'rows': rows, 'text': args.text, 'new': args.new, 'repeats': args.repeats}
        command = [sys.executable, str(HERE), f'--kind={kind}', f'--part={part}', *(f'--{k}={v}' for k, v in settings.items())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:  # what does not fit is a result as well
          why = (done.stderr.strip().splitlines() or ['no message'])[-1][:300]
          results.append({'kind': kind, 'part': part, 'rows': rows, 'error': why})
        else:
          results.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(results[-1]), flush=True)
  settings = {k: v for k, v in vars(args).items() if k not in ('kind', 'part')}
  if args.model != 'tiny':
    content = settings | {'date': str(datetime.date.today()), 'runs': results}
    (HERE.parent / 'results' / f'gpu_{args.model}.json').write_text(json.dumps(content, indent=1) + '\n')


if __name__ == '__main__':
  main()
