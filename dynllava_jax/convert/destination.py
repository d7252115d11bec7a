"""Where a checkpoint is written: what may be replaced there, and a directory that gets its name when it is whole."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from dynllava_jax import checkpoint, locks
from dynllava_jax.config import MODEL_FILES, TOKENIZER_FILES
from dynllava_jax.convert.inputs import ConversionError
from dynllava_jax.convert.readers import INDEX, WEIGHTS, has_weights
from dynllava_jax.files import STORE_ERROR, reason

REPORT_FILE = 'conversion.json'
TOWER_FOLDER = 'clip'  # of an export in the authors' layouts
STEP = 0  # of a conversion
# Everything that a conversion or an export puts into its directory, besides shards.
KNOWN = {checkpoint.MODEL_FILE, checkpoint.ASSETS, REPORT_FILE, str(STEP), TOWER_FOLDER, *MODEL_FILES, *TOKENIZER_FILES}
KNOWN |= {WEIGHTS[0], WEIGHTS[0] + INDEX}
SHARDS = 'model-*-of-*.safetensors'
SPARE_BYTES = 64 * 2**20  # room for metadata and descriptions


def check_destination(dst: pathlib.Path, overwrite: bool, *sources: pathlib.Path | None) -> None:
  """ConversionError if there is something at `dst` that may not be replaced, a source above all.

  A checkpoint that a killed run had set aside to replace it gets its name back first.
  """
  if os.path.ismount(dst):
    raise ConversionError(f'{dst}: is a mount point, which cannot be renamed; choose a directory inside it as --dst')
  partial, old = _beside(dst)
  _check_leftovers(partial, old)
  if old.exists() and not dst.exists():  # killed between the two renames at the end
    with _claimed(dst, partial):
      os.replace(old, dst)
      shutil.rmtree(partial)
  for source in sources:
    if source is None:
      continue
    here = pathlib.Path(os.path.realpath(source))  # `resolve` raises for links that lead in a circle
    if here.is_relative_to(dst) or (here.is_dir() and dst.is_relative_to(here)):
      raise ConversionError(f'{dst}: is, holds or lies in the source {source}; choose another --dst')
  if dst.exists() and not dst.is_dir():
    raise ConversionError(f'{dst}: is a file; choose another --dst')
  if dst.is_dir() and any(dst.iterdir()) and not overwrite:
    raise ConversionError(f'{dst}: exists and is not empty; choose another --dst, or replace it with --overwrite')
  if dst.is_dir() and any(dst.iterdir()) and (reason := _not_ours(dst)):
    raise ConversionError(f'{dst}: {reason}, and --overwrite replaces only those; choose another --dst, or remove it yourself')


def _not_ours(directory: pathlib.Path) -> str | None:
  """Why a directory is not what a conversion or an export writes and nothing besides; None if it is."""
  strange = _strangers(directory)
  trained = [n for n in strange if n.partition('/')[0].isdigit()]
  if trained:
    return f'holds {trained[0]}, of a training run, which is no conversion'
  exported = (directory / 'config.json').is_file() and has_weights(directory)
  if strange or not (exported or (directory / REPORT_FILE).is_file()):
    return 'is no checkpoint' + (f' alone (it holds {strange[0]})' if strange else '')
  return None


def _strangers(directory: pathlib.Path) -> list[str]:
  """What a directory holds that neither a conversion nor an export writes, such as a training run's optimizer."""
  names = []
  for folder, known in (('', KNOWN), (str(STEP), {'params'}), (TOWER_FOLDER, KNOWN)):
    for path in (directory / folder).iterdir() if (directory / folder).is_dir() else ():
      ours = path.name in known or path.match(SHARDS) or (folder == str(STEP) and path.is_file())
      names += [] if ours else [f'{folder}/{path.name}'.lstrip('/')]
  return sorted(names)


def _check_leftovers(*directories: pathlib.Path) -> None:
  """ConversionError if what stands where an earlier attempt would have left something is something else."""
  for directory in directories:
    if not directory.exists():
      continue
    strange = _strangers(directory) if directory.is_dir() else ['no directory']
    strange = [n for n in strange if not n.startswith((f'{STEP}.', '.'))]  # what is written is not yet under its own name
    if strange:
      raise ConversionError(f'{directory}: is not what an interrupted conversion leaves (it holds {strange[0]}); move it away')


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
  except (ValueError, ExceptionGroup) as e:  # of the libraries that write for Orbax
    if (isinstance(e, ValueError) and not STORE_ERROR.match(str(e))) or not (why := reason(e)):
      raise
    raise ConversionError(f'{dst}: cannot be written ({why})') from None


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
