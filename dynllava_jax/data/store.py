"""Prepared data on disk: ArrayRecord shards that TFDS reads, without TensorFlow.

DIR/dataset_info.json, features.json    written last: without them the store is not finished
DIR/llava-train.array_record-00003-of-00120
DIR/sources.json                        name, weight and number of samples of each source, in the order of the records
DIR/index-<key>.npz                     lengths for one tokenizer and template, see `index`
"""

import dataclasses
import json
import pathlib
import threading
from typing import Any, SupportsIndex

import numpy as np

from dynllava_jax.config import ConfigError
from dynllava_jax.data.images import decode
from dynllava_jax.data.order import Part
from dynllava_jax.data.records import Record, read_image
from dynllava_jax.data.samples import Sample

NAME, SPLIT = 'llava', 'train'
SOURCES_FILE, INFO_FILE = 'sources.json', 'dataset_info.json'


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

  def __init__(self, path: str, images: str = '', rotate: bool = False):
    """Args:

      path: the prepared folder.
      images: where the image files lie, if the store holds paths.
      rotate: see `images.decode`.

    Raises:
      ConfigError: there is no finished store.
    """
    folder = pathlib.Path(path)
    if not (folder / INFO_FILE).exists():
      hint = 'prepare it first, or start an interrupted preparation again: python -m dynllava_jax.data.prepare'
      raise ConfigError(f'config.data.path: {path or "(empty)"} is no finished data set, {INFO_FILE} is missing; {hint}')
    self.folder, self.images, self._rotate = folder, pathlib.Path(images), rotate
    self._lock, self._opened = threading.Lock(), None
    if (folder / SOURCES_FILE).exists():
      self.sources = json.loads((folder / SOURCES_FILE).read_text())
    else:  # written by TFDS itself, see `tfds_builder`
      self.sources = [{'name': NAME, 'weight': 1.0, 'samples': len(self._reader())}]

  def __len__(self) -> int:
    return sum(s['samples'] for s in self.sources)

  @property
  def parts(self) -> tuple[Part, ...]:
    """One part per source, with its weight."""
    ends = np.cumsum([s['samples'] for s in self.sources]).tolist()
    return tuple(Part(end - s['samples'], end, s['weight']) for s, end in zip(self.sources, ends))

  def record(self, index: SupportsIndex) -> tuple[Record, bytes]:
    """(record, image bytes or b''), nothing decoded."""
    example = self._reader()[int(index)]
    turns = zip(example['conversations']['from'], example['conversations']['value'])
    conversations = tuple({'from': who.decode(), 'value': text.decode()} for who, text in turns)
    names = (example[key].decode() for key in ('id', 'source', 'image_path'))
    return Record(*names, conversations), example['image']

  def __getitem__(self, index: SupportsIndex) -> Sample:
    record, content = self.record(index)
    image = None
    if record.image_path:
      content = content or read_image(record.id, record.image_path, self.images)
      image = decode(content, f'sample {record.id}: image {record.image_path}', self._rotate)
    return Sample(record.id, image, record.conversations)

  def _reader(self) -> Any:
    with self._lock:
      if self._opened is None:
        import tensorflow_datasets as tfds

        self._opened = tfds.builder_from_directory(self.folder).as_data_source(SPLIT)
    return self._opened

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k not in ('_lock', '_opened')}

  def __setstate__(self, state):
    self.__dict__ |= state | {'_lock': threading.Lock(), '_opened': None}
