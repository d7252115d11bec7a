"""Which setting reaches a target: searched once, before a model serves.

    python -m dynllava_jax.controller --checkpoint=runs/digits/dynamic/checkpoints --target='memory=64MiB,batch=64'
    python -m dynllava_jax.controller --preset=7b --target='device=v5e-8,memory=16GiB,batch=64,context=4096' --out=runs/controller

Prints the choice, its runner-ups and the Pareto front, and writes choice.py, a config that `eval.py` takes, and front.png. A target
is made of memory, latency, tokens/s, energy, flops (share of dense's), quality, and of what is given: batch, context, new, mode
(cached or uncached), device. Quality comes from the results.json of an evaluation (--results), or is measured here on the demo's
questions, as agreement with dense (--measure=N of them). Exits with 1 if nothing reaches the target, and says what would.
"""

from absl import flags

from dynllava_jax import command_line, paths
from dynllava_jax.config import ConfigError
from dynllava_jax.workspace import workspace

CHECKPOINT = command_line.define_path('checkpoint', None, 'Checkpoint directory, or one step in it.')
PRESET = flags.DEFINE_enum('preset', None, ['7b', '13b'], 'A published Dynamic-LLaVA size instead of a checkpoint.')
TARGET = flags.DEFINE_string('target', None, "Such as 'memory=16GiB,batch=64,context=4096' or 'tokens/s>=1000,quality>=0.98'.")
RULES = flags.DEFINE_string('rules', '', 'Changes to the rules, such as decode_image=0.9,decode_text=0.6.')
RESULTS = command_line.define_path('results', None, 'results.json of an evaluation of several settings, for quality.')
MEASURE = flags.DEFINE_integer('measure', 0, "Questions of the demo's test split that quality is measured on; 0 measures none.", 0)
BENCH = command_line.define_path('bench', None, 'bench.json of `python -m dynllava_jax.bench` on the hardware, to calibrate by.')
BENCHMARK = flags.DEFINE_string('benchmark', 'digits', 'What the written config evaluates.')
OUT = command_line.define_path('out', 'runs/controller', 'Where choice.py and front.png go.')


def main(_) -> None:
  """Searches, prints and writes; exits with 1 if nothing reaches the target."""
  with command_line.readable_errors():
    from dynllava_jax.controller.rules import read_rules
    from dynllava_jax.controller.target import read_target

    if TARGET.value is None or (CHECKPOINT.value is None) == (PRESET.value is None):
      raise ConfigError("give --target='memory=16GiB,batch=64' and one of --checkpoint and --preset")
    target, rules, out = read_target(TARGET.value), read_rules(RULES.value), command_line.output_directory(OUT)
    bench, results = command_line.read(BENCH), command_line.read(RESULTS)
    from dynllava_jax.controller import program  # jax starts only after the flags are known to be right

    path = None if CHECKPOINT.value is None else str(command_line.path(CHECKPOINT))
    with workspace(out, '--out', wanted=lambda name: False) as folder:
      asked = program.Asked(path, PRESET.value, target, rules, results, MEASURE.value, bench, BENCHMARK.value, folder)
      reached = program.run(asked, lambda text: print(paths.named(text)))
    if not reached:
      raise SystemExit(1)


if __name__ == '__main__':
  command_line.run(main)
