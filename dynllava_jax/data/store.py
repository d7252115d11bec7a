"""Prepared data on disk: ArrayRecord shards that TFDS reads, without TensorFlow.

DIR/dataset_info.json, features.json    written last: without them the store is not finished
DIR/prepared.json                       settings, and a digest of every file, see `integrity`
DIR/llava-train.array_record-00003-of-00120
DIR/sources.json                        name, weight and number of samples of each source, in the order of the records
DIR/pictures.npz                        of pictures that are only named, how they were when they were prepared, see `pictures`
DIR/index-<key>.npz                     lengths for one tokenizer and template, see `index`
"""

import dataclasses
import functools
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any, SupportsIndex

import numpy as np

from dynllava_jax import paths, remote
from dynllava_jax.config import ConfigError
from dynllava_jax.data.cached_shards import CachedShards, without_shards
from dynllava_jax.data.images import decode
from dynllava_jax.data.integrity import INFO_FILE, PICTURES_FILE, REMEDY, check_shard, open_folder
from dynllava_jax.data.order import Part
from dynllava_jax.data.pictures import Pictures, of_folder
from dynllava_jax.data.records import Record, read_image
from dynllava_jax.data.samples import DataError, Sample
from dynllava_jax.display import printable


def features() -> Any:
  """TFDS features of a record. `image` holds the file's bytes, or b'' where only the path is stored or there is none."""
  import tensorflow_datasets as tfds  # here, because it takes a third of a second

  f = tfds.features
  return f.FeaturesDict(
    {
      'id': f.Text(),
      'source': f.Text(),
      'image_path': f.Text(),
      'image': f.Scalar(dtype=np.object_),
      'conversations': f.Sequence({'from': f.Text(), 'value': f.Text()}),
    }
  )


def to_example(record: Record, image: bytes) -> dict[str, Any]:
  """A record in the form of `features`."""
  return dataclasses.asdict(record) | {'conversations': list(record.conversations), 'image': image}


class Store:
  """Random-access source of `Sample`s from a prepared folder; picklable, safe to read from threads and many processes."""

  def __init__(self, path: str, images: str = '', rotate: bool = False, allow_outside: bool = False):
    """Args:

      path: the prepared folder.
      images: where the image files lie, if the store holds paths.
      rotate: see `images.decode`.
      allow_outside: image paths may lead out of `images`, see `records.read_image`.

    Raises:
      ConfigError: there is no finished store, or a file of it is damaged.
    """
    given = paths.given(path, 'config.data.path') if path else pathlib.Path()
    folder = remote.fetched(given, without_shards)
    if not path or not (folder / INFO_FILE).exists():
      hint = 'prepare it first, or start an interrupted preparation again: python -m dynllava_jax.data.prepare'
      raise ConfigError(f'config.data.path: {path or "(empty)"} is no finished data set, {INFO_FILE} is missing; {hint}')
    self.folder, self._rotate, self.allow_outside = folder, rotate, allow_outside
    self.images = paths.given(images, 'config.data.images') if images else None
    self._cached = None if paths.is_local(given) else CachedShards(given)
    self.opened = open_folder(folder, self._cached and self._cached.sizes())
    self._ends = np.cumsum(self.opened.lengths)
    self._lock, self._readers, self._features = threading.Lock(), {}, None

  def __len__(self) -> int:
    return int(self._ends[-1])

  @property
  def parts(self) -> tuple[Part, ...]:
    """One part per source, with its weight."""
    ends = np.cumsum([s['samples'] for s in self.opened.sources]).tolist()
    return tuple(Part(end - s['samples'], end, s['weight']) for s, end in zip(self.opened.sources, ends))

  def record(self, index: SupportsIndex) -> tuple[Record, bytes]:
    """(record, image bytes or b''), nothing decoded.

    Raises:
      DataError: the record is damaged.
    """
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    shard = int(np.searchsorted(self._ends, index, 'right'))
    place = index - int(self._ends[shard]) + self.opened.lengths[shard]
    try:
      reader = self._reader(shard)
      example = self._features.deserialize_example_np(reader.read([place])[0])
      turns = zip(example['conversations']['from'], example['conversations']['value'], strict=True)
      conversations = tuple({'from': who.decode(), 'value': text.decode()} for who, text in turns)
      names = [example[key].decode() for key in ('id', 'source', 'image_path')]
      return Record(*names, conversations), example['image']
    except DataError:
      raise
    except Exception as e:  # ArrayRecord, protobuf and TFDS each have their own
      why = printable(str(e).strip().partition('\n')[0][:200] or type(e).__name__)
      raise DataError(f'{self.folder / self.opened.shards[shard]}: record {place} cannot be read ({why}); {REMEDY}') from None

  def __getitem__(self, index: SupportsIndex) -> Sample:
    record, content = self.record(index)
    image = None
    if record.image_path:
      content = content or self.named_picture(int(index), record)
      image = decode(content, f'sample {record.id}: image {printable(record.image_path)}', self._rotate)
    return Sample(record.id, image, record.conversations)

  def named_picture(self, index: int, record: Record) -> bytes:
    """The bytes of a picture that record number `index` only names; DataError, ConfigError if it is not there, or another one."""
    self.require_root(record)
    content = read_image(record.id, record.image_path, self.images or pathlib.Path(), self.allow_outside)
    if self.pictures:
      self.pictures.require(index, record, content)
    return content

  def require_root(self, record: Record) -> None:
    """ConfigError if a record only names its picture, and nothing says where the path starts."""
    if self.images is None and not os.path.isabs(record.image_path):
      raise ConfigError(
        f'config.data.images: is empty, and {self.folder} holds paths of pictures only (sample {record.id}: '
        f'{printable(record.image_path)}); give the folder that they start from, as --images of the preparation'
      )

  @functools.cached_property
  def pictures(self) -> Pictures | None:
    """What is known of pictures that are not in the shards; None if they are, or nothing is. ConfigError if it is damaged."""
    known = self.opened.digests.get(PICTURES_FILE)
    return of_folder(self.folder, known['sha256']) if known else None

  def _reader(self, shard: int) -> Any:
    """ArrayRecord's reader of a shard, opened once. It may be used by several threads at a time."""
    with self._lock:
      if shard not in self._readers:
        from array_record.python.array_record_module import ArrayRecordReader

        self._features = self._features or features()
        name, expected = self.opened.shards[shard], self.opened.lengths[shard]
        if self._cached is None:
          reader = ArrayRecordReader(str(self.folder / name))
        else:
          reader = self._cached.open(name, self._fetched_reader)
        if reader.num_records() != expected:
          raise DataError(f'{self.folder / name}: holds {reader.num_records():,} records instead of {expected:,}; {REMEDY}')
        self._readers[shard] = reader
      return self._readers[shard]

  def with_file(self, name: str, read: Callable[[pathlib.Path], Any]) -> Any:
    """What `read` makes of a file of the folder, on this machine."""
    if self._cached is None or name not in self._cached.objects:
      return read(self.folder / name)
    return self._cached.open(name, read)

  def _fetched_reader(self, path: pathlib.Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    check_shard(path.parent, path.name, self.opened.digests.get(path.name))
    return ArrayRecordReader(str(path))

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k not in ('_lock', '_readers', '_features', 'pictures')}

  def __setstate__(self, state):
    self.__dict__ |= state | {'_lock': threading.Lock(), '_readers': {}, '_features': None}
