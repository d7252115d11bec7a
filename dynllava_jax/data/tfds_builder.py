"""LLaVA's data as a TFDS builder, found by its name once this module is imported.

    import dynllava_jax.data.tfds_builder
    builder = tfds.builder('llava', data_dir='prepared', json='llava_v1_5_mix665k.json', images='data')
    builder.download_and_prepare()
    builder.as_data_source('train')

It writes what `prepare` writes, by TFDS's own means: one process, no resumption, no report. `prepare --out=DIR/llava/1.0.0`
is found under the same name with `data_dir=DIR`.
"""

import pathlib
from collections.abc import Iterator

import tensorflow_datasets as tfds

from dynllava_jax.data.integrity import SPLIT
from dynllava_jax.data.records import parse, read_image, read_json
from dynllava_jax.data.store import features, to_example


class Llava(tfds.core.ShardBasedBuilder):
  """Conversations about images in LLaVA's format."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, json: str = '', images: str = '', shard_samples: int = 5000, file_format: str = 'array_record', **kwargs):
    """`json` and `images` as for `prepare`; not needed to read what was prepared. TFDS's default format needs TensorFlow."""
    self._json, self._images, self._shard_samples = pathlib.Path(json), pathlib.Path(images), shard_samples
    super().__init__(file_format=file_format, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(builder=self, features=features(), description=self.__doc__)

  def _shard_iterators_per_split(self, dl_manager):
    del dl_manager  # nothing is downloaded
    entries = read_json(self._json)
    starts = range(0, len(entries), self._shard_samples)
    return {SPLIT: [lambda start=start: self._examples(entries, start) for start in starts]}

  def _examples(self, entries: list, start: int) -> Iterator:
    for number, entry in enumerate(entries[start : start + self._shard_samples], start):
      record = parse(entry, self._json.stem, number)
      image = read_image(record.id, record.image_path, self._images) if record.image_path else b''
      yield number, to_example(record, image)
