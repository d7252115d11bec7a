"""Trains LLaVA or Dynamic-LLaVA.

    python train.py --config=configs/digits.py:base --workdir=runs/digits/base

Started again with the same workdir it goes on where it stopped; exit status 75 asks for that (docs/training.md). On several
hosts, such as those of a TPU pod, start the same command on each of them with --multihost, and a workdir that all of them see
or that is in an object store.

    python train.py --config=configs/llava.py:dynamic --plan --machine=v5e:16x16       # bytes, times, or settings that fit
    python train.py --config=configs/llava.py:dynamic --compile_for=v5e:16x16          # its compiler's word; needs libtpu, no TPU
"""

# ruff: noqa: E402
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are loaded ends at once; `loop.train` does better

from absl import flags

from dynllava_jax import command_line, hosts
from dynllava_jax.config import ConfigError, TrainConfig

CONFIG = command_line.define_config()
WORKDIR = command_line.define_path('workdir', None, 'Where checkpoints and metrics go.')
PROFILE = flags.DEFINE_string('profile', None, 'Steps to trace, FIRST:LAST; the trace goes to WORKDIR/tensorboard.')
PLAN = flags.DEFINE_bool(
  'plan', False, 'Say what the run takes of --machine, or of this one, and settings that fit if it does not.'
)
MACHINE = flags.DEFINE_string('machine', None, 'For --plan: v5e:16x16, v5p:4x4x4, h100:8, cpu:8; this machine if not given.')
COMPILE_FOR = flags.DEFINE_string('compile_for', None, 'Compile the step for this machine, without having it: v5e:16x16, cpu:8.')
MULTIHOST = flags.DEFINE_bool('multihost', False, 'One of several processes, one per host: join the others first.')


def main(_) -> None:
  with command_line.readable_errors():
    cfg = command_line.parse(TrainConfig, CONFIG.value)
    if PLAN.value or COMPILE_FOR.value:
      before_it_starts(cfg)
      return
    if WORKDIR.value is None:
      raise ConfigError('--workdir is missing; it is where checkpoints and metrics go')
    path = command_line.output_directory(WORKDIR)
    from dynllava_jax.training import loop, tracing  # jax starts only after the flags are known to be right

    steps = tracing.read_steps(PROFILE.value) if PROFILE.value else range(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if MULTIHOST.value:
      command_line.join_hosts()
    with hosts.workspace(path, '--workdir') as workdir:
      try:
        loop.train(cfg, workdir, steps, apart=hosts.apart(path))
      except loop.Interrupted as e:
        print(e)
        sys.exit(e.code)


def before_it_starts(cfg: TrainConfig) -> None:
  if MACHINE.value and not PLAN.value:
    raise ConfigError('--machine: no use without --plan; leave it out')
  from dynllava_jax.training import machines

  compiled = COMPILE_FOR.value and machines.read(COMPILE_FOR.value, '--compile_for')
  planned = MACHINE.value and machines.read(MACHINE.value, '--machine')
  if compiled or planned:
    machines.pretend(compiled or planned)
  from dynllava_jax.training import plan

  if PLAN.value:
    plan.plan(cfg, planned or compiled or None)
  if compiled:
    plan.compile_for(cfg, compiled)


if __name__ == '__main__':
  command_line.run(main)
