"""What a run tells: JSONL for programs, TensorBoard for browsers, a progress display for people."""

import contextlib
import json
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Mapping

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from dynllava_jax.display import Terminal
from dynllava_jax.files import read_regular, write_atomically

METRICS_FILE = 'metrics.jsonl'
TENSORBOARD = 'tensorboard'  # folder of its files and of traces
SHOWN = 5  # numbers of damaged lines that a message names


class MetricsLog:
  """Appends one line per logged step to `metrics.jsonl`, and the same numbers to TensorBoard."""

  def __init__(self, workdir: pathlib.Path, first_step: int):
    """Keeps what was logged up to `first_step`; lines of steps that will be run again are dropped.

    Nothing is rewritten unless there are such lines. What cannot be read stays where it is.
    """
    self._path = path = workdir / METRICS_FILE
    lines = _lines(path)
    kept = [text for text, values in lines if not _runs_again(text, values, first_step)]
    if len(kept) < len(lines) or (kept and not kept[-1].endswith(b'\n')):
      write_atomically(path, b''.join(text.rstrip(b'\n') + b'\n' for text in kept))
    self._file = path.open('ab', buffering=0)
    self._board = _Board(workdir / TENSORBOARD, first_step + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    try:
      self._file.write(json.dumps({'step': step} | dict(values)).encode() + b'\n')
    except OSError as e:
      raise OSError(e.errno, e.strerror, str(self._path)) from None
    self._board.write(step, values)

  def close(self) -> None:
    self._file.close()
    self._board.close()


class _Board:
  """TensorBoard's files. They are a convenience: what keeps them from being written is told once and ends no run.

  `tensorboardX.SummaryWriter` writes in a thread that dies of a full disk with a traceback, and the program then hangs.
  """

  def __init__(self, folder: pathlib.Path, first_step: int):
    self._folder, self._writer = folder, None
    with self._told_once():
      folder.mkdir(parents=True, exist_ok=True)
      self._writer = EventsWriter(str(folder / 'events'))
      again = SessionLog(status=SessionLog.START)  # hides what was logged from this step on
      self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=again))
      self._writer.flush()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    with self._told_once():
      if self._writer:
        for name, value in values.items():
          self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._writer.flush()

  def close(self) -> None:
    with self._told_once():
      if self._writer:
        self._writer.close()

  @contextlib.contextmanager
  def _told_once(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      self._writer = None
      message = f'{self._folder}: TensorBoard files cannot be written ({e.strerror or e}); {METRICS_FILE} has the numbers'
      print(message, file=sys.stderr)


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
  """All lines of a run's `metrics.jsonl` that can be read; `unreadable_lines` tells of the others."""
  return [values for _, values in _lines(workdir / METRICS_FILE) if values]


def unreadable_lines(workdir: pathlib.Path) -> str:
  """One line about damaged lines of `metrics.jsonl`, which are kept and passed over; '' if there is none."""
  path = workdir / METRICS_FILE
  bad = [str(number) for number, (text, values) in enumerate(_lines(path), 1) if values is None and text.endswith(b'\n')]
  shown = ', '.join(bad[:SHOWN]) + (', ...' if len(bad) > SHOWN else '')
  return f'{path}: {len(bad)} of its lines cannot be read, left as they are and passed over: {shown}' if bad else ''


def missing_lines(workdir: pathlib.Path, step: int, log_every: int) -> str:
  """One line if the newest lines before `step` are gone, every `log_every` steps one; '' if they are there."""
  last = max((line['step'] for line in read_metrics(workdir) if line['step'] <= step), default=0)
  if step - last < log_every:
    return ''
  return f'{workdir / METRICS_FILE}: lines after step {last} are missing, step {step} was saved; the run goes on without them'


def _lines(path: pathlib.Path) -> list[tuple[bytes, dict[str, float] | None]]:
  """Each line with its end and what it says; None for what says nothing."""
  return [(text, _values(text)) for text in read_regular(path).splitlines(keepends=True)] if path.exists() else []


def _values(text: bytes) -> dict[str, float] | None:
  try:
    values = json.loads(text)
  except (ValueError, RecursionError):  # ValueError: no UTF-8, no JSON or an endless number
    return None
  numbers = isinstance(values, dict) and all(type(v) in (int, float) for v in values.values())
  return values if numbers and type(values.get('step')) is int else None


def _runs_again(text: bytes, values: dict[str, float] | None, first_step: int) -> bool:
  """Whether a line is of a step after `first_step`, or the rest of one that a kill cut off."""
  if values:
    return values['step'] > first_step
  if text.endswith(b'\n'):
    return False
  stated = re.match(rb'\{"step": (\d+),', text)
  return not stated or int(stated[1]) > first_step


class Display:
  """Progress bar of a training run: loss, keep rates, temperature, tokens per second, time left."""

  PLAIN_EVERY = 20.0  # seconds between lines where there is no terminal

  def __init__(self, title: str, steps: int, first_step: int, quiet: bool = False):
    self._console = Terminal(quiet=quiet)
    self._steps, self._title, self._last = steps, title, 0.0
    self._bar = Progress(
      TextColumn('{task.description}', style='bold', markup=False),
      BarColumn(bar_width=24),
      MofNCompleteColumn(),
      TimeElapsedColumn(),
      TimeRemainingColumn(),
      TextColumn('{task.fields[numbers]}', markup=False),
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
        ('instruct_keep', 'instructions kept', '.0%'),
        ('tau', 'tau', '.2f'),
        ('tokens_per_second', 'tokens/s', ',.0f'),
        ('mfu', 'MFU', '.0%'),
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
