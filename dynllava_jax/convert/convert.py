"""PyTorch checkpoint -> checkpoint of this project, tensor by tensor."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import TypeVar

import ml_dtypes
import numpy as np
import xxhash

from dynllava_jax import checkpoint
from dynllava_jax.convert.destination import REPORT_FILE, STEP, check_destination, new_directory
from dynllava_jax.convert.inputs import ConversionError
from dynllava_jax.convert.numbers import describe, look
from dynllava_jax.convert.plan import Assignment, Leaf, Path, assign, slot_name
from dynllava_jax.convert.source import Request, Source, open_source
from dynllava_jax.convert.writer import StepWriter
from dynllava_jax.display import Terminal
from dynllava_jax.models.matrices import MATRICES, SCALES, inner_axes, to_int8
from dynllava_jax.progress import progress

INT8 = 'int8'  # the decoder's matrices, with their scales; the rest is kept
DTYPES = {'keep': None, 'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16), INT8: None}
AT_ONCE = 6  # tensors on their way: some are read and written while others are hashed; each takes about three times its size
T = TypeVar('T')
R = TypeVar('R')


@dataclasses.dataclass(frozen=True)
class Mapped:
  """One line of the report. `file` and `xxh3_128` are of the slot as stored, below the step's directory."""

  source: str
  origin: str
  target: str
  shape: tuple[int, ...]
  dtype: str
  xxh3_128: str
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
    dtype: 'keep', 'float32', 'bfloat16', or 'int8' for the decoder's matrices with the rest kept.
    readback: read every tensor again and compare it with what was written.
    on_open: is given the source before anything is written, to show it or to refuse it.

  Raises:
    ConversionError: the source is wrong (nothing is written then), or the destination is unwritable, too small or
      does not hold what was written.
  """
  dst = pathlib.Path(os.path.realpath(dst))
  check_destination(dst, overwrite, request.src, request.vision, request.base)
  source = open_source(request)
  if dtype == INT8 and source.info.model.llama.experts:
    raise ConversionError(f'{request.src}: has layers of experts, which are not rounded to int8; choose another --dtype')
  on_open(source)
  read = {pathlib.Path(t.origin) for _, t in source.tensors} | ({pathlib.Path(request.projector)} if request.projector else set())
  check_destination(dst, overwrite, *(file for file in read if file.is_file()))  # also what a config names, such as the tower
  plan = assign(source.info, source.tensors, DTYPES[dtype])
  smaller = {a.path for a in plan if a.path[:2] == ('llama', 'layers') and a.path[-1] in MATRICES} if dtype == INT8 else set()
  with new_directory(dst, sum(a.nbytes for a in plan)) as partial:
    step_dir = partial / str(STEP)
    zeros: list[str] = []
    leaves = {a.path: (a.leaf, a.dtype) for a in plan}
    for path in smaller:
      leaves[path] = leaves[path][0], np.dtype(np.int8)
      leaves[scales_of(path)] = scales_leaf(path, leaves[path][0]), np.dtype(np.float32)
    writer = StepWriter(step_dir, leaves)

    def write(a: Assignment) -> list[Mapped]:
      value = np.ascontiguousarray(a.load())
      digest = xxhash.xxh3_128()
      seen = look(value, digest)
      if seen.implausible:
        raise ConversionError(
          f'{a.tensor.origin}: {a.tensor.key} is damaged or of a run that diverged: {describe(value)}; take another copy or step'
        )
      if seen.zero and len(a.tensor.shape) > 1:
        zeros.append(a.tensor.key)
      if a.path not in smaller:
        return [put(a, a.path, value, digest.hexdigest())]
      parts = map(np.asarray, to_int8(a.path[-1], value, 0))
      return [
        put(a, path, np.ascontiguousarray(x), xxhash.xxh3_128_hexdigest(x)) for path, x in zip((a.path, scales_of(a.path)), parts)
      ]

    def put(a: Assignment, path: Path, value: np.ndarray, digest: str) -> Mapped:
      writer.write(path, a.index, value)
      file = writer.file(path, a.index)
      if readback and not writer.holds(path, a.index, value):
        raise ConversionError(f'{step_dir / file}: read back, it is not {a.tensor.key} as written; is the disk failing?')
      target = slot_name(path, a.index)
      return Mapped(a.tensor.key, a.tensor.origin, target, a.tensor.shape, str(value.dtype), digest, file)

    mapped = [m for some in with_progress('converting', write, plan, [a.nbytes for a in plan]) for m in some]
    if zeros:
      source.notes.append(f'every number is zero in {len(zeros)} tensors, such as {min(zeros)}; is the source whole?')
    checkpoint.seal(step_dir, {m.file: m.xxh3_128 for m in mapped})
    report = {
      'layout': source.layout,
      'source': str(request.src),
      'dtype': dtype,
      'notes': source.notes,
      'read_back': readback,
      'tensors': [dataclasses.asdict(m) for m in mapped],
    }
    checkpoint.write_atomically(partial / REPORT_FILE, json.dumps(report, indent=1).encode())
    checkpoint.write_info(partial, dataclasses.replace(source.info, int8=dtype == INT8), source.tokenizer, source.assets)
  return source, mapped


def scales_of(path: Path) -> Path:
  """Where the scales of a matrix are stored."""
  return SCALES, *path[1:]


def scales_leaf(path: Path, matrix: Leaf) -> Leaf:
  """The scales of a matrix of layers, one per output."""
  return Leaf(tuple(n for axis, n in enumerate(matrix.shape) if axis - 1 not in inner_axes(path[-1])), matrix.slot_axes)


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
