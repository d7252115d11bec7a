"""What a run tells: JSONL for programs, TensorBoard for browsers, a progress display for people."""

import json
import pathlib
import time
from collections.abc import Mapping

import tensorboardX
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dynllava_jax.display import Terminal

METRICS_FILE = 'metrics.jsonl'


class MetricsLog:
  """Appends one line per logged step to `metrics.jsonl`, and the same numbers to TensorBoard."""

  def __init__(self, workdir: pathlib.Path, first_step: int):
    """Keeps what was logged up to `first_step`; lines of steps that will be run again are dropped."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / METRICS_FILE
    kept = [line for line in read_metrics(workdir) if line['step'] <= first_step]
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept))
    temporary.replace(path)
    self._file = path.open('a')
    self._board = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=first_step + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._file.write(json.dumps({'step': step} | dict(values)) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    self._file.close()
    self._board.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
  """All lines of a run's `metrics.jsonl`; a last line cut off by a kill is left out."""
  path = workdir / METRICS_FILE
  lines = path.read_text().splitlines() if path.exists() else []
  values = []
  for line in lines:
    try:
      values.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return values


class Display:
  """Progress bar of a training run: loss, keep rates, temperature, tokens per second, time left."""

  PLAIN_EVERY = 20.0  # seconds between lines where there is no terminal

  def __init__(self, title: str, steps: int, first_step: int, quiet: bool = False):
    self._console = Terminal(quiet=quiet)
    self._steps, self._title, self._last = steps, title, 0.0
    self._bar = Progress(
      TextColumn('[bold]{task.description}'),
      BarColumn(bar_width=24),
      MofNCompleteColumn(),
      TimeElapsedColumn(),
      TimeRemainingColumn(),
      TextColumn('{task.fields[numbers]}'),
      console=self._console,
      transient=False,
      disable=not self._console.is_terminal,
    )
    self._task = self._bar.add_task(title, total=steps, completed=first_step, numbers='compiling')

  def __enter__(self) -> 'Display':
    self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    self._bar.stop()

  def show(self, step: int, values: Mapping[str, float]) -> None:
    numbers = '  '.join(
      f'{label} {values[name]:{form}}'
      for name, label, form in (
        ('loss', 'loss', '.3f'),
        ('image_keep', 'image kept', '.0%'),
        ('text_keep', 'text kept', '.0%'),
        ('tau', 'tau', '.2f'),
        ('tokens_per_second', 'tokens/s', ',.0f'),
      )
      if name in values
    )
    self._bar.update(self._task, completed=step, numbers=numbers)
    now = time.monotonic()
    if not self._console.is_terminal and (now - self._last > self.PLAIN_EVERY or step == self._steps):
      self._last = now
      self._console.print(f'{self._title}: step {step}/{self._steps}  {numbers}', highlight=False, soft_wrap=True)

  def say(self, message: str) -> None:
    self._console.print(message, highlight=False, soft_wrap=True)
