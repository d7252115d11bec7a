"""What sparsity saves on the hardware at hand: prefill, decoding with and without a cache, end to end, the engine, and memory.

    python -m dynllava_jax.bench --config=configs/bench.py:mid --out=runs/bench
    python -m dynllava_jax.bench --config=configs/bench.py:7b --config.rows='(1, 64)' --out=runs/bench-7b

The runs of the config take turns, A B C, C B A, ..., so that whatever else the machine does falls on all; ratios are those of one
turn. Beside each stands the ideal ratio: what the hardware could gain at best by what the run's static shapes compute and read.
Compile times are apart, and the first call counts for nothing. Leaves bench.json, bench.md and bench.png; the quantities are those
of Tables 4 and 14 of arXiv 2412.00876.
"""

import json

from dynllava_jax import command_line
from dynllava_jax.workspace import workspace

CONFIG = command_line.define_config()
OUT = command_line.define_path('out', 'runs/bench', 'Where bench.json, bench.md and bench.png go.')


def main(_) -> None:
  """Measures, prints and writes."""
  with command_line.readable_errors():
    from dynllava_jax.config import BenchConfig

    cfg = command_line.parse(BenchConfig, CONFIG.value)
    out = command_line.output_directory(OUT)
    from dynllava_jax.display import Terminal
    from dynllava_jax.files import write_atomically
    from dynllava_jax.serving import comparison  # jax starts only after the flags are known to be right

    with workspace(out, '--out', wanted=lambda name: False) as folder:

      def keep(result):
        write_atomically(folder / 'bench.json', (json.dumps(result, indent=1) + '\n').encode())
        write_atomically(folder / 'bench.md', comparison.as_markdown(cfg, result).encode())
        comparison.picture(cfg, result, folder / 'bench.png')

      measured = comparison.measure(cfg, Terminal().print, keep)
    print(comparison.as_markdown(cfg, measured))


if __name__ == '__main__':
  command_line.run(main)
