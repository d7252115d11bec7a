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
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from dynllava_jax import checkpoint
from dynllava_jax.convert.plan import Assignment, assign
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.source import Request, Source, open_source
from dynllava_jax.convert.writer import StepWriter

REPORT_FILE = 'conversion.json'
RESULTS = (checkpoint.MODEL_FILE, 'config.json')  # one of these tells a directory that may be overwritten
DTYPES = {'keep': None, 'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
AT_ONCE = max(2, min(4, os.cpu_count() or 1))  # tensors on their way; each takes about three times its size
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
  request: Request, dst: pathlib.Path, dtype: str = 'keep', overwrite: bool = False, readback: bool = True
) -> tuple[Source, list[Mapped]]:
  """Converts a checkpoint. Interrupted, it leaves nothing at `dst`; started again, it starts over.

  Args:
    request: what to convert.
    dst: directory to write; new or empty unless `overwrite`.
    dtype: 'keep', 'float32' or 'bfloat16'.
    readback: read every file again and compare checksums.

  Raises:
    ConversionError: the source is wrong (nothing is written then), or the destination is unwritable, too small or
      does not hold what was written.
  """
  dst = dst.resolve()
  check_destination(dst, overwrite, request.src, request.vision, request.base)
  source = open_source(request)
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
      return Mapped(a.tensor.key, a.tensor.origin, a.target, a.tensor.shape, str(a.dtype), digest, writer.file(a.path, a.index))

    mapped = with_progress('converting', write, plan, [a.nbytes for a in plan])
    if readback:
      check_files(step_dir, mapped, [a.nbytes for a in plan])
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


def check_files(step_dir: pathlib.Path, mapped: list[Mapped], sizes: list[int]) -> None:
  """Reads every slot's file again; ConversionError if one does not hold what was written."""

  def check(m: Mapped) -> None:
    if checkpoint.file_sha256(step_dir / m.file) != m.sha256:
      raise ConversionError(f'{step_dir / m.file}: read back, it is not {m.source} as written; is the disk failing?')

  with_progress('reading back', check, mapped, sizes)


def with_progress(label: str, function: Callable[[T], R], items: list[T], sizes: list[int]) -> list[R]:
  """Maps a function over items, a few at once, showing bytes and rate; the first error ends it."""
  console = Console(stderr=True)
  columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
  pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
  try:
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
      task = progress.add_task(label, total=sum(sizes))
      results = []
      for result, size in zip(pool.map(function, items), sizes):
        results.append(result)
        progress.advance(task, size)
      return results
  finally:
    pool.shutdown(cancel_futures=True)


def check_destination(dst: pathlib.Path, overwrite: bool, *sources: pathlib.Path | None) -> None:
  """ConversionError if there is something at `dst` that may not be replaced, a source above all."""
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
  if dst.is_dir() and any(dst.iterdir()) and not any((dst / name).is_file() for name in RESULTS):
    raise ConversionError(f'{dst}: holds no checkpoint, and --overwrite replaces only those; choose another --dst')


@contextlib.contextmanager
def new_directory(dst: pathlib.Path, nbytes: int) -> Iterator[pathlib.Path]:
  """A directory to fill that gets its name `dst` only when the block ends without an error.

  Until then it is `.NAME.partial` beside `dst`, removed if the block fails or, if it is killed, by the next attempt.

  Raises:
    ConversionError: `dst` cannot be written, or its disk has no room for `nbytes`.
  """
  partial, old = dst.with_name(f'.{dst.name}.partial'), dst.with_name(f'.{dst.name}.old')
  try:
    if old.exists() and not dst.exists():  # killed between the two renames at the end
      os.replace(old, dst)
    for leftover in (partial, old):
      if leftover.exists():
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
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
    shutil.rmtree(old, ignore_errors=True)
  except OSError as e:
    raise ConversionError(f'{dst}: cannot be written ({e})') from None
  finally:
    shutil.rmtree(partial, ignore_errors=True)
