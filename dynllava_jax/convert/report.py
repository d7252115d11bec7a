"""What the command line prints of a conversion."""

import collections
import pathlib
import resource
import sys
import time

from dynllava_jax import checkpoint
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.destination import REPORT_FILE
from dynllava_jax.convert.export import export
from dynllava_jax.convert.records.base import load_case
from dynllava_jax.convert.records.dynamic_llava import check_case
from dynllava_jax.convert.source import Request, Source
from dynllava_jax.convert.upcycle import upcycle
from dynllava_jax.convert.verify import verify
from dynllava_jax.display import printable


def run_conversion(request: Request, dst: pathlib.Path, dtype: str, overwrite: bool, readback: bool, case: str | None) -> bool:
  """Converts, prints what became of the source and, if a case is given, the comparison. Returns whether all is well.

  Raises:
    ConversionError: nothing was written, or the case is unusable.
  """
  recorded = load_case(case) if case else None
  told: list[str] = []

  def opened(source: Source) -> None:
    print(f'layout: {source.layout}', *(printable(f'note: {note}') for note in source.notes), sep='\n', flush=True)
    told.extend(source.notes)
    if recorded:  # a wrong case should not cost a conversion
      check_case(source.info, recorded, case)

  start = time.monotonic()
  source, mapped = convert(request, dst, dtype, overwrite, readback, opened)
  seconds = time.monotonic() - start
  parts = collections.Counter(m.target.split('/')[0] for m in mapped)
  stored = collections.Counter(m.dtype for m in mapped)
  print(
    f'converted {len(mapped)} tensors to {printable(dst)}: '
    + ', '.join(f'{n} {part}' for part, n in parts.items())
    + f' ({", ".join(stored)}); every one is listed in {REPORT_FILE}'
  )
  print(*(printable(f'note: {note}') + '\n' for note in source.notes[len(told) :]), _effort(seconds, readback), sep='')
  if not recorded:
    return True
  quantities = verify(source.info, checkpoint.load_params(dst), case)
  for quantity in quantities:
    print(quantity)
  passed = sum(q.ok for q in quantities)
  print(f'verify: {passed} of {len(quantities)} passed')
  return passed == len(quantities)


def run_export(src: pathlib.Path, dst: pathlib.Path, layout: str, *, readback: bool, **options) -> None:
  """Exports (see `export.export`) and prints what was written."""
  start = time.monotonic()
  written = export(src, dst, layout, readback=readback, **options)
  stored = collections.Counter(str(o.dtype) for o in written)
  print(
    f'exported {len(written)} tensors to {printable(dst)} as {layout} '
    f'({", ".join(stored)}, {sum(o.nbytes for o in written) / 1e9:.2f} GB)'
  )
  print(_effort(time.monotonic() - start, readback))


def run_upcycle(src: pathlib.Path, dst: pathlib.Path, count: int, *, seed: int, overwrite: bool) -> None:
  """Puts experts into a dense checkpoint (see `upcycle.upcycle`) and prints what was written."""
  start = time.monotonic()
  llama = upcycle(src, dst, count, seed=seed, overwrite=overwrite).model.llama
  layers = ', '.join(map(str, llama.experts.layers))
  print(
    f'{printable(dst)}: {count} experts in layers {layers}, {llama.experts.top_k} of them for each token; answers are as before'
  )
  print(_effort(time.monotonic() - start, True))


def _effort(seconds: float, readback: bool) -> str:
  unit = 1 if sys.platform == 'darwin' else 1024  # bytes
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  checked = 'read back and found equal' if readback else 'not read back'
  return f'{checked}; {seconds:.1f} s, at most {peak / 1e9:.2f} GB of memory'
