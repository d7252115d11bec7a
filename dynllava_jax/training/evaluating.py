"""Evaluation while training: benchmarks on the training mesh, with the weights as they lie there; nothing is loaded or copied.

    WORKDIR/evals/NAME/STEP/answers.jsonl   what the model said, one line per question
    WORKDIR/evals/NAME/STEP/tokens.png      the first questions with the image tokens that were kept: the same ones every time

The figures go to the metrics as `eval/NAME/FIGURE`, on a line of their own. That line says that an evaluation is finished: a run
that goes on from a step without it evaluates that step first.
"""

import json
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from dynllava_jax import methods, sharding
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import PERPLEXITY, ConfigError, TrainConfig, TrainEval
from dynllava_jax.data.pipeline import LayOut
from dynllava_jax.data.tokenizer import load_tokenizer
from dynllava_jax.evals.layout import Loaded
from dynllava_jax.evals.tasks import Answering, Reading, Setting
from dynllava_jax.files import write_atomically
from dynllava_jax.training.keeping import SCORE

FOLDER = 'evals'


class Evaluations:
  """The evaluations of a run."""

  def __init__(
    self, cfg: TrainConfig, info: CheckpointInfo, layout: LayOut, mesh: Mesh, workdir: pathlib.Path, lines: Iterable[Mapping]
  ):
    """Finds all questions, before the first step.

    Args:
      cfg, info, layout, mesh, workdir: of the run.
      lines: of its metrics so far; evaluations that stand there are finished.

    Raises:
      ConfigError, DataError: an evaluation that cannot be made; names it.
    """
    self._cfg, self._workdir = cfg, workdir
    self._done = {(int(line['step']), name) for line in lines for name in cfg.evals if _finished(name) in line}
    self._tasks = {name: _task(cfg, name, info, layout, mesh) for name in cfg.evals}
    self._generators: dict[str, Any] = {}

  def due(self, step: int) -> list[str]:
    """Names of the evaluations to be made after a step."""
    last = step == self._cfg.steps
    names = [name for name, task in self._cfg.evals.items() if step and (last or step % task.every == 0)]
    return [name for name in names if (step, name) not in self._done]

  def run(self, step: int, groups: dict[str, Any], stopped: Callable[[], bool]) -> Iterator[dict[str, float]]:
    """Makes the evaluations that are due.

    Args:
      step: that was finished last.
      groups: all parameters, in run form; they are read alone.
      stopped: asked after every batch; if it says so, the rest is left for the next start.

    Yields:
      The figures of each by their names in the metrics.

    Raises:
      FloatingPointError: the model computes no numbers.
    """
    for name in self.due(step):
      task = self._tasks[name]
      if name not in self._generators:
        self._generators[name] = task.generator(groups)
      generator = self._generators[name]
      generator.params, rows = groups, []
      for chunk in task.batches:
        rows += task.rows_of(generator, chunk)
        if stopped():
          return
      generator.params = {}  # the next step gives these arrays away
      if jax.process_index() == 0:
        self._write(name, step, rows)
      self._done.add((step, name))
      yield {_finished(name): len(rows)} | {f'eval/{name}/{figure}': value for figure, value in task.figures(rows).items()}

  def _write(self, name: str, step: int, rows: list[dict[str, Any]]) -> None:
    from dynllava_jax.evals import figures  # these bring matplotlib, which a run without evaluations does without
    from dynllava_jax.training.plot import save_figure

    folder, task = self._workdir / FOLDER / name / str(step), self._tasks[name]
    write_atomically(folder / 'answers.jsonl', ''.join(json.dumps(row) + '\n' for row in rows).encode())
    shown = figures.pictured(task.questions, [row for row in rows if row['metadata']['row'] < len(task.questions)])
    if shown:
      title = f'{name}, step {step}: image tokens kept (bright), text tokens dropped (grey) and given up later (orange)'
      with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # characters that the font lacks become boxes
        save_figure(figures.tokens_figure(shown, task.setting.loaded, title), folder / 'tokens.png')


def summary(figures: Mapping[str, float]) -> str:
  """The scores among some figures, for people."""
  scores = {name.split('/')[1]: value for name, value in figures.items() if name.endswith(f'/{SCORE}')}
  return '  '.join(f'{name} {value:.4g}' for name, value in scores.items()) or 'not scored: the figure is not defined yet'


def _finished(name: str) -> str:
  return f'eval/{name}/questions'


def _task(cfg: TrainConfig, name: str, info: CheckpointInfo, layout: LayOut, mesh: Mesh) -> Answering | Reading:
  task: TrainEval = cfg.evals[name]
  stages = task.stages or cfg.stages
  try:
    methods.check_run(cfg.model, stages, cfg.reducer)
    sharding.check_batch(task.batch_size, mesh)
  except ConfigError as e:
    raise ConfigError(f'config.evals.{name}: {str(e).removeprefix("config.")}') from None
  tokenizer = load_tokenizer(layout.tokenizer_files)
  loaded = Loaded(name, str(cfg.init_from or name), info, cfg.model, stages, cfg.reducer, tokenizer)
  setting = Setting(name, task, loaded, cfg.dtype, mesh, cfg.lora)
  return Reading(setting, cfg.data, layout) if task.benchmark == PERPLEXITY else Answering(setting)
