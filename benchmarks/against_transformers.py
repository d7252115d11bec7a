"""Prefill and cached decoding, dense and dynamic, against Hugging Face transformers on this machine's CPU, in one run.

    pip install torch        # any CPU build
    python benchmarks/against_transformers.py                     # a decoder of 134 M parameters, 1 to 16 rows
    python benchmarks/against_transformers.py --batches 8x1472

The same random weights, tokens, pixels and threads for everybody (`generation.py`). Times are relative to transformers, turn by
turn, with quartiles; `same_tokens` says whether the greedy tokens are equal too (a dynamic run's need not be).
Training: `train_step.py`.
Writes benchmarks/results/against_transformers.json.
"""

import json
import pathlib
import tempfile

from generation import HERE, ROOT, Worker, arguments, cases, in_turn, machine, make_models


def main() -> None:
  """Makes the model, runs all contenders, writes the results."""
  args = arguments(__doc__).parse_args()
  with tempfile.TemporaryDirectory() as folder:
    models = pathlib.Path(folder)
    make_models(models, args.size)
    workers = {n: Worker.start(n, ROOT, models, args.threads) for n in ('transformers', 'dense', 'dynamic')}
    rows = in_turn(workers, cases(args), args.turns, 'transformers')
  result = machine(args.threads) | {'size': args.size, 'turns': args.turns, 'cases': rows}
  if args.size == 'mid':
    (HERE.parent / 'results' / 'against_transformers.json').write_text(json.dumps(result, indent=1) + '\n')
  print(json.dumps({k: v for k, v in result.items() if k != 'cases'}))


if __name__ == '__main__':
  main()
