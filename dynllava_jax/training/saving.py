"""Writing the steps of a run: counted against what was to be saved, sealed, then given their name; older ones go as `keeping` says.

Orbax writes in the background. What it cannot write is one line here; what it logs of it, `command_line` leaves out.
"""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import tensorstore
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_manager
from orbax.checkpoint import v1 as ocp

from dynllava_jax import checkpoint
from dynllava_jax.checkpoint import CheckpointError
from dynllava_jax.config import TrainConfig
from dynllava_jax.files import reason
from dynllava_jax.stored import on_disk
from dynllava_jax.training.gathering import on_first_host
from dynllava_jax.training.keeping import Keeping
from dynllava_jax.training.stopping import any_host

UNFINISHED = '.orbax-checkpoint-tmp'  # what Orbax adds to the name of a step that it is writing
NOT_IN_A_PATH = '[]*?\\'  # Orbax looks for its own files with a pattern made of the path, and takes \ for /


def check_path(directory: pathlib.Path) -> None:
  """Raises CheckpointError if Orbax would write somewhere else, or nothing, in a directory of this name."""
  if found := sorted(set(str(directory)) & set(NOT_IN_A_PATH)):
    raise CheckpointError(
      f'{directory}: {" ".join(found)} in the path of a checkpoint is taken for a pattern by the library that writes it; choose a '
      f'path without any of {" ".join(NOT_IN_A_PATH)}'
    )


class Saver:
  """Saves steps of a run. All processes make one and use it alike."""

  def __init__(self, directory: pathlib.Path, keeping: Keeping | None = None, apart: Mesh | None = None):
    """Args:

      directory: made if it is missing; what an interrupted save left there is removed.
      keeping: which steps stay; the newest one if None.
      apart: the mesh, where every host has a directory of its own: then the first host gets all arrays, and it alone writes.

    Raises:
      CheckpointError: it cannot be written, or has a name that Orbax cannot use.
    """
    self._directory = directory.absolute()
    check_path(self._directory)
    self._keeping, self._closed = keeping or Keeping(), False
    self._step, self._expected = None, {}  # of the last save
    self._apart, self._writes = apart, not (apart and jax.process_index())
    if not self._writes:
      return
    context = ocp.Context()
    if apart:
      context.multiprocessing.primary_host, context.multiprocessing.active_processes = 0, {0}
    context.array.saving.scoped_storage_options_creator = _layer_by_layer
    context.asynchronous.post_finalization_callback = lambda: self._seal()  # a bound method would be copied, with all of this
    with self._errors_in_one_line(), _directory_made(self._directory) if apart else contextlib.nullcontext():
      self._orbax = ocp.training.Checkpointer(
        self._directory,
        preservation_policy=self._keeping,
        cleanup_tmp_directories=True,
        context=context,
      )

  def save(self, step: int, parts: dict[str, Any]) -> None:
    """Begins to save a step when the one before is written. `parts`: trees of arrays by name, such as 'params'.

    Raises:
      CheckpointError: this one, or the one before, cannot be written.
    """
    if self._writes:
      with self._errors_in_one_line():
        self._orbax.wait()
    if self._apart:
      parts = on_first_host(parts, self._apart)
    if not self._writes:
      return
    self._step = step
    self._expected = {part: _described(tree) for part, tree in parts.items()}
    with self._errors_in_one_line():
      # force: by default Orbax passes over a step while the one before is still being written, the last one too.
      self._orbax.save_checkpointables_async(step, parts, force=True)

  def written(self) -> int | None:
    """The last step that was saved, if it is on disk by now; CheckpointError if it could not be written."""
    if self._step is None or self._orbax.is_saving_in_progress():
      return None
    with self._errors_in_one_line():
      self._orbax.wait()
    return self._step

  def close(self) -> None:
    """Waits until everything is written, and removes what later scores left behind; CheckpointError if it cannot be."""
    if self._closed or not self._writes:
      return
    self._closed = True
    with self._errors_in_one_line():
      try:
        self._orbax.wait()
        steps = [c.step for c in self._orbax.checkpoints]
        for step in sorted(set(steps) - self._keeping.kept(steps)):
          self._orbax.delete(step)
      finally:
        self._orbax.close()

  def __enter__(self) -> 'Saver':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _seal(self) -> None:
    """Called by Orbax before a step gets its name."""
    if jax.process_index():
      return
    found = [p for p in self._directory.iterdir() if p.name.endswith(UNFINISHED) and p.name.split('.')[0] == str(self._step)]
    if len(found) != 1:
      raise CheckpointError(f'{self._directory}: step {self._step} is not where it was written; start again to go on')
    check_contents(found[0], self._expected)
    checkpoint.seal(found[0])

  @contextlib.contextmanager
  def _errors_in_one_line(self) -> Iterator[None]:
    try:
      yield
    except Exception as e:
      if isinstance(e, CheckpointError) or not (why := reason(e)):
        raise
      path = self._directory if self._step is None else self._directory / str(self._step)
      raise CheckpointError(
        f'{path}: cannot be written ({why}); what was saved before is intact. Mend that, and start the same command again to go on'
      ) from None


