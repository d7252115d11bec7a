"""Evaluates one checkpoint under several stage lists.

python eval.py --config=configs/digits.py:eval --checkpoint=runs/digits/dynamic/checkpoints --out=runs/digits
"""

import pathlib

from absl import flags

from dynllava_jax import command_line
from dynllava_jax.config import EvalConfig

CONFIG = command_line.define_config()
CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Checkpoint directory, or one step in it.', required=True)
OUT = flags.DEFINE_string('out', '.', 'Where results.json, answers.jsonl and tokens.png go.')


def main(_) -> None:
  with command_line.readable_errors():
    from dynllava_jax.evals import report  # jax starts only after the flags are known to be right

    report.run(command_line.parse(EvalConfig, CONFIG.value), CHECKPOINT.value, pathlib.Path(OUT.value))


if __name__ == '__main__':
  command_line.run(main)
