"""Whether the files of a checkpoint step are as they were written: its `integrity.json`, written last, compared when it is read."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash
from jax.experimental import multihost_utils

from dynllava_jax.files import read_regular, sampled_digest, write_atomically

INTEGRITY_FILE = 'integrity.json'
ORBAX_FILE = '_CHECKPOINT_METADATA'
# By what files are told from damaged ones: the first for new steps, at the speed of memory; all are compared.
DIGESTS = {'xxh3_128': xxhash.xxh3_128, 'sha256': hashlib.sha256}
DIGEST = next(iter(DIGESTS))


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be read or written; the message names the path and what to do."""


class DamagedError(CheckpointError):
  """A step whose files are not the ones it was sealed with."""


class Sealed(NamedTuple):
  """What `integrity.json` says of a file; `sample` is `files.sampled_digest`, None in steps of earlier versions."""

  size: int
  algorithm: str
  digest: str
  sample: str | None


def json_digest(content: dict[str, Any]) -> str:
  """SHA-256 of plain values, whatever their order."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(step_dir: pathlib.Path, known: dict[str, str] | None = None) -> None:
  """Writes `integrity.json` of a step whose arrays are all on disk.

  Args:
    step_dir: DIR/STEP, or its temporary directory.
    known: digests of files (paths below `step_dir`) that need not be read for it.
  """
  known = known or {}
  files = [p for part in step_dir.iterdir() if part.is_dir() for p in sorted(part.rglob('*')) if p.is_file()]
  names = [p.relative_to(step_dir).as_posix() for p in files]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    digests = pool.map(lambda n: known.get(n) or file_digest(step_dir / n, DIGEST), names)
    samples = pool.map(sampled_digest, files)
    table = {n: {'size': p.stat().st_size, DIGEST: d, 'sample': s} for n, p, d, s in zip(names, files, digests, samples)}
  content = {'files': table}
  write_atomically(step_dir / INTEGRITY_FILE, json.dumps(content | {'sha256': json_digest(content)}, indent=0).encode())


def file_digest(path: pathlib.Path, algorithm: str) -> str:
  """Hex digest of a file's content, by one of `DIGESTS`."""
  with path.open('rb') as f:
    return hashlib.file_digest(f, DIGESTS[algorithm]).hexdigest()


def check_integrity(step_dir: pathlib.Path, part: str | None = None, *, contents: bool = True, sampled: bool = False) -> None:
  """Compares the files of a step with its checksums.

  With several processes each checks its share.

  Args:
    step_dir: DIR/STEP.
    part: folder below it, 'params' or 'optimizer'; all if None.
    contents: read the files; otherwise only their sizes are compared.
    sampled: read only samples of large files (`files.sampled_digest`), where they were noted.

  Raises:
    CheckpointError: names every file that is missing, truncated, changed or not listed.
  """
  file = step_dir / INTEGRITY_FILE
  stated = {n: v for n, v in sealed_files(file).items() if part in (None, n.split('/')[0])}
  if not stated:
    raise DamagedError(f'{file}: damaged, it lists no file of {part or "the step"}; copy the checkpoint again')
  _check_notes_of_orbax(step_dir)
  parts = [step_dir / part] if part else [p for p in step_dir.iterdir() if p.is_dir()]
  present = {p.relative_to(step_dir).as_posix() for folder in parts for p in folder.rglob('*') if p.is_file()}
  strange = sorted(present - stated.keys())

  def problem(item) -> str | None:
    name, sealed = item
    path = step_dir / name
    if not path.is_file():
      return f'{path}: missing'
    if path.stat().st_size != sealed.size:
      return f'{path}: {path.stat().st_size} bytes, expected {sealed.size}'
    if not contents:
      return None
    if sampled and sealed.sample:
      same = sampled_digest(path) == sealed.sample
    else:
      same = file_digest(path, sealed.algorithm) == sealed.digest
    return None if same else f'{path}: damaged, its checksum is not the one it was written with'

  share = sorted(stated.items())[jax.process_index() :: jax.process_count()]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    problems = [p for p in pool.map(problem, share) if p]
  problems += [f'{step_dir / n}: not listed in {INTEGRITY_FILE}' for n in strange]
  if jax.process_count() > 1 and multihost_utils.process_allgather(np.asarray(len(problems))).any() and not problems:
    problems = ['a file that another host has checked']  # all must come to the same end
  if problems:
    raise DamagedError(f'{step_dir}: damaged; copy or write it again:\n  ' + '\n  '.join(problems))


def _check_notes_of_orbax(step_dir: pathlib.Path) -> None:
  """Orbax completes this file after a step is sealed, so no digest can tell of it."""
  file = step_dir / ORBAX_FILE
  try:
    intact = not os.path.lexists(file) or isinstance(json.loads(read_regular(file)), dict)
  except (OSError, ValueError, RecursionError):
    intact = False
  if not intact:
    raise DamagedError(f'{file}: damaged; copy the checkpoint again, or remove this file, which holds no numbers')


def sealed_files(file: pathlib.Path) -> dict[str, Sealed]:
  """What an `integrity.json` says of every file that it lists."""
  try:
    content = json.loads(read_regular(file))
    stated = content.pop('sha256', None)
    used = {n: next((a for a in DIGESTS if a in v), DIGEST) for n, v in content['files'].items()}
    files = {n: Sealed(v['size'], used[n], v[used[n]], v.get('sample')) for n, v in content['files'].items()}
  except FileNotFoundError:
    raise DamagedError(f'{file}: missing, the step is damaged or incomplete; copy or write it again') from None
  except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
    raise DamagedError(f'{file}: damaged ({e}); copy the checkpoint again') from e
  if stated not in (None, json_digest(content)):
    raise DamagedError(f'{file}: damaged, it does not match its own checksum; copy the checkpoint again')
  return files
