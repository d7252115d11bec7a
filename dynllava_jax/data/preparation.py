"""Samples in LLaVA's format to a folder of ArrayRecord shards that TFDS and this project's training read.

Everything is checked first (`check`). Interrupted in any way, it goes on where it stopped: each shard has a temporary name until it
is whole, and the files that make the folder a data set are written last.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from dynllava_jax import paths
from dynllava_jax.config import ConfigError, DataConfig, first_difference
from dynllava_jax.data import pictures
from dynllava_jax.data.check import (
  HISTOGRAM_FILE,
  REPORT_FILE,
  Scan,
  examine_all,
  forget,
  histogram,
  read_sources,
  report,
  table,
  with_buckets,
)
from dynllava_jax.data.frequencies import as_file, count_records
from dynllava_jax.data.index import Index, index_key, index_path, write_index
from dynllava_jax.data.integrity import (
  COUNTS_FILE,
  FEATURES_FILE,
  INFO_FILE,
  NAME,
  PICTURES_FILE,
  SEAL,
  SETTINGS_FILE,
  SOURCES_FILE,
  SPLIT,
  digests,
  open_folder,
  read_settings,
  sealed,
  settings_of,
  shard_names,
)
from dynllava_jax.data.order import check_epoch
from dynllava_jax.data.parts import Part
from dynllava_jax.data.records import Finding, Record
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.shards import (
  UNFINISHED,
  check_shards,
  is_as_noted,
  noted,
  pictures_of,
  remove_unfinished,
  sweep_shards,
  write_shard,
)
from dynllava_jax.data.store import features
from dynllava_jax.data.workers import parallel_map
from dynllava_jax.display import Terminal
from dynllava_jax.files import check_regular, read_regular, sweep, write_atomically
from dynllava_jax.progress import progress

PLAN_FILE = 'shards.json'
LARGEST_JSON = 2**35  # bytes; LLaVA's largest list of samples has 1 GB
MAX_SHARDS = 99_999  # their names have five digits


def prepare(
  scan: Scan,
  weights: Sequence[float],
  out: pathlib.Path,
  *,
  only_check: bool,
  image_bytes: bool,
  shard_samples: int,
  part: Part | None = None,
  finish: bool = False,
) -> bool:
  """Checks, reports and, unless told otherwise, writes the data set.

  Args:
    scan, weights, out: what is prepared, draws per epoch of each source, and where it goes.
    only_check, image_bytes, shard_samples: flags of the command line.
    part: do this part of the work alone, beside other machines that do the others.
    finish: the parts have done all the checking; write what is missing, and make a data set of it.

  Returns:
    Whether the data may be used under the policy `scan.data.on_bad_sample`.

  Raises:
    ConfigError: `out` holds something else, or a part is missing.
    DataError: a JSON file that cannot be read.
  """
  console = Terminal()
  settings = describe(scan, weights, image_bytes, shard_samples)
  check_resumable(out, settings)
  check_reports(out)
  unfinished = out / UNFINISHED
  if not only_check and (out / INFO_FILE).exists():
    open_folder(out)
    console.print(f'{out}: prepared already')
    remove_unfinished(out)
    return True
  entries, fields = read_sources(scan)
  check_epoch(sum(w * sum(e.source == name for e in entries) for name, w in zip(scan.json, weights)))
  if part:
    return prepare_part(scan, out, settings, entries, part, image_bytes=image_bytes, shard_samples=shard_samples)
  if not (unfinished / SETTINGS_FILE).exists():  # a removal was interrupted; the rest may be another command's
    remove_unfinished(out)
  if not only_check:
    check_shards(out)
  write(unfinished / SETTINGS_FILE, settings)
  findings = with_buckets(scan, examine_all(scan, entries, unfinished, finish=finish))
  content = report(scan, findings, fields)
  write(out / REPORT_FILE, content)
  if scan.tokenizer:
    picture = io.BytesIO()
    histogram(scan, findings).savefig(picture, dpi=120)
    write_atomically(out / HISTOGRAM_FILE, picture.getvalue())
  console.print(table(content))
  for name, counts in fields.items():
    if counts:
      console.print(f'{name}: fields that are not used: {", ".join(f"{field} ({n:,})" for field, n in counts.items())}')
  bad = sum(bool(f.reason) for f in findings)
  if bad:
    console.print(f'{bad:,} of {len(findings):,} samples cannot be used; all ids in {out / REPORT_FILE}')
  accepted = not bad or scan.data.on_bad_sample == 'skip'
  if accepted and not only_check:
    good = usable(entries, findings)
    if not good:
      remove_unfinished(out)
      raise DataError(f'{", ".join(map(str, scan.json.values()))}: no usable sample in it')
    try:
      write_store(scan, weights, out, settings, good, image_bytes, shard_samples)
    except DataError as e:
      forget(unfinished)
      hint = 'it could be when the samples were checked; start again, and they are checked once more'
      raise DataError(f'{e}; {hint}', e.reason) from None
    console.print(f'{out}: {len(good):,} samples prepared')
  remove_unfinished(out)  # also what the scan found: what is mended must be looked at again
  return accepted


def prepare_part(
  scan: Scan, out: pathlib.Path, settings: dict, entries: Sequence, part: Part, *, image_bytes: bool, shard_samples: int
) -> bool:
  """Checks a part's pieces; once those of all parts are checked, writes its shards. The arguments are those of `prepare`."""
  say, unfinished = Terminal().print, out / UNFINISHED
  if not (unfinished / SETTINGS_FILE).exists():
    if any(unfinished.glob('scan-*')):
      raise ConfigError(f'--out: {unfinished} was left by a removal that was interrupted; remove it, then start the parts')
    write(unfinished / SETTINGS_FILE, settings)
  check_shards(out)
  findings = examine_all(scan, entries, unfinished, part)
  if findings is None:
    say(f'{out}: part {part} is checked; once the others are, the same command writes its shards, or --finish all that are missing')
    return True
  findings = with_buckets(scan, findings)
  bad = sum(bool(f.reason) for f in findings)
  if bad and scan.data.on_bad_sample == 'error':
    say(f'{bad:,} of {len(findings):,} samples cannot be used; --finish reports them all, --on_bad_sample=skip leaves them out')
    return False
  jobs, plan = shard_jobs(scan, out, settings, usable(entries, findings), image_bytes, shard_samples)
  plan_file = unfinished / PLAN_FILE
  if os.path.lexists(plan_file) and not is_plan(plan_file, plan):
    raise ConfigError(f'--part: {out}: samples were mended or lost since shards were written; --finish writes them again')
  write(plan_file, plan)
  own = [job for number, job in enumerate(jobs) if part.has(number)]
  write_shards(scan, own)
  say(f'{out}: part {part} has written its {len(own):,} of {len(jobs):,} shards; once all have, --finish makes a data set of them')
  return True


