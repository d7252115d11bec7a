"""Evaluates checkpoints, scores answer files made elsewhere, and says which benchmark data is there.

    python eval.py --config=configs/digits.py:eval --checkpoint=runs/digits/dynamic/checkpoints --out=runs/digits
    python eval.py --config=configs/eval.py:pope --checkpoint=CHECKPOINT --data=DIR --out=results/pope
    python eval.py --config=configs/eval.py:pope --answers=FILE --data=DIR
    python eval.py --check_data --data=DIR

Started again with the same --out, an evaluation goes on where it stopped.
"""

import contextlib
import json
import pathlib
import sys

from absl import flags

from dynllava_jax import command_line, hosts, paths
from dynllava_jax.config import ConfigError, EvalConfig
from dynllava_jax.workspace import workspace

CONFIG = command_line.define_config()
CHECKPOINT = command_line.define_path('checkpoint', None, 'Checkpoint directory, or one step in it.')
DATA = command_line.define_path('data', None, "Benchmark data, in LLaVA's layout of playground/data/eval.")
OUT = command_line.define_path('out', None, 'Where answers, submissions, tables and pictures go; the current folder if not given.')
ANSWERS = command_line.define_path('answers', None, 'Answer file to score; needs no checkpoint and no accelerator.')
ALLOW_PARTIAL = flags.DEFINE_bool('allow_partial', False, 'Score what fits when answers and labels do not fit together.')
CHECK_DATA = flags.DEFINE_bool('check_data', False, 'Say what of the benchmark data is there and where to get the rest.')
MULTIHOST = flags.DEFINE_bool('multihost', False, 'One of several processes, one per host: join the others first.')


def main(_) -> None:
  with command_line.readable_errors():
    data, answers, out = command_line.open_folder(DATA), command_line.read(ANSWERS), command_line.path(OUT)
    if CHECK_DATA.value:
      from dynllava_jax.evals import check

      cfg = command_line.parse(EvalConfig, CONFIG.value) if CONFIG.value else None
      sys.exit(check.run(_needed(data, '--data'), cfg))
    cfg = command_line.parse(EvalConfig, CONFIG.value)
    if answers:
      from dynllava_jax.evals import score

      with contextlib.ExitStack() as stack:
        folder = stack.enter_context(workspace(out, '--out', wanted=lambda name: False)) if out else None
        result = score.run(cfg, answers, data, ALLOW_PARTIAL.value, folder)
      print(paths.named(json.dumps(result)))
      return
    checkpoint = str(_needed(command_line.path(CHECKPOINT), '--checkpoint'))
    from dynllava_jax.evals import report  # jax starts only after the flags are known to be right

    if MULTIHOST.value:
      command_line.join_hosts()
    with hosts.workspace(out or pathlib.Path(), '--out', wanted=_of_evaluation) as folder:
      try:
        report.run(cfg, checkpoint, folder, data)
      except KeyboardInterrupt:
        where = f'finished answers are in {(out or folder) / "answers"}'
        raise KeyboardInterrupt(f'{where}, the same command goes on with the others') from None


def _of_evaluation(name: str) -> bool:
  """Whether an evaluation goes on with this file: folders of results often hold training runs too."""
  return name.split('/')[0] in ('answers', 'perplexity', 'agreement')


def _needed(value, name: str):
  if value is None:
    raise ConfigError(f'{name} is missing')
  return value


if __name__ == '__main__':
  command_line.run(main)
