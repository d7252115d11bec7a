"""The shards of a preparation: each written whole or not at all, with a note of its digests until the folder is finished."""

import json
import os
import pathlib
import re
import shutil
from collections.abc import Sequence

from dynllava_jax.config import ConfigError
from dynllava_jax.data import pictures
from dynllava_jax.data.integrity import FEATURES_FILE, INFO_FILE, NAME, SETTINGS_FILE, SPLIT, digests, sample
from dynllava_jax.data.records import Record, read_image
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.store import features, to_example
from dynllava_jax.files import OWN_TEMPORARY, read_regular, write_atomically
from dynllava_jax.paths import Given

SHARD = re.compile(rf'{NAME}-{SPLIT}\.array_record-\d{{5}}-of-\d{{5}}')
HALF_WRITTEN = re.compile(rf'{SHARD.pattern}\.\d+\.tmp')
# What `UNFINISHED` holds: settings, plan, findings, notes of shards, links to them, and what TFDS writes or has begun to write.
WRITTEN = re.compile(
  rf'{re.escape(SETTINGS_FILE)}|shards\.json|scan-\d{{6}}\.json|part-\d+-of-\d+|{SHARD.pattern}(?:\.json|\.npz)?'
  rf'|(?:{re.escape(FEATURES_FILE)}|{re.escape(INFO_FILE)}).*|.*incomplete.*'
)
UNFINISHED = '.unfinished'  # folder of what an interrupted run needs to go on
SHARD_OPTIONS = 'group_size:1,uncompressed'  # one record per chunk for random access; JPEG does not shrink


def write_shard(job: tuple[pathlib.Path, Sequence[Record], Given, bool, bool]) -> int:
  """Writes one shard whole or not at all; returns its number of samples. OSError if there is no room.

  The job: where it goes, samples, root of the image files, whether these may lie outside, whether their bytes go into the shard.
  """
  from array_record.python.array_record_module import ArrayRecordWriter
  from tensorflow_datasets.proto import tf_example_pb2

  path, records, images, allow_outside, image_bytes = job
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    writer, form = ArrayRecordWriter(str(temporary), SHARD_OPTIONS), features()
    try:
      for record in records:
        image = read_image(record.id, record.image_path, images, allow_outside) if image_bytes and record.image_path else b''
        content = form.serialize_example(to_example(record, image))
        # Else the fields lie in another order in each process, and what is prepared again has other digests.
        writer.write(tf_example_pb2.Example.FromString(content).SerializeToString(deterministic=True))
    finally:
      writer.close()
  except DataError:
    raise
  except RuntimeError as e:  # ArrayRecord's word for a full disk
    raise OSError(f'{path}: cannot be written ({e}); once that is mended the same command goes on') from None
  if not image_bytes:
    write_atomically(pictures_of(path), pictures.to_bytes(pictures.of_records(records, images, allow_outside)))
  write_atomically(note_of(path), json.dumps(digests(temporary)).encode())
  os.replace(temporary, path)
  return len(records)


def note_of(shard: pathlib.Path) -> pathlib.Path:
  """Where the digests of a shard are kept until the folder is finished."""
  return shard.parent / UNFINISHED / f'{shard.name}.json'


def pictures_of(shard: pathlib.Path) -> pathlib.Path:
  """Where the part of a shard in the table of pictures is kept until the folder is finished."""
  return shard.parent / UNFINISHED / f'{shard.name}.npz'


def noted(shard: pathlib.Path) -> dict | None:
  """The digests that a shard had when it was written; None if they cannot be read."""
  try:
    known = json.loads(read_regular(note_of(shard)))
  except (OSError, ValueError, RecursionError):
    return None
  return known if isinstance(known, dict) else None


def remove_unfinished(out: pathlib.Path) -> None:
  """Removes what interrupted runs left in a folder: `UNFINISHED`, and the shards that have their note in there.

  Raises:
    ConfigError: `UNFINISHED` holds something that no preparation writes.
  """
  names = _left_by_runs(out)
  if not (out / INFO_FILE).exists():
    for name in names:
      if SHARD.fullmatch(name.removesuffix('.json')) and name.endswith('.json'):
        (out / name.removesuffix('.json')).unlink(missing_ok=True)
  if os.path.lexists(out / UNFINISHED):
    shutil.rmtree(out / UNFINISHED)


def _left_by_runs(out: pathlib.Path) -> list[str]:
  """What `UNFINISHED` holds; ConfigError if something of it was not written by a preparation."""
  folder = out / UNFINISHED
  if not os.path.lexists(folder):
    return []
  if folder.is_symlink() or not folder.is_dir():
    raise ConfigError(f'--out: {folder} is no folder of an interrupted run; move it away, or choose another --out')
  names = sorted(os.listdir(folder))
  if strange := next((name for name in names if not WRITTEN.fullmatch(name) and not OWN_TEMPORARY.fullmatch(name)), None):
    raise ConfigError(f'--out: {folder / strange} was not written by a preparation; move it away, or choose another --out')
  return names


def check_shards(out: pathlib.Path) -> None:
  """ConfigError if there is something in the place of shards or among what interrupted runs left that no attempt wrote."""
  _left_by_runs(out)
  for path in sorted(out.glob(f'{NAME}-{SPLIT}.array_record-*')):
    if SHARD.fullmatch(path.name):
      _check_own(path)


def sweep_shards(out: pathlib.Path, keep: bool) -> None:
  """Removes what killed writers left half written, and unless they are to be kept, the shards of another attempt."""
  check_shards(out)
  for path in sorted(out.glob(f'{NAME}-{SPLIT}.array_record-*')):
    if HALF_WRITTEN.fullmatch(path.name) or (SHARD.fullmatch(path.name) and not keep):
      path.unlink()


def _check_own(shard: pathlib.Path) -> None:
  if shard.is_dir() and not shard.is_symlink():
    raise ConfigError(f'{shard}: is a folder, a file is to be written there; move it away')
  if not os.path.lexists(note_of(shard)):
    raise ConfigError(f'--out: {shard} was not written by this preparation; move it away, or choose another --out')


def is_as_noted(shard: pathlib.Path) -> bool:
  """Whether a shard is there, as long as it was and with the same sample; else it is removed. The rest is compared in the end.

  Raises:
    ConfigError: there is something that this preparation did not write.
  """
  try:
    with open(shard, 'rb', opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
      known = noted(shard) or {}
      size = os.fstat(file.fileno()).st_size
      if (size, sample(file.fileno())) == (known.get('bytes'), known.get('sample')):
        return True
  except OSError:
    pass
  if os.path.lexists(shard):
    _check_own(shard)
    shard.unlink()
  return False
