"""Finding the step that a run goes on from: the newest one that is whole. Damaged ones are named and set aside."""

import pathlib
import shutil

import jax
from jax.experimental import multihost_utils

from dynllava_jax import checkpoint
from dynllava_jax.checkpoint import DamagedError
from dynllava_jax.training.keeping import Keeping

ASIDE = '.damaged'  # added to the name of a step that cannot be loaded


def newest_whole_step(directory: pathlib.Path, keeping: Keeping, apart: bool = False) -> tuple[int | None, list[str]]:
  """Reads the newest step with its checksums, and older ones until one is whole; compares sizes alone of those before it.

  Args:
    directory: checkpoints of a run. Nobody else may write there.
    keeping: which steps stay; what is not whole and does not was being removed.
    apart: every host has a folder of its own.

  Returns:
    The step, None if there is none, and what was done about others, as text.
  """
  whole, told = [], []
  for step in reversed(checkpoint.all_steps(directory)):
    path = directory / str(step)
    try:
      checkpoint.check_integrity(path, contents=not whole)
      whole.append(step)
    except DamagedError as e:
      told.append(_put_away(path, e, step not in keeping.kept([*whole, step]), apart))
  return (whole[0] if whole else None), told


def _put_away(path: pathlib.Path, error: DamagedError, remove: bool, apart: bool) -> str:
  why = ' '.join(str(error).split())
  if remove:
    message = f'{path}: half deleted, the rest is removed now'
  else:
    taken = {p.name for p in path.parent.iterdir()}
    names = (f'{path.name}{ASIDE}{number}' for number in ['', *(f'-{n}' for n in range(2, len(taken) + 3))])
    aside = path.with_name(next(n for n in names if n not in taken))
    message = f'{why}; set aside as {aside.name}'
  multihost_utils.sync_global_devices('damaged step')  # all have seen it
  if apart or jax.process_index() == 0:
    shutil.rmtree(path) if remove else path.rename(aside)
  multihost_utils.sync_global_devices('set aside')
  return message
