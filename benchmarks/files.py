"""Do checks of files cost time? A training step, loading, opening a prepared folder and converting, against another checkout.

    git worktree add ../before COMMIT
    python benchmarks/files.py ../before
    python benchmarks/files.py ../before --turns 40 --only opening loading --at_most 1.02

Both checkouts work on the same files, which this one makes, and take turns. CPU seconds count, so that what else the machine does
matters as little as it can; medians and quartiles of the ratios (this one over the other) are printed. With --at_most the exit
status is 1 if a median is larger.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
WORKS = ('step', 'loading', 'opening', 'conversion')
SHARDS = 1000
STEPS = 12  # of a run; the first ones compile


def write_files(folder: pathlib.Path) -> None:
  """A prepared folder of 1,000 shards, and generation.py's model of middle size, converted and as it was before."""
  from generation import make_models
  from PIL import Image

  from dynllava_jax.config import DataConfig
  from dynllava_jax.data import check, preparation

  Image.new('RGB', (20, 20)).save(folder / 'a.png')
  turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'A bus.'}]
  samples = [{'id': str(i), 'image': 'a.png', 'conversations': turns} for i in range(SHARDS)]
  (folder / 'mix.json').write_text(json.dumps(samples))
  data = DataConfig(conversation='vicuna_v1', text_length=1472)
  scan = check.Scan(json={'mix': folder / 'mix.json'}, images=folder, data=data, tokenizer=None, num_patches=576, processes=1)
  with contextlib.redirect_stdout(sys.stderr):
    preparation.prepare(scan, [1.0], folder / 'prepared', only_check=False, image_bytes=True, shard_samples=1)
    make_models(folder / 'models', 'mid')


def work(root: pathlib.Path, folder: pathlib.Path) -> None:
  """Does what is asked for on standard input, with the package of another folder; answers CPU seconds."""
  sys.path[0] = str(root)
  os.chdir(root)
  answers, sys.stdout = sys.stdout, sys.stderr
  for number, line in enumerate(sys.stdin):
    seconds = globals()[line.strip()](folder, folder / f'{os.getpid()}.{number}')
    print(seconds, file=answers, flush=True)


def opening(folder: pathlib.Path, _: pathlib.Path) -> float:
  """A folder of 1,000 shards, until its first sample is there: what is compared at once here was put off before."""
  from dynllava_jax.data.store import Store

  start = time.process_time()
  Store(str(folder / 'prepared'))[0]
  return time.process_time() - start


def loading(folder: pathlib.Path, _: pathlib.Path) -> float:
  """A checkpoint, onto the device; each checkout converts its own, as older ones do not know all that a description says now."""
  import jax

  from dynllava_jax import checkpoint
  from dynllava_jax.convert.convert import convert
  from dynllava_jax.convert.source import Request

  own = folder / f'converted-{os.getpid()}'
  if not own.exists():
    convert(Request(src=folder / 'models' / 'hf'), own)
  start = time.process_time()
  jax.block_until_ready(checkpoint.load_params(own))
  return time.process_time() - start


def conversion(folder: pathlib.Path, scratch: pathlib.Path) -> float:
  """A checkpoint as transformers saves it, read back as always."""
  from dynllava_jax.convert.convert import convert
  from dynllava_jax.convert.source import Request

  start = time.process_time()
  convert(Request(src=folder / 'models' / 'hf'), scratch)
  return time.process_time() - start


def step(folder: pathlib.Path, scratch: pathlib.Path) -> float:
  """One step of the digits' base model, all that the loop does included: between two lines of the log, the median of a run."""
  from dynllava_jax.config import TrainConfig, from_config_dict
  from dynllava_jax.training import loop, metrics

  times = []
  write = metrics.MetricsLog.write

  def noting(*arguments):
    times.append(time.process_time())
    return write(*arguments)

  sys.path.insert(1, 'configs')
  import digits

  cfg = digits.get_config('base')
  cfg.update(steps=STEPS, log_every=1, save_every=STEPS)
  metrics.MetricsLog.write = noting
  try:
    loop.train(from_config_dict(TrainConfig, cfg), scratch)
  finally:
    metrics.MetricsLog.write = write
  return statistics.median(b - a for a, b in itertools.pairwise(times[2:]))


def start(root: pathlib.Path, folder: pathlib.Path) -> subprocess.Popen:
  """A process that works with a checkout."""
  words = [sys.executable, __file__, str(root), '--files', str(folder)]
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'DYNLLAVA_JAX_COMPILATION_CACHE': 'off'}
  return subprocess.Popen(words, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True, env=env)


def ask(process: subprocess.Popen, name: str) -> float:
  """The CPU seconds of one piece of work."""
  process.stdin.write(name + '\n')
  process.stdin.flush()
  answer = process.stdout.readline()
  if not answer:
    sys.exit(f'error: {name} failed; run {" ".join(process.args)} and write {name} to see why')
  return float(answer)


def main() -> None:
  """Takes turns and prints."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('other', type=pathlib.Path, help='another checkout of this project')
  parser.add_argument('--only', nargs='+', choices=WORKS, default=WORKS)
  parser.add_argument('--turns', type=int, default=20)
  parser.add_argument('--at_most', type=float, help='largest ratio that is no failure')
  parser.add_argument('--files', type=pathlib.Path, help=argparse.SUPPRESS)  # a worker's
  args = parser.parse_args()
  other = args.other.resolve()
  if args.files:
    work(other, args.files)
    return
  if not (other / 'dynllava_jax').is_dir():
    sys.exit(f'error: {other}: no checkout of this project (dynllava_jax/ is missing)')
  slower = []
  with tempfile.TemporaryDirectory() as folder:
    sys.path.insert(1, str(ROOT))
    write_files(pathlib.Path(folder))
    workers = {'this': start(ROOT, pathlib.Path(folder)), 'other': start(other, pathlib.Path(folder))}
    for name in args.only:
      times = {who: [] for who in workers}
      for turn in range(args.turns + 1):  # the first one is warm-up
        for who in list(workers) if turn % 2 else reversed(workers):
          times[who].append(ask(workers[who], name))
      low, middle, high = statistics.quantiles((a / b for a, b in zip(times['this'][1:], times['other'][1:])), n=4)
      medians = {who: round(statistics.median(t[1:]), 5) for who, t in times.items()}
      print(json.dumps({'what': name, 'cpu_seconds': medians, 'ratio': [round(r, 3) for r in (low, middle, high)]}), flush=True)
      slower += [f'{name}: {middle:.3f}'] if args.at_most and middle > args.at_most else []
    for process in workers.values():
      process.stdin.close()
      process.wait(60)
  print(json.dumps({'turns': args.turns, 'load': [round(x, 1) for x in os.getloadavg()]}))
  if slower:
    sys.exit('error: slower than allowed: ' + '; '.join(slower))


if __name__ == '__main__':
  main()
