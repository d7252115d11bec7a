"""`run.json`: what the course of a run depends on, by digest, and how far it was saved; compared when the run goes on."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from dynllava_jax import checkpoint
from dynllava_jax.checkpoint import CheckpointError
from dynllava_jax.config import ConfigError, TrainConfig, differences, from_config_dict, to_dict
from dynllava_jax.data.fingerprint import fingerprint
from dynllava_jax.data.sources import Source
from dynllava_jax.data.tokenizer import read_files
from dynllava_jax.files import read_regular, write_atomically
from dynllava_jax.training.agreement import require_same
from dynllava_jax.training.keeping import Keeping
from dynllava_jax.training.metrics import METRICS_FILE, read_metrics
from dynllava_jax.training.recovery import newest_whole_step
from dynllava_jax.training.step import schedule

CHECKPOINTS = 'checkpoints'
RUN_FILE = 'run.json'
CONFIG_FILE = 'config.json'  # the settings alone, to be read by people; rewritten at every start
FORMAT = 1
# What may be another between start and resumption, by its name in the config; all else is refused, new fields too. `steps` of a
# dense run may grow. What lies at a path is compared by digest.
MAY_CHANGE = (
  *('mesh', 'remat', 'accumulate', 'log_every', 'save_every', 'save_minutes', 'grace_seconds', 'keep', 'keep_every'),
  *('keep_best', 'keep_best_by', 'evals', 'on_bad_step', 'spike', 'data.workers', 'data.path', 'data.images'),
)
# Without effect once a step is saved, so that only '' or what names the same content is taken; the record keeps what came first.
BEGAN_FROM = ('init_from', 'data.tokenizer')
LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'grain', 'tokenizers', 'pillow')
PACKAGE = pathlib.Path(checkpoint.__file__).parent
NOT_TRAINING = ('evals', 'convert')  # parts of the package that no run depends on


@dataclasses.dataclass(frozen=True)
class RunRecord:
  """What `run.json` holds.

  Attributes:
    settings: of the config, in plain form.
    inputs: SHA-256 of what the config only names: samples, pictures, tokenizer, base weights.
    code: versions of libraries, and the digest of this package's files.
    description: content of the checkpoint's `model.json`.
    saved: the newest step that was saved; None before the first.
    history: changes of settings between start and resumption, as text.
  """

  settings: dict[str, Any]
  inputs: dict[str, str]
  code: dict[str, str]
  description: dict[str, Any]
  saved: int | None = None
  history: tuple[str, ...] = ()

  def write(self, workdir: pathlib.Path) -> None:
    content = {'format': FORMAT} | dataclasses.asdict(self)
    content = json.loads(json.dumps(content))
    write_atomically(workdir / RUN_FILE, json.dumps(content | {'sha256': checkpoint.json_digest(content)}, indent=1).encode())
    write_atomically(workdir / CONFIG_FILE, json.dumps(self.settings, indent=1).encode())


def read(workdir: pathlib.Path) -> RunRecord | None:
  """The record of the run in `workdir`; None if there is none. ConfigError if it is damaged."""
  file = workdir / RUN_FILE
  try:
    content = json.loads(read_regular(file))
    intact = content.pop('sha256') == checkpoint.json_digest(content)
    intact &= content.pop('format') == FORMAT
    record = RunRecord(**content)
    record = dataclasses.replace(record, history=tuple(record.history))
  except FileNotFoundError:
    return None
  except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
    raise ConfigError(f'{file}: damaged ({e}); {_without_it(workdir)}') from None
  if not intact:
    raise ConfigError(f'{file}: damaged, it does not match its own checksum; {_without_it(workdir)}')
  return record


def _without_it(workdir: pathlib.Path) -> str:
  return f'without it nobody knows what the run was started with. Copy it back from elsewhere, or {a_new_run(workdir)}'


AGAIN = 'to start again from step 1, choose another --workdir or move this one away'


def a_new_run(workdir: pathlib.Path) -> str:
  """The way on that is always there, as text."""
  return f'start a new run from its weights: another --workdir, and --config.init_from={workdir / CHECKPOINTS}'


def find(cfg: TrainConfig, workdir: pathlib.Path, say: Callable[[str], None], apart: bool = False) -> tuple[RunRecord | None, int]:
  """The record of the run in `workdir`, None if it is new, and the step to go on from, 0 if there is none.

  Damaged steps and descriptions are mended or set aside, and told of by `say`. `apart`: every host has a folder of its own.

  Raises:
    ConfigError: the run was started with other settings, or nothing is left of it that could be gone on with.
  """
  directory = (workdir / CHECKPOINTS).absolute()
  record = read(workdir)
  steps = checkpoint.all_steps(directory)
  if not record:
    if steps:
      raise ConfigError(f'{workdir / RUN_FILE}: missing; {_without_it(workdir)}')
    for name in (CONFIG_FILE, METRICS_FILE):
      if (workdir / name).exists():
        raise ConfigError(f'{workdir / name}: is of a run whose {RUN_FILE} and steps are gone; copy them back, or {AGAIN}')
    return None, 0
  if steps and (change := check_same_run(cfg, record, workdir, steps[-1])):
    say(change)
  if steps and (warning := changed_code(record, code_versions())):
    say(warning)
  step, told = newest_whole_step(directory, Keeping.of_run(cfg, read_metrics(workdir)), apart)
  for line in told:
    say(line)
  if step is None:
    if record.saved is None and not told:
      return record, 0  # stopped before the first step was saved
    raise ConfigError(
      f'{directory}: step {record.saved or steps[-1]} was saved, and no step is left that can be read; copy one back, or {AGAIN}'
    )
  if record.saved and record.saved > step:
    say(f'{directory / str(record.saved)}: was saved, but cannot be gone on from')
  _restore_description(directory, record, say, apart)
  return record, step


def _restore_description(directory: pathlib.Path, record: RunRecord, say: Callable[[str], None], apart: bool) -> None:
  """Writes `model.json` again as the run knows it, if it is missing, damaged or says something else."""
  try:
    found = checkpoint.read_description(directory)
  except CheckpointError:
    found = None
  multihost_utils.sync_global_devices('description read')
  if found != record.description:
    say(f'{directory / checkpoint.MODEL_FILE}: missing, damaged or changed; written again as the run knows it')
    if apart or jax.process_index() == 0:
      checkpoint.write_description(directory, record.description)
  multihost_utils.sync_global_devices('description restored')


def inputs(cfg: TrainConfig, source: Source, tokenizer: Mapping[str, bytes]) -> dict[str, str]:
  """SHA-256 of what the config only names; of a tokenizer and of base weights that it names and that are gone there is none.

  Raises:
    ConfigError: several hosts do not see the same.
  """
  out = fingerprint(source) | {'tokenizer': digest_of_files(tokenizer)}
  if cfg.data.tokenizer:
    del out['tokenizer']
    with contextlib.suppress(ConfigError):
      out['tokenizer'] = digest_of_files(read_files(cfg.data.tokenizer))
  if cfg.init_from:
    with contextlib.suppress(CheckpointError):  # needed for the first step alone, and then loading them says why
      out['base weights'] = checkpoint.weights_digest(cfg.init_from)
  require_same(out, 'give all hosts the same files')
  return out


def begin(
  cfg: TrainConfig, started: RunRecord | None, step: int, inputs: Mapping[str, str], description: dict[str, Any]
) -> RunRecord:
  """The record of a run that starts, or of one that goes on from `step` as `started` knows it."""
  code = code_versions()
  if not (started and step):
    return RunRecord(to_dict(cfg), dict(inputs), code, description)
  before, now = to_dict(from_config_dict(TrainConfig, started.settings)), to_dict(cfg)
  now |= {'init_from': before['init_from'], 'data': now['data'] | {'tokenizer': before['data']['tokenizer']}}
  changes = [f'step {step}: {key} {old!r} -> {new!r}' for key, old, new in differences(before, now)]
  if started.code != code:
    changes.append(f'step {step}: other code')
  return RunRecord(now, started.inputs | inputs, code, description, step, (*started.history, *changes))


def mark(record: RunRecord, saved: int | None, workdir: pathlib.Path) -> RunRecord:
  """Notes that a step was saved, in the file too; nothing new if `saved` is None or noted already."""
  if saved is None or saved == record.saved:
    return record
  record = dataclasses.replace(record, saved=saved)
  if jax.process_index() == 0:
    record.write(workdir)
  return record


def check_same_run(cfg: TrainConfig, record: RunRecord, workdir: pathlib.Path, step: int) -> str:
  """Compares the settings with those that the run was started with.

  Returns:
    What a change that is allowed means, '' without one.

  Raises:
    ConfigError: others that its course depends on; says how to go on.
  """
  started = from_config_dict(TrainConfig, record.settings)  # what it does not know has its default
  raised = cfg.steps > started.steps and all(stage.selector == 'all' for stage in cfg.stages)
  for key, old, new in differences(to_dict(started), to_dict(cfg)):
    if _may_change(key) or (raised and key == 'steps'):
      continue
    way_on = f'go on with {old!r}, or {a_new_run(workdir)}'
    if key.startswith('model.'):
      way_on = f'go on with {old!r}, or choose another --workdir'
    elif key == 'steps':
      way_on += '. Learning rate and temperature follow from the number of steps, so that it cannot change in between'
    raise ConfigError(f'config.{key}: the run in {workdir} was started with {old!r}, the config says {new!r}; {way_on}')
  if not raised:
    return ''
  then, now = (float(schedule(cfg.optimizer.learning_rate, n, cfg.optimizer)(step)) for n in (started.steps, cfg.steps))
  return (
    f'{workdir}: steps raised from {started.steps} to {cfg.steps} at step {step}. From here on the learning rate follows the '
    f'schedule of {cfg.steps} steps ({now:.2e} instead of {then:.2e}); a run that had {cfg.steps} steps from the start would end '
    'elsewhere'
  )


def _may_change(key: str) -> bool:
  return any(f'{key}.'.startswith(f'{name}.') for name in (*MAY_CHANGE, *BEGAN_FROM))


def check_same_inputs(cfg: TrainConfig, record: RunRecord, inputs: Mapping[str, str], workdir: pathlib.Path) -> None:
  """Raises ConfigError if something that the config only names has another content than when the run was started.

  Of weights and tokenizer a run has its own by now. What is named besides must be what it began with, unless it is gone.
  """
  began, data = record.settings, record.settings['data']
  where = {
    'samples': ('the samples', 'config.data.path', cfg.data.path, data['path']),
    'pictures': ('the pictures', 'config.data.images', cfg.data.images, data['images']),
    'tokenizer': ("the tokenizer's files", 'config.data.tokenizer', cfg.data.tokenizer, data['tokenizer']),
    'base weights': ('the base weights', 'config.init_from', cfg.init_from, began['init_from']),
  }
  for name, (what, key, given, at_start) in where.items():
    before, now = record.inputs.get(name), inputs.get(name)
    own = name in ('tokenizer', 'base weights')
    leave_empty = f'leave {key} empty, as the run has its own by now'
    if own and given not in ('', at_start) and now is None:
      raise ConfigError(f'{key}: {given} cannot be read, the run in {workdir} began with {at_start or "others"}; {leave_empty}')
    if before == now or (own and now is None):
      continue
    if before is None and own:
      raise ConfigError(
        f'{key}: the run in {workdir} was started without, and {given} would have no effect; leave it empty, or choose another '
        '--workdir to begin with it'
      )
    if now is None and given:  # an earlier version's digest of pictures that the samples do not need
      continue
    if now is None:
      raise ConfigError(f'{key}: is empty, and the run in {workdir} was started with {at_start}; say where {what} lie')
    was = f'SHA-256 {before[:12]}' if before else 'none'
    raise ConfigError(
      f'{workdir}: {what} in {key}={given} are not those that the run was started with ({was}, now {now[:12]}); put them back, '
      f'or {a_new_run(workdir)}' + (f'; or {leave_empty}' if own else '')
    )


def digest_of_files(files: Mapping[str, bytes]) -> str:
  """SHA-256 of named contents."""
  return checkpoint.json_digest({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})


def code_versions() -> dict[str, str]:
  """Versions of what computes, and the digest of this package's files that a run depends on."""
  sources = sorted(p for p in PACKAGE.rglob('*.py') if p.relative_to(PACKAGE).parts[0] not in NOT_TRAINING)
  ours = digest_of_files({p.relative_to(PACKAGE).as_posix(): p.read_bytes() for p in sources})
  versions = {}
  for name in LIBRARIES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return versions | {'dynllava_jax': ours[:12]}


def changed_code(record: RunRecord, code: Mapping[str, str]) -> str:
  """A warning if the run was started with other code, '' otherwise."""
  changed = [f'{name} {record.code.get(name)} -> {version}' for name, version in code.items() if record.code.get(name) != version]
  return f'warning: other code than the run was started with, the numbers may differ: {", ".join(changed)}' if changed else ''
