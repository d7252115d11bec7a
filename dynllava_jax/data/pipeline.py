"""From a source of samples to batches on the mesh, with grain. The stream is a function of (data, seed, step)."""

import dataclasses
from collections.abc import Iterator, Mapping

import grain
import jax
import numpy as np

from dynllava_jax.config import IGNORE, ConfigError, DataConfig, VisionConfig
from dynllava_jax.data import conversation
from dynllava_jax.data.batches import Batch, make_row, stack
from dynllava_jax.data.samples import DataError, Sample
from dynllava_jax.data.sources import TrainingData
from dynllava_jax.data.tokenizer import Tokenizer, load_tokenizer
from dynllava_jax.data.workers import die_with_parent

READ_THREADS = 2
PREFETCH = 8  # rows read ahead per thread
FOREVER = 2**60  # positions of the stream


@dataclasses.dataclass(frozen=True)
class LayOut:
  """Sample -> row; picklable, so that it can run in worker processes."""

  data: DataConfig
  vision: VisionConfig
  tokenizer_files: Mapping[str, bytes]
  num_image: int  # positions that an image takes
  text_room: int | None = None  # of these, how many text may fill where there is no image; all if None

  def __call__(self, sample: Sample, number: int, text_length: int) -> Batch:
    """One row of the given text bucket, see `batches.make_row`."""
    return make_row(
      sample,
      number,
      style=conversation.template(self.data.conversation),
      tokenizer=self.tokenizer,
      vision=self.vision,
      num_image=self.num_image,
      text_length=text_length,
      aspect=self.data.image_aspect,
      training=True,
      text_room=self.text_room,
      truncate=self.data.truncate,
    )

  @property
  def tokenizer(self) -> Tokenizer:
    """Loaded once per process."""
    if '_cached' not in self.__dict__:
      object.__setattr__(self, '_cached', load_tokenizer(self.tokenizer_files))
    return self.__dict__['_cached']

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != '_cached'}


@dataclasses.dataclass(frozen=True)
class _ReadRow(grain.transforms.Map):
  """Position in this host's part of the stream -> row. The host has rows `first` to `first + own` of every batch."""

  training: TrainingData
  layout: LayOut
  batch_size: int
  own: int
  first: int

  def map(self, element: int) -> Batch:
    batch, row = divmod(element, self.own)
    position = batch * self.batch_size + self.first + row
    sample, text_length = self.training.order(position)
    return self.layout(self.training.source[sample], position % 2**32, text_length)


def training_batches(
  training: TrainingData,
  layout: LayOut,
  *,
  batch_size: int,
  step: int,
  hosts: int = 1,
  host: int = 0,
) -> Iterator[Batch]:
  """Endless batches of this host's rows, from a global step on; close it to end its workers.

  Args:
    training: source and order.
    layout: how a sample becomes a row.
    batch_size: global; each host gets `batch_size / hosts` successive rows of it.
    step: with the data and the seed in `training.order`, it determines the batch.
    hosts, host: how many processes share a batch, and which of them this is (`sharding.batch_hosts`).

  Raises:
    ConfigError: hosts that do not divide the batch.
    DataError: a sample that cannot be used, or a batch without a supervised token, with the ids.
  """
  if batch_size % hosts:
    raise ConfigError(f'config.batch_size: {batch_size} is not a multiple of {hosts} hosts')
  own = batch_size // hosts
  rows = grain.MapDataset.range(FOREVER).map(_ReadRow(training, layout, batch_size, own, host * own))
  rows = rows[step * own :].batch(own, drop_remainder=True, batch_fn=stack)
  batches = rows.to_iter_dataset(grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH))
  if layout.data.workers:
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=layout.data.workers), worker_init_fn=die_with_parent)
  iterator = iter(batches)
  try:
    for batch in iterator:
      if not supervised_tokens(batch):
        ids = [training.source[i].id for i in training.order.batch(step)[host * own : (host + 1) * own]]
        raise DataError(f'step {step}: no supervised token in the batch of samples {", ".join(ids)}', 'no_supervised_token')
      yield batch
      step += 1
  finally:
    iterator.close()


def supervised_tokens(batch: Batch) -> int:
  """Labels that enter the loss: position t predicts label t + 1."""
  return int(np.count_nonzero(batch.labels[:, 1:] != IGNORE))


def to_mesh(batch: Batch, sharding: jax.sharding.Sharding) -> Batch:
  """This host's rows to one global array per field."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
