"""PyTorch checkpoint -> checkpoint of this project, tensor by tensor."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import TypeVar

import ml_dtypes
import numpy as np

from dynllava_jax import checkpoint, locks
from dynllava_jax.convert.plan import Assignment, assign
from dynllava_jax.convert.readers import ConversionError, has_weights
from dynllava_jax.convert.source import Request, Source, open_source
from dynllava_jax.convert.writer import StepWriter
from dynllava_jax.display import Terminal
from dynllava_jax.progress import progress

REPORT_FILE = 'conversion.json'
OF_A_RUN = ('checkpoints', 'metrics.jsonl')  # one of these tells the workdir of a training run
DTYPES = {'keep': None, 'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
AT_ONCE = 6  # tensors on their way: some are read and written while others are hashed; each takes about three times its size
SPARE_BYTES = 64 * 2**20  # room for metadata and descriptions
STEP = 0
T = TypeVar('T')
R = TypeVar('R')


@dataclasses.dataclass(frozen=True)
class Mapped:
  """One line of the report. `file` and `sha256` are of the slot as stored, below the step's directory."""

  source: str
  origin: str
  target: str
  shape: tuple[int, ...]
  dtype: str
  sha256: str
  file: str


def convert(
  request: Request,
  dst: pathlib.Path,
  dtype: str = 'keep',
  overwrite: bool = False,
  readback: bool = True,
  on_open: Callable[[Source], None] = lambda source: None,
) -> tuple[Source, list[Mapped]]:
  """Converts a checkpoint. Interrupted, it leaves nothing at `dst`; started again, it starts over.

  Args:
    request: what to convert.
    dst: directory to write; new or empty unless `overwrite`.
    dtype: 'keep', 'float32' or 'bfloat16'.
    readback: read every tensor again and compare it with what was written.
    on_open: is given the source before anything is written, to show it or to refuse it.

  Raises:
    ConversionError: the source is wrong (nothing is written then), or the destination is unwritable, too small or
      does not hold what was written.
  """
  dst = dst.resolve()
  check_destination(dst, overwrite, request.src, request.vision, request.base)
  source = open_source(request)
  on_open(source)
  read = {pathlib.Path(t.origin) for _, t in source.tensors} | ({pathlib.Path(request.projector)} if request.projector else set())
  check_destination(dst, overwrite, *(file for file in read if file.is_file()))  # also what a config names, such as the tower
  plan = assign(source.info, source.tensors, DTYPES[dtype])
  with new_directory(dst, sum(a.nbytes for a in plan)) as partial:
    step_dir = partial / str(STEP)
    writer = StepWriter(step_dir, {a.path: (a.leaf, a.dtype) for a in plan})

    def write(a: Assignment) -> Mapped:
      value = np.ascontiguousarray(a.load())
      digest = hashlib.sha256(value.view(np.uint8).data).hexdigest()
      writer.write(a.path, a.index, value)
      file = writer.file(a.path, a.index)
      if readback and not writer.holds(a.path, a.index, value):
        raise ConversionError(f'{step_dir / file}: read back, it is not {a.tensor.key} as written; is the disk failing?')
      return Mapped(a.tensor.key, a.tensor.origin, a.target, a.tensor.shape, str(a.dtype), digest, file)

    mapped = with_progress('converting', write, plan, [a.nbytes for a in plan])
    checkpoint.seal(step_dir, {m.file: m.sha256 for m in mapped})
    report = {
      'layout': source.layout,
      'source': str(request.src),
      'dtype': dtype,
      'notes': source.notes,
      'read_back': readback,
      'tensors': [dataclasses.asdict(m) for m in mapped],
    }
    checkpoint.write_atomically(partial / REPORT_FILE, json.dumps(report, indent=1).encode())
    checkpoint.write_info(partial, source.info, source.tokenizer, source.assets)
  return source, mapped


def with_progress(label: str, function: Callable[[T], R], items: list[T], sizes: list[int]) -> list[R]:
  """Maps a function over items, a few at once, showing bytes and rate; the first error ends it."""
  pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
  try:
    with progress(Terminal(stderr=True), label, sum(sizes), in_bytes=True) as advance:
      results = []
      for result, size in zip(pool.map(function, items), sizes):
        results.append(result)
        advance(size)
      return results
  finally:
    pool.shutdown(cancel_futures=True)


