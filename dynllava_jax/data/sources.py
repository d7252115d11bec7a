"""Data sources by name, and what a training run takes from one.

`digits` teaches a model from nothing (captions first, then questions), `digits_instruct` is questions alone, `digits_talks`
conversations that need their history, `prepared` is any data in LLaVA's format after `python -m dynllava_jax.data.prepare`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Protocol, SupportsIndex

import numpy as np

from dynllava_jax.config import ConfigError, DataConfig
from dynllava_jax.data import conversation, digits, talks
from dynllava_jax.data.index import CODES, fit, load_index
from dynllava_jax.data.order import Order, Part
from dynllava_jax.data.pictures import check
from dynllava_jax.data.samples import REASONS, DataError, Sample
from dynllava_jax.data.store import Store
from dynllava_jax.data.tokenizer import MODEL_FILE, load_tokenizer, read_files

MIXES = {'digits': digits.FROM_NOTHING, 'digits_instruct': digits.INSTRUCT}
TALKS, PREPARED = 'digits_talks', 'prepared'
NAMED = 3  # ids that a message shows per reason


class Source(Protocol):
  """Random access to samples. `parts` are the ranges that are drawn from with a weight of their own."""

  parts: tuple[Part, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: SupportsIndex) -> Sample: ...


@dataclasses.dataclass(frozen=True)
class TrainingData:
  """What batches are made of.

  Attributes:
    source: random access to samples.
    order: which of them stands where in the stream.
    skipped: reason -> ids of the samples that are left out by `on_bad_sample='skip'`.
  """

  source: Source
  order: Order
  skipped: Mapping[str, list[str]]


def _check(data: DataConfig) -> None:
  known = (*MIXES, TALKS, PREPARED)
  if data.source not in known:
    raise ConfigError(f'config.data.source: {data.source!r} is unknown; expected one of {", ".join(known)}')


def training_source(data: DataConfig, seed: int) -> Source:
  """Random-access source of training conversations; ConfigError for an unknown name or a missing folder."""
  _check(data)
  if data.source == PREPARED:
    return Store(data.path, data.images, data.rotate_images, data.allow_outside)
  if data.source == TALKS:
    return talks.Talks('train', seed)
  return digits.TrainingScenes('train', seed, MIXES[data.source])


def training_data(data: DataConfig, num_image: int, tokenizer: Mapping[str, bytes], *, batch_size: int, seed: int) -> TrainingData:
  """Source and order of a run.

  Args:
    data: the run's settings.
    num_image: positions that an image takes.
    tokenizer: its files; lengths are measured with it.
    batch_size, seed: of the run.

  Raises:
    ConfigError: settings that do not fit together or the source.
    DataError: samples that cannot be used, under `on_bad_sample='error'`.
  """
  source = training_source(data, seed)
  conversation.check_template(conversation.template(data.conversation), load_tokenizer(tokenizer))
  usable, need, skipped = None, None, {}
  if isinstance(source, Store):
    index = load_index(source, tokenizer, data.conversation)
    need, reason = fit(index, data, num_image)
    usable = reason == 0
    _check_pictures(source, index.has_image)
    if data.images_only:
      usable &= index.has_image
    skipped = _bad_samples(source, reason, data)
  order = Order(
    source.parts,
    batch_size,
    seed,
    data.text_buckets,
    shuffle=data.shuffle,
    usable=usable,
    need=need,
    group=data.group_lengths,
  )
  return TrainingData(source, order, skipped)


def _check_pictures(source: Store, has_image: np.ndarray) -> None:
  """Raises ConfigError if pictures that the store only names are not to be found, or not those that were prepared."""
  if has_image.any():
    record, content = source.record(np.argmax(has_image))
    if not content:
      source.require_root(record)
  if source.pictures:
    check(source.pictures, source.images or pathlib.Path(), 'config.data.images')


def _bad_samples(source: Store, reason: np.ndarray, data: DataConfig) -> dict[str, list[str]]:
  """Ids of unusable samples by reason; DataError if there are any and the policy is 'error'."""
  if data.on_bad_sample == 'error' and reason.any():
    parts = []
    for code in np.unique(reason[reason > 0]):
      found = np.flatnonzero(reason == code)
      ids = ', '.join(source.record(i)[0].id for i in found[:NAMED])
      parts.append(f'{len(found)} {CODES[code]} ({REASONS[CODES[code]]}): {ids}{", ..." if len(found) > NAMED else ""}')
    raise DataError(
      f'{source.folder}: {int((reason > 0).sum())} of {len(source)} samples cannot be used:\n  '
      + '\n  '.join(parts)
      + '\nMend them, or set config.data.on_bad_sample=skip (or config.data.truncate for those that are too long)'
    )
  bad = {CODES[code]: np.flatnonzero(reason == code) for code in np.unique(reason[reason > 0])}
  return {name: [source.record(i)[0].id for i in found] for name, found in bad.items()}


def new_tokenizer(data: DataConfig, vocab_size: int) -> dict[str, bytes]:
  """The tokenizer's files for a model whose checkpoint brings none.

  Raises:
    ConfigError: unknown source, no tokenizer named, or it has more tokens than the model.
  """
  _check(data)
  if data.tokenizer:
    files = read_files(data.tokenizer)
  elif data.source == PREPARED:
    raise ConfigError('config.data.tokenizer: is empty and init_from brings no tokenizer; give the folder of a Hugging Face model')
  else:
    files = {MODEL_FILE: digits.tokenizer_model()}
  require_vocabulary(files, vocab_size)
  return files


def require_vocabulary(files: Mapping[str, bytes], vocab_size: int) -> None:
  """Raises ConfigError if a tokenizer has more tokens than the model."""
  size = len(load_tokenizer(files))
  if size > vocab_size:
    raise ConfigError(
      f'config.model.llama.vocab_size: {vocab_size}, but the tokenizer has {size} tokens; give the one that belongs to the weights'
    )
