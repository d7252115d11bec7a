"""Trains LLaVA or Dynamic-LLaVA.

    python train.py --config=configs/digits.py:base --workdir=runs/digits/base

Started again with the same workdir it goes on where it stopped; exit status 75 asks for that (docs/training.md). On several
hosts, such as those of a TPU pod, start the same command on each of them with --multihost and a workdir that all of them see.
"""

# ruff: noqa: E402
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are loaded ends at once; `loop.train` does better

from absl import flags

from dynllava_jax import command_line
from dynllava_jax.config import TrainConfig
from dynllava_jax.workspace import workspace

CONFIG = command_line.define_config()
WORKDIR = command_line.define_path('workdir', None, 'Where checkpoints and metrics go.', required=True)
PROFILE = flags.DEFINE_string('profile', None, 'Steps to trace, FIRST:LAST; the trace goes to WORKDIR/tensorboard.')
MULTIHOST = flags.DEFINE_bool('multihost', False, 'One of several processes, one per host: join the others first.')


def main(_) -> None:
  with command_line.readable_errors():
    cfg = command_line.parse(TrainConfig, CONFIG.value)
    path = command_line.output_directory(WORKDIR)
    from dynllava_jax.training import loop, tracing  # jax starts only after the flags are known to be right

    steps = tracing.read_steps(PROFILE.value) if PROFILE.value else range(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with workspace(path, '--workdir', multihost=MULTIHOST.value) as workdir:
      if MULTIHOST.value:
        command_line.join_hosts()
      try:
        loop.train(cfg, workdir, steps)
      except loop.Interrupted as e:
        print(e)
        sys.exit(e.code)


if __name__ == '__main__':
  command_line.run(main)
