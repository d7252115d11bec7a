"""Which sample stands at which position of the stream: a pure function of (data, seed, position).

The stream is a sequence of epochs, an epoch a sequence of whole global batches. A batch takes the smallest text bucket that
holds its longest row. Every host computes the same order from the same lengths, so all agree on shapes without talking.
"""

import dataclasses

import numpy as np

from dynllava_jax.config import ConfigError

MAX_EPOCH = 2**31  # rows of an epoch: 16 GiB for their order alone
GROUPED_BATCHES = 50  # rows of so many batches are sorted by length together, as LLaVA's grouping sampler does


def check_epoch(rows: float) -> None:
  """Raises ConfigError, before anything is allocated, for an epoch of more rows than an order can be made of."""
  if not rows < MAX_EPOCH:
    raise ConfigError(f'an epoch would draw {rows:.3g} samples, at most {MAX_EPOCH:,} can be; give smaller weights (--weight)')


@dataclasses.dataclass(frozen=True)
class Part:
  """Samples start..stop-1 of a source, each drawn `weight` times per epoch on average."""

  start: int
  stop: int
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class BucketUse:
  """How often an epoch uses a bucket, and what share of the bucket's text positions is padding."""

  text_length: int
  batches: int
  padding: float


class Order:
  """Positions to samples.

  Attributes:
    whole: rows per epoch, a multiple of the batch size. Which ones are left over differs from epoch to epoch.
  """

  def __init__(
    self,
    parts: tuple[Part, ...],
    batch_size: int,
    seed: int,
    buckets: tuple[int, ...],
    *,
    shuffle: bool = True,
    usable: np.ndarray | None = None,
    need: np.ndarray | None = None,
    group: bool = False,
  ):
    """Args:

      parts: what an epoch is drawn from.
      batch_size: rows of a global batch.
      seed: of all permutations.
      buckets: ascending text lengths.
      shuffle: off reads the parts in their order.
      usable: bool[N], samples that are not left out; all if None.
      need: int32[N], text positions that each sample takes; None if there is one bucket.
      group: put rows of like lengths into one batch.

    Raises:
      ConfigError: not one whole batch, or more than one bucket without lengths.
    """
    if need is None and (len(buckets) > 1 or group):
      raise ConfigError('config.data: this source does not know its lengths, so it takes one bucket and no grouping')
    check_epoch(sum(float(p.stop - p.start) * p.weight for p in parts))
    self._parts = tuple(self._members(p, usable) for p in parts)
    self._weights = tuple(p.weight for p in parts)
    self._batch_size, self._seed, self._shuffle, self._group = batch_size, seed, shuffle, group
    self._buckets, self._need = np.asarray(buckets), need
    self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    drawn = sum(self._draws(m, w) for m, w in zip(self._parts, self._weights))
    self.whole = drawn // batch_size * batch_size
    if not self.whole:
      raise ConfigError(f'config.data: an epoch has {drawn} samples, fewer than one batch of {batch_size}')

  @staticmethod
  def _members(part: Part, usable: np.ndarray | None) -> np.ndarray:
    members = np.arange(part.start, part.stop)
    return members if usable is None else members[usable[part.start : part.stop]]

  @staticmethod
  def _draws(members: np.ndarray, weight: float) -> int:
    return round(len(members) * weight)

  def __call__(self, position: int) -> tuple[int, int]:
    """(sample, text bucket) at a position."""
    epoch, row = divmod(position, self.whole)
    samples, buckets = self._epoch(epoch)
    return int(samples[row]), int(buckets[row // self._batch_size])

  def batch(self, step: int) -> np.ndarray:
    """int[B] samples of the global batch of a step."""
    epoch, row = divmod(step * self._batch_size, self.whole)
    return self._epoch(epoch)[0][row : row + self._batch_size]

  def bucket_plan(self, epoch: int = 0) -> list[BucketUse]:
    """What an epoch does with each bucket; empty if the lengths are not known."""
    if self._need is None:
      return []
    samples, buckets = self._epoch(epoch)
    need = self._need[samples].reshape(-1, self._batch_size).sum(1)
    out = []
    for size in self._buckets:
      used = buckets == size
      rows = max(int(used.sum()) * self._batch_size, 1)
      out.append(BucketUse(int(size), int(used.sum()), 1 - float(need[used].sum()) / (rows * int(size)) if used.any() else 0.0))
    return out

  def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(int[whole] samples, int[batches] buckets)."""
    if epoch not in self._epochs:
      made = self._make(epoch)
      self._epochs = {e: v for e, v in self._epochs.items() if e >= epoch - 1} | {epoch: made}
      return made
    return self._epochs[epoch]

  def _make(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = []
    for number, (members, weight) in enumerate(zip(self._parts, self._weights)):
      copies, rest = divmod(self._draws(members, weight), max(len(members), 1))
      some = np.random.default_rng((self._seed, epoch, number, 1)).permutation(members)[:rest]
      drawn += [members] * copies + [np.sort(some)]
    samples = np.concatenate(drawn)
    rng = np.random.default_rng((self._seed, epoch))
    if self._shuffle:
      samples = rng.permutation(samples)
    samples = samples[: self.whole]
    if self._need is None:
      return samples, np.full(len(samples) // self._batch_size, self._buckets[-1])
    if self._group:
      samples = self._by_length(samples, rng)
    longest = self._need[samples].reshape(-1, self._batch_size).max(1)
    return samples, self._buckets[np.searchsorted(self._buckets, longest)]

  def _by_length(self, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    window = GROUPED_BATCHES * self._batch_size
    windows = [samples[i : i + window] for i in range(0, len(samples), window)]
    in_order = np.concatenate([w[np.argsort(self._need[w], kind='stable')] for w in windows])
    return rng.permutation(in_order.reshape(-1, self._batch_size)).reshape(-1)

  def __getstate__(self):
    return self.__dict__ | {'_epochs': {}}