class SaveTimes:
  """When a run saves: every so many steps and minutes, and at its end."""

  def __init__(self, cfg: TrainConfig):
    self._cfg = cfg
    self.saved()

  def due(self, step: int, talking: bool) -> bool:
    """Whether to save after a step. Several hosts compare their clocks only when they talk, see `stopping.any_host`."""
    late = self._cfg.save_minutes and time.monotonic() - self._since >= 60 * self._cfg.save_minutes
    in_time = step % self._cfg.save_every == 0 or step == self._cfg.steps
    return any_host(bool(late), talking) or in_time if self._cfg.save_minutes else in_time

  def saved(self) -> None:
    """The minutes begin again."""
    self._since = time.monotonic()


@contextlib.contextmanager
def _directory_made(directory: pathlib.Path) -> Iterator[None]:
  """Inside, Orbax finds its directory made: where not all processes write it refuses to make one, and has no option to leave it."""
  directory.mkdir(parents=True, exist_ok=True)
  make = checkpoint_manager._create_root_directory
  checkpoint_manager._create_root_directory = lambda *_, **__: None
  try:
    yield
  finally:
    checkpoint_manager._create_root_directory = make


def _layer_by_layer(path: tuple, _: Any) -> Any:
  """How Orbax cuts an array into blocks: a stack of layers into its layers, which `stored` reads one at a time."""
  names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
  return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,)) if 'layers' in names else None


def _described(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
  """Shape and dtype of every array by the name under which Orbax stores it."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): (tuple(x.shape), str(x.dtype)) for path, x in leaves}


def check_contents(step_dir: pathlib.Path, expected: dict[str, dict[str, tuple[tuple[int, ...], str]]]) -> None:
  """Compares what a step on disk holds with what was to be saved: arrays, shapes, dtypes, and that every block of them is there.

  Args:
    step_dir: DIR/STEP or its temporary directory, in Orbax's usual form (zarr 3 in OCDBT).
    expected: per part ('params') shape and dtype by name ('llama.layers.q').

  Raises:
    CheckpointError: names what is missing or different.
  """
  problems = []
  for part, arrays in expected.items():
    try:
      stored = _stored(step_dir / part)
    except ValueError as e:  # tensorstore's
      why = reason(e) or ' '.join(str(e).split())[:200]
      raise CheckpointError(f'{step_dir / part}: cannot be read back ({why}); look at the disk, and start again to go on') from None
    for name, array in arrays.items():
      if stored.get(name) != array:
        problems.append(f'{part}/{name}: {stored.get(name, "missing")}, saved {array}')
    problems += [f'{part}/{name}: nothing of this name was saved' for name in stored.keys() - arrays.keys()]
  if problems:
    raise CheckpointError(
      f'{step_dir}: {len(problems)} arrays on disk are not what was to be saved, such as {problems[0]}; the step is left out. '
      'Look at the disk, and start again to go on'
    )


def _stored(folder: pathlib.Path) -> dict[str, tuple[tuple[int, ...], str] | str]:
  """(shape, dtype) of every array of an OCDBT database, or what is wrong with it."""
  database = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': on_disk(folder)}).result()
  keys = [key.decode() for key in database.list().result()]
  blocks: dict[str, int] = {}
  for key in keys:
    if not key.endswith('/zarr.json'):
      name = key.split('/')[0]
      blocks[name] = blocks.get(name, 0) + 1
  out = {}
  for name in (key.removesuffix('/zarr.json') for key in keys if key.endswith('/zarr.json')):
    about = json.loads(database.read(f'{name}/zarr.json').result().value)
    shape, block = about['shape'], about['chunk_grid']['configuration']['chunk_shape']
    count = math.prod(-(-size // part) for size, part in zip(shape, block))
    whole = blocks.get(name, 0) == count
    out[name] = (tuple(shape), about['data_type']) if whole else f'{blocks.get(name, 0)} of {count} blocks'
  return out
