"""Thresholds of early exits for the shares of questions that are to leave at each, stored beside the checkpoint.

    python -m dynllava_jax.calibrate --config=configs/methods.py:deer_eval --checkpoint=runs/digits/deer/checkpoints

For every run of the config whose exits name a `ratio`. Digit scenes are those of the validation split, which no evaluation
asks about; of other benchmarks the first `--questions` of --data are taken: evaluate on others.
"""

from absl import flags

from dynllava_jax import command_line
from dynllava_jax.config import ConfigError, EvalConfig

CONFIG = command_line.define_config()
CHECKPOINT = command_line.define_path('checkpoint', None, 'Checkpoint directory, or one step in it.')
DATA = command_line.define_path('data', None, "Benchmark data, in LLaVA's layout of playground/data/eval.")
QUESTIONS = flags.DEFINE_integer('questions', 300, 'Questions that are asked.', lower_bound=1)


def main(_) -> None:
  """Measures once for each kind of exit, and stores thresholds for each ratio."""
  with command_line.readable_errors():
    cfg = command_line.parse(EvalConfig, CONFIG.value)
    if CHECKPOINT.value is None:
      raise ConfigError('--checkpoint is missing')
    data, path = command_line.open_folder(DATA), str(command_line.path(CHECKPOINT))
    from dynllava_jax import checkpoint, sharding
    from dynllava_jax.evals import exit_thresholds, exit_values, layout, score
    from dynllava_jax.evals.benchmarks import digits, suite

    if cfg.benchmark == digits.Digits.name:
      benchmark = digits.Digits(cfg, 'validation', QUESTIONS.value)
      questions = benchmark.questions(None)
    else:
      benchmark = suite.get(cfg.benchmark).configured(cfg)
      questions = score.questions(benchmark, score.folder_of(cfg, benchmark, data))[: QUESTIONS.value]
    directory, step = checkpoint.locate(path)
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.check_batch(cfg.batch_size, mesh)
    known, made = {}, []
    for name, run in cfg.runs.items():
      ratios = {dict(s.exit.options).get('ratio') for s in run.stages if s.exit} - {None}
      for ratio in sorted(ratios):
        loaded = layout.load_model(name, run, path, calibrated=False)
        of_run = exit_thresholds.described(loaded.stages, loaded.model.llama.num_layers)
        with sharding.on_mesh(mesh):
          values = known.setdefault(str(of_run), None)
          if values is None:
            values = known[str(of_run)] = exit_values.measure(cfg, loaded, questions, mesh)
        made.append(exit_thresholds.entry(of_run, ratio, step, values))
        shown = ', '.join(f'{w:.0%} -> {r:.0%}' for w, r in zip(made[-1]['wanted'], made[-1]['reached']))
        print(f'{name}: ratio {ratio:g}, behind layers {made[-1]["layers"]}: {shown} (wanted -> reached)')
    if not made:
      raise ConfigError("--config: no run has an exit with a ratio, such as exit=dict(name='confidence', ratio=0.8)")
    print(exit_thresholds.store(directory, made))


if __name__ == '__main__':
  command_line.run(main)
