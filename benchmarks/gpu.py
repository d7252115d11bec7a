"""What Tables 4 and 14 of Dynamic-LLaVA's paper (arXiv 2412.00876) measure, on the accelerator at hand, with random weights.

    python benchmarks/gpu.py                 # 7B and 13B, dense and dynamic, batches of 1 and 8; needs 80 GB for 13B
    python benchmarks/gpu.py --size 7b --rows 1 8 32
    python benchmarks/gpu.py --size tiny     # that it runs, anywhere

Prefill, decoding without and with a cache, both together, and memory, as `python -m dynllava_jax.bench` times them: in turn, with
quartiles, and the ideal ratio beside each. On NVIDIA GPUs the vision tower attends by cuDNN, which is printed first.
Writes benchmarks/results/gpu-DEVICE-SIZE.json and .md; `tiny` only prints.
"""

import argparse
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'configs')]

import bench  # noqa: E402  configs/bench.py

from dynllava_jax.config import BenchConfig, from_config_dict  # noqa: E402
from dynllava_jax.files import write_atomically  # noqa: E402
from dynllava_jax.serving import comparison  # noqa: E402

NEW, UNCACHED = 1000, 8  # the paper decodes 1,000 tokens; without a cache each costs a prefill, so a few tell the time of one


def main() -> None:
  """Measures every size that is asked for."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', nargs='+', choices=['7b', '13b', 'tiny'], default=['7b', '13b'])
  parser.add_argument('--rows', nargs='+', type=int, default=[1, 8], help='batch sizes')
  args = parser.parse_args()
  for size in args.size:
    config = bench.get_config(size)
    config.rows, config.engine = tuple(args.rows), False
    if size != 'tiny':
      config.new, config.uncached_new = NEW, UNCACHED
    del config.runs.fastv
    cfg = from_config_dict(BenchConfig, config)

    def keep(result: dict, size=size, cfg=cfg) -> None:
      if size != 'tiny':
        device = re.sub(r'\W+', '-', result['machine']['device'].lower())
        file = ROOT / 'benchmarks' / 'results' / f'gpu-{device}-{size}.json'
        write_atomically(file, (json.dumps(result, indent=1) + '\n').encode())
        write_atomically(file.with_suffix('.md'), comparison.as_markdown(cfg, result).encode())

    print(comparison.as_markdown(cfg, comparison.measure(cfg, print, keep)))


if __name__ == '__main__':
  main()
