"""From a source of samples to batches on the mesh, with grain. The stream is a function of (source, seed, step)."""

import dataclasses
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax

from dynllava_jax.config import DataConfig, VisionConfig
from dynllava_jax.data import conversation
from dynllava_jax.data.batches import Batch, make_row, stack
from dynllava_jax.data.tokenizer import Tokenizer, load_tokenizer

READ_THREADS = 2
PREFETCH = 8  # rows read ahead per thread


@dataclasses.dataclass(frozen=True)
class LayOut(grain.transforms.MapWithIndex):
  """Sample -> row; picklable, so that it can run in worker processes."""

  data: DataConfig
  vision: VisionConfig
  tokenizer_files: Mapping[str, bytes]

  def map_with_index(self, index: int, element: Any) -> Batch:
    return make_row(
      element,
      index % 2**32,
      style=conversation.template(self.data.conversation),
      tokenizer=self._tokenizer(),
      vision=self.vision,
      text_length=self.data.text_length,
      training=True,
    )

  def _tokenizer(self) -> Tokenizer:
    if '_cached' not in self.__dict__:
      object.__setattr__(self, '_cached', load_tokenizer(self.tokenizer_files))
    return self.__dict__['_cached']

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != '_cached'}


def training_batches(source: Any, layout: LayOut, *, batch_size: int, seed: int, step: int) -> Iterator[Batch]:
  """Endless batches of this host's rows, from a global step on.

  Every epoch is a new permutation (unless `data.shuffle` is off); the rows that do not fill a batch at its end differ
  from epoch to epoch.

  Args:
    source: random-access source of samples.
    layout: how a sample becomes a row.
    batch_size: global; each host gets `batch_size / hosts` rows.
    seed, step: with the source, these determine the batch.
  """
  hosts, host = jax.process_count(), jax.process_index()
  whole = len(source) // batch_size * batch_size
  samples = grain.MapDataset.source(source).seed(seed)
  if layout.data.shuffle:
    samples = samples.shuffle()
  rows = samples[:whole].repeat().map_with_index(layout)
  rows = rows[step * batch_size + host :: hosts].batch(batch_size // hosts, drop_remainder=True, batch_fn=stack)
  batches = rows.to_iter_dataset(grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH))
  if layout.data.workers:
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=layout.data.workers), worker_init_fn=_die_with_parent)
  return iter(batches)


def _die_with_parent(worker: int, workers: int) -> None:
  """Ends a worker process once its parent is gone, also after kill -9 (grain leaves it running)."""
  del worker, workers
  parent = os.getppid()

  def watch():
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def to_mesh(batch: Batch, sharding: jax.sharding.Sharding) -> Batch:
  """This host's rows to one global array per field."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
