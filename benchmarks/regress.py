"""Does this checkout run faster or slower than another one? Prefill and decoding, pair by pair, on this machine's CPU.

    git worktree add ../before COMMIT
    python benchmarks/regress.py ../before
    python benchmarks/regress.py ../before --batches 1x64 1x1472 --at_most 1.03

Both read the same weights and inputs and take turns (`generation.py`). Prints times and ratios (this one over the other) with
quartiles, dense and dynamic. With --at_most the exit status is 1 if a median ratio is larger.
"""

import json
import pathlib
import sys
import tempfile

from generation import ROOT, Worker, arguments, cases, in_turn, machine, make_models


def main() -> None:
  """Compares dense and dynamic runs, one after the other."""
  parser = arguments(__doc__)
  parser.add_argument('other', type=pathlib.Path, help='another checkout of this project')
  parser.add_argument('--at_most', type=float, help='largest ratio that is no failure')
  args = parser.parse_args()
  other = args.other.resolve()
  if not (other / 'dynllava_jax').is_dir():
    sys.exit(f'error: {other}: no checkout of this project (dynllava_jax/ is missing)')
  slower = []
  with tempfile.TemporaryDirectory() as folder:
    models = pathlib.Path(folder)
    make_models(models, args.size)
    for kind in ('dense', 'dynamic'):
      workers = {name: Worker.start(kind, code, models, args.threads) for name, code in (('other', other), ('this', ROOT))}
      for row in in_turn(workers, cases(args), args.turns, 'other'):
        this = row['contenders']['this']
        if not this['same_tokens']:
          print(f'{kind}: {row["what"]} {row["rows"]} x {row["text"]}: other tokens than the other checkout')
        if args.at_most and this['ratio'][1] > args.at_most:
          slower.append(f'{kind} {row["what"]} {row["rows"]} x {row["text"]}: {this["ratio"][1]:.3f}')
  print(json.dumps(machine(args.threads) | {'turns': args.turns}))
  if slower:
    sys.exit('error: slower than allowed: ' + '; '.join(slower))


if __name__ == '__main__':
  main()