def usable(entries: Sequence, findings: Sequence[Finding]) -> list[tuple[Record, Finding]]:
  """The samples that the data set is made of."""
  return [(e, f) for e, f in zip(entries, findings) if not f.reason]


def describe(scan: Scan, weights: Sequence[float], image_bytes: bool, shard_samples: int) -> dict:
  """Everything the content of the folder depends on."""
  return {
    'sources': list(scan.json),  # in the order of the samples
    'json': {name: sha256_of(path) for name, path in scan.json.items()},
    'weights': list(weights),
    'images': str(scan.images.absolute()) if paths.is_local(scan.images) else str(scan.images),
    'image_bytes': image_bytes,
    'data': dataclasses.asdict(scan.data),
    'tokenizer': index_key(scan.tokenizer, scan.data.conversation) if scan.tokenizer else None,
    'num_patches': scan.num_patches,
    'shard_samples': shard_samples,
  }


def sha256_of(path: pathlib.Path) -> str:
  """Of a regular file; DataError for anything else."""
  try:
    check_regular(path, LARGEST_JSON)
    with path.open('rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as e:
    raise DataError(f'{path}: cannot be read ({e.strerror}); expected a JSON or JSONL file') from None


def check_resumable(out: pathlib.Path, settings: dict) -> None:
  """Raises ConfigError if `out` was begun or finished with other settings."""
  for folder in (out, out / UNFINISHED):
    if (folder / SETTINGS_FILE).exists():
      try:
        before, now = settings_of(read_settings(folder)), json.loads(json.dumps(settings))
      except ConfigError:
        if folder == out:
          raise
        remove_unfinished(out)  # what a disk left of an interrupted run is not worth keeping
        continue
      # Folders of earlier versions do not tell the order of the sources, nor settings that came later.
      data = before['data'] if isinstance(before.get('data'), dict) else {}
      before = {'sources': now['sources']} | before | {'data': json.loads(json.dumps(dataclasses.asdict(DataConfig()))) | data}
      if found := first_difference(before, now):
        key, old, new = found
        raise ConfigError(f'--out: {out} was made with {key} {old!r}, now it is {new!r}; choose another or remove it')


def check_reports(out: pathlib.Path) -> None:
  """ConfigError if what lies in the place of the report or its picture is of somebody else, who may want to keep it."""
  try:
    content = json.loads(read_regular(out / REPORT_FILE))
    own = isinstance(content, dict) and content.keys() >= {'sources', 'images', 'conversation', 'text_tokens'}
  except (OSError, ValueError, RecursionError):
    own = False
  if own or any((folder / SETTINGS_FILE).exists() for folder in (out, out / UNFINISHED)):
    return
  if foreign := next((name for name in (REPORT_FILE, HISTOGRAM_FILE) if os.path.lexists(out / name)), None):
    raise ConfigError(f'--out: {out / foreign} was not written by a preparation; move it away, or choose another --out')


def write(path: pathlib.Path, content: dict | list) -> None:
  """JSON, under a temporary name first."""
  write_atomically(path, as_json(content).encode())


def as_json(content: dict | list) -> str:
  """As it stands in the files."""
  return json.dumps(content, indent=1) + '\n'


def write_store(
  scan: Scan,
  weights: Sequence[float],
  out: pathlib.Path,
  settings: dict,
  good: Sequence[tuple[Record, Finding]],
  image_bytes: bool,
  shard_samples: int,
) -> None:
  """Shards that are not there yet, then the files that make them a data set."""
  jobs, plan = shard_jobs(scan, out, settings, good, image_bytes, shard_samples)
  sweep(out)
  plan_file = out / UNFINISHED / PLAN_FILE
  sweep_shards(out, keep=is_plan(plan_file, plan))
  write(plan_file, plan)
  write_shards(scan, jobs)
  counts = [sum(r.source == name for r, _ in good) for name in scan.json]
  sources = [{'name': n, 'weight': w, 'samples': c} for n, w, c in zip(scan.json, weights, counts)]
  write(out / SOURCES_FILE, sources)
  if not image_bytes:
    write_pictures(out, [job[0] for job in jobs])
  write_metadata(out, [job[0] for job in jobs], [len(job[1]) for job in jobs])
  if scan.tokenizer:
    parts = [(job[1], scan.tokenizer) for job in jobs]
    with (
      parallel_map(count_records, parts, scan.processes) as counted,
      progress(Terminal(), 'counting tokens', len(parts)) as advance,
    ):
      write_atomically(out / COUNTS_FILE, as_file(_counted(counted, advance)))
  unfinished = out / UNFINISHED
  files = [
    *(job[0] for job in jobs),
    out / SOURCES_FILE,
    *([] if image_bytes else [out / PICTURES_FILE]),
    *([out / COUNTS_FILE] if scan.tokenizer else []),
    unfinished / FEATURES_FILE,
    unfinished / INFO_FILE,
  ]
  with parallel_map(digests, files, scan.processes) as found, progress(Terminal(), 'reading back', len(files)) as advance:
    known = {}
    for path, digest in zip(files, found):
      known[path.name] = digest
      advance(1)
  for shard, *_ in jobs:
    if noted(shard) != known[shard.name]:
      shard.unlink()
      raise OSError(f'{shard}: read back it is not what was written; is the disk failing? The same command writes it again')
  content = sealed(settings, known)
  if scan.tokenizer:
    path = index_path(out, scan.tokenizer, scan.data.conversation)
    write_index(path, Index.of(f for _, f in good), content[SEAL])
  write(out / SETTINGS_FILE, content)
  for name in (FEATURES_FILE, INFO_FILE):
    os.replace(unfinished / name, out / name)


def is_plan(path: pathlib.Path, plan: dict) -> bool:
  """Whether a file holds this plan."""
  content = as_json(plan).encode()
  try:
    return read_regular(path, len(content)) == content
  except OSError:  # also what never ends
    return False


def shard_jobs(
  scan: Scan, out: pathlib.Path, settings: dict, good: Sequence[tuple[Record, Finding]], image_bytes: bool, shard_samples: int
) -> tuple[list[tuple], dict]:
  """(what `write_shard` is to do, in order; what tells these shards from those of another attempt).

  Shards stay only if they hold the same samples: images may have been mended or lost in between.
  """
  starts = range(0, len(good), shard_samples)
  if len(starts) > MAX_SHARDS:
    raise ConfigError(f'--shard_samples: {shard_samples} makes {len(starts):,} shards, at most {MAX_SHARDS:,} can be; raise it')
  jobs = []
  for name, start in zip(shard_names(len(starts)), starts):
    records = [record for record, _ in good[start : start + shard_samples]]
    jobs.append((out / name, records, scan.images, scan.data.allow_outside, image_bytes))
  plan = {'sha256': hashlib.sha256(json.dumps([settings, [dataclasses.astuple(r) for r, _ in good]]).encode()).hexdigest()}
  return jobs, plan


def write_shards(scan: Scan, jobs: Sequence[tuple]) -> None:
  """Those that are not there yet."""
  todo = [job for job in jobs if not is_as_noted(job[0]) or not (job[-1] or pictures_of(job[0]).is_file())]
  total = sum(len(job[1]) for job in jobs)
  done = total - sum(len(job[1]) for job in todo)
  with (
    parallel_map(write_shard, todo, scan.processes) as sizes,
    progress(Terminal(), 'writing samples', total, done=done) as advance,
  ):
    for size in sizes:
      advance(size)


def write_pictures(out: pathlib.Path, shards: Sequence[pathlib.Path]) -> None:
  """The table of all pictures from the parts of the shards; OSError if a part is not as it was written."""
  parts = []
  for shard in shards:
    try:
      parts.append(pictures.from_file(pictures_of(shard)))
    except ValueError:
      pictures_of(shard).unlink()
      why = 'read back it is not what was written; is the disk failing? The same command writes it again'
      raise OSError(f'{pictures_of(shard)}: {why}') from None
  write_atomically(out / PICTURES_FILE, pictures.to_bytes(pictures.joined(parts)))


def _counted(parts: Iterable[Any], advance: Callable[[int], Any]) -> Iterator[Any]:
  for part in parts:
    yield part
    advance(1)


def write_metadata(out: pathlib.Path, shards: Sequence[pathlib.Path], lengths: Sequence[int]) -> None:
  """`features.json` and `dataset_info.json`, among the files of what is not finished."""
  import tensorflow_datasets as tfds
  from etils import epath

  folder = epath.Path(out / UNFINISHED)
  template = tfds.core.ShardedFileTemplate(
    template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
    dataset_name=NAME,
    data_dir=folder,
    split=SPLIT,
    filetype_suffix='array_record',
  )
  for path in shards:  # TFDS looks for them where it writes, and does not write atomically
    link = out / UNFINISHED / path.name
    link.unlink(missing_ok=True)
    link.symlink_to(path.absolute())
  size = sum(path.stat().st_size for path in shards)
  info = tfds.core.SplitInfo(name=SPLIT, shard_lengths=list(lengths), num_bytes=size, filename_template=template)
  tfds.folder_dataset.write_metadata(
    data_dir=folder, features=features(), split_infos=[info], filename_template=template, check_data=False
  )