def check_destination(dst: pathlib.Path, overwrite: bool, *sources: pathlib.Path | None) -> None:
  """ConversionError if there is something at `dst` that may not be replaced, a source above all.

  A checkpoint that a killed run had set aside to replace it gets its name back first.
  """
  if os.path.ismount(dst):
    raise ConversionError(f'{dst}: is a mount point, which cannot be renamed; choose a directory inside it as --dst')
  partial, old = _beside(dst)
  if old.exists() and not dst.exists():  # killed between the two renames at the end
    with _claimed(dst, partial):
      os.replace(old, dst)
      shutil.rmtree(partial)
  for source in sources:
    if source is None:
      continue
    here = source.resolve()
    if here.is_relative_to(dst) or (here.is_dir() and dst.is_relative_to(here)):
      raise ConversionError(f'{dst}: is, holds or lies in the source {source}; choose another --dst')
  if dst.exists() and not dst.is_dir():
    raise ConversionError(f'{dst}: is a file; choose another --dst')
  if dst.is_dir() and any(dst.iterdir()) and not overwrite:
    raise ConversionError(f'{dst}: exists and is not empty; choose another --dst, or replace it with --overwrite')
  if dst.is_dir() and any(dst.iterdir()) and not _is_checkpoint(dst):
    raise ConversionError(f'{dst}: is no checkpoint, and --overwrite replaces only those; choose another --dst')


def _is_checkpoint(directory: pathlib.Path) -> bool:
  """Whether it is a checkpoint of ours or of PyTorch and nothing else: a training run holds some, but is none."""
  if any((directory / name).exists() for name in OF_A_RUN):
    return False
  if (directory / checkpoint.MODEL_FILE).is_file():
    return bool(checkpoint.all_steps(directory))
  return (directory / 'config.json').is_file() and has_weights(directory)


def _beside(dst: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Where a new checkpoint grows, and where the one that it replaces is kept until it has its name."""
  return dst.with_name(f'.{dst.name}.partial'), dst.with_name(f'.{dst.name}.old')


@contextlib.contextmanager
def _claimed(dst: pathlib.Path, partial: pathlib.Path) -> Iterator[None]:
  """Makes the directory `partial` and keeps other processes out of it while the block runs.

  Raises:
    ConversionError: another process has it, or something in the block cannot be written.
  """
  try:
    with locks.sole_use(partial, '--dst'):
      yield
  except locks.BusyError:
    raise ConversionError(f'{dst}: another process is writing it; wait for that one, or choose another --dst') from None
  except OSError as e:
    raise ConversionError(f'{dst}: cannot be written ({e})') from None


@contextlib.contextmanager
def new_directory(dst: pathlib.Path, nbytes: int) -> Iterator[pathlib.Path]:
  """A directory to fill that gets its name `dst` only when the block ends without an error.

  Until then it is `.NAME.partial` beside `dst`, removed if the block fails or, if it is killed, by the next attempt.

  Raises:
    ConversionError: `dst` cannot be written, another process writes it, or its disk has no room for `nbytes`.
    KeyboardInterrupt: says what is at `dst`.
  """
  partial, old = _beside(dst)
  with _claimed(dst, partial):
    try:
      for leftover in (*partial.iterdir(), old):
        if leftover.is_dir():
          shutil.rmtree(leftover, ignore_errors=leftover == old)  # the process that set it aside may be removing it
        else:
          leftover.unlink(missing_ok=True)
      free = shutil.disk_usage(partial).free
      if free < nbytes + SPARE_BYTES:
        raise ConversionError(
          f'{dst}: needs {(nbytes + SPARE_BYTES) / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free; make room, or choose '
          'another --dst'
        )
      yield partial
      if dst.exists():
        os.replace(dst, old)
      os.replace(partial, dst)
      partial = dst  # the name is free for another process
    except KeyboardInterrupt:
      raise KeyboardInterrupt(f'{dst} is as it was' if dst.exists() or old.exists() else f'nothing is at {dst}') from None
    finally:
      if old.exists() and not dst.exists():  # what was to be replaced comes back
        os.replace(old, dst)
      for leftover in {partial, old} - {dst}:
        shutil.rmtree(leftover, ignore_errors=True)
