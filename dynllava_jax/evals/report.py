"""One evaluation from top to bottom: answers, table, `results.json`, `tokens.png`."""

import pathlib

from dynllava_jax import checkpoint
from dynllava_jax.config import EvalConfig
from dynllava_jax.data.tokenizer import load_tokenizer
from dynllava_jax.evals import digits
from dynllava_jax.evals.figures import tokens_figure
from dynllava_jax.evals.runner import evaluate
from dynllava_jax.training.plot import save_figure

PICTURED_LONG, PICTURED_SHORT = 2, 2


def run(cfg: EvalConfig, path: str, out: pathlib.Path) -> None:
  """Evaluates, prints the table and writes `results.json`, `answers.jsonl` and `tokens.png` to `out`.

  The picture shows the run called 'dynamic', or the last one.

  Raises:
    CheckpointError, ConfigError: see `evaluate`.
  """
  answers = evaluate(cfg, path, out)
  name = 'dynamic' if 'dynamic' in answers else list(answers)[-1]
  long = [a for a in answers[name] if a.sample.task in digits.LONG_TASKS]
  short = [a for a in answers[name] if a.sample.task not in digits.LONG_TASKS]
  path = cfg.runs[name].checkpoint or path
  model = checkpoint.read_info(path).model
  title = f'{name}: image tokens kept (bright) and generated tokens dropped (grey), first questions of the test split'
  figure = tokens_figure(
    long[:PICTURED_LONG] + short[:PICTURED_SHORT], load_tokenizer(checkpoint.read_tokenizer(path)), model.vision.patch_size, title
  )
  save_figure(figure, out / 'tokens.png')
