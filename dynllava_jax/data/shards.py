"""The shards of a preparation: each written whole or not at all, with a note of its digests until the folder is finished."""

import json
import os
import pathlib
from collections.abc import Sequence

from dynllava_jax.config import ConfigError
from dynllava_jax.data.integrity import digests, sample
from dynllava_jax.data.records import Record, read_image
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.store import features, to_example
from dynllava_jax.files import read_regular, write_atomically

UNFINISHED = '.unfinished'  # folder of what an interrupted run needs to go on
SHARD_OPTIONS = 'group_size:1,uncompressed'  # one record per chunk for random access; JPEG does not shrink


def write_shard(job: tuple[pathlib.Path, Sequence[Record], pathlib.Path | None, bool]) -> int:
  """Writes one shard whole or not at all; returns its number of samples. OSError if there is no room."""
  from array_record.python.array_record_module import ArrayRecordWriter

  path, records, images, allow_outside = job
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    writer, form = ArrayRecordWriter(str(temporary), SHARD_OPTIONS), features()
    try:
      for record in records:
        image = read_image(record.id, record.image_path, images, allow_outside) if images and record.image_path else b''
        writer.write(form.serialize_example(to_example(record, image)))
    finally:
      writer.close()
  except DataError:
    raise
  except RuntimeError as e:  # ArrayRecord's word for a full disk
    raise OSError(f'{path}: cannot be written ({e}); once that is mended the same command goes on') from None
  write_atomically(note_of(path), json.dumps(digests(temporary)).encode())
  os.replace(temporary, path)
  return len(records)


def note_of(shard: pathlib.Path) -> pathlib.Path:
  """Where the digests of a shard are kept until the folder is finished."""
  return shard.parent / UNFINISHED / f'{shard.name}.json'


def noted(shard: pathlib.Path) -> dict | None:
  """The digests that a shard had when it was written; None if they cannot be read."""
  try:
    known = json.loads(read_regular(note_of(shard)))
  except (OSError, ValueError, RecursionError):
    return None
  return known if isinstance(known, dict) else None


def is_as_noted(shard: pathlib.Path) -> bool:
  """Whether a shard is there, as long as it was and with the same sample; else it is removed. The rest is compared in the end."""
  try:
    with open(shard, 'rb', opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
      known = noted(shard) or {}
      size = os.fstat(file.fileno()).st_size
      if (size, sample(file.fileno())) == (known.get('bytes'), known.get('sample')):
        return True
  except OSError:
    pass
  if shard.is_dir() and not shard.is_symlink():
    raise ConfigError(f'{shard}: is a folder, a file is to be written there; move it away')
  shard.unlink(missing_ok=True)
  return False
