"""Lengths of a store's samples for one tokenizer and template, made once and kept beside the store.

They decide which samples a run can use and which bucket a batch takes, so they must be known before the first step.
"""

import dataclasses
import hashlib
import io
import os
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from dynllava_jax import remote
from dynllava_jax.config import DataConfig
from dynllava_jax.data import conversation
from dynllava_jax.data.records import Finding, examine
from dynllava_jax.data.samples import REASONS
from dynllava_jax.data.store import Store
from dynllava_jax.data.tokenizer import load_tokenizer
from dynllava_jax.data.workers import parallel_map
from dynllava_jax.display import Terminal
from dynllava_jax.files import check_regular, write_atomically
from dynllava_jax.progress import progress

CODES = ('', *REASONS)
CHUNK = 1000  # records examined at a time
AT_MOST = 16  # bytes that a sample takes in the file, with room to spare
RULES = '2:'  # changes whenever `examine` finds more than before, so that older indexes are made again
SMALL = 4 * CHUNK  # stores up to this size are not worth starting processes for


@dataclasses.dataclass(frozen=True)
class Index:
  """Per sample: int32[N] ids (the image one), int32[N] ids that a cut must leave, bool[N] image, uint8[N] code of the reason."""

  tokens: np.ndarray
  reach: np.ndarray
  has_image: np.ndarray
  reason: np.ndarray

  @classmethod
  def of(cls, findings: Iterable[Finding]) -> 'Index':
    rows = [(f.tokens, f.reach, f.has_image, CODES.index(f.reason)) for f in findings]
    tokens, reach, has_image, reason = zip(*rows) if rows else ((), (), (), ())
    return cls(np.int32(tokens), np.int32(reach), np.bool_(has_image), np.uint8(reason))


def index_key(files: Mapping[str, bytes], template: str) -> str:
  """Changes whenever the tokenizer's files or the template do."""
  digest = hashlib.sha256(repr(conversation.template(template)).encode())
  for name, content in sorted(files.items()):
    digest.update(f'{name} {len(content)} '.encode() + content)
  return digest.hexdigest()[:16]


def index_path(folder: pathlib.Path, files: Mapping[str, bytes], template: str) -> pathlib.Path:
  """Where the index of a store lies."""
  return folder / f'index-{index_key(files, template)}.npz'


def write_index(path: pathlib.Path, index: Index, identity: str) -> None:
  """Writes it whole or not at all. `identity`: of the store, see `integrity.Opened`."""
  content = io.BytesIO()
  np.savez_compressed(content, identity=np.array(RULES + identity), **dataclasses.asdict(index))
  write_atomically(path, content.getvalue())


def read_index(path: pathlib.Path, size: int, identity: str) -> Index | None:
  """An index of `size` samples; None if the file is damaged or belongs to other data, so that it is made again."""
  expected = {'tokens': np.int32, 'reach': np.int32, 'has_image': np.bool_, 'reason': np.uint8}
  try:
    check_regular(path, AT_MOST * (size + 1000))
    with np.load(path) as stored:
      if sum(member.file_size for member in stored.zip.infolist()) > AT_MOST * (size + 1000):  # before anything is allocated
        return None
      arrays = dict(stored)
  except Exception:  # zipfile, zlib and numpy each have their own
    return None
  if str(arrays.pop('identity', '')) != RULES + identity or arrays.keys() != expected.keys():
    return None
  if any(arrays[k].shape != (size,) or arrays[k].dtype != kind for k, kind in expected.items()):
    return None
  return Index(**arrays) if (arrays['reason'] < len(CODES)).all() else None


def load_index(store: Store, files: Mapping[str, bytes], template: str) -> Index:
  """Reads the index of a store, or makes it and leaves it there (if the folder can be written to)."""
  path = index_path(store.folder, files, template)
  if path.exists():
    index = read_index(path, len(store), store.opened.identity)
    if index is not None:
      return index
    Terminal(stderr=True).print(f'{path}: is damaged, of other data or of an earlier version; the samples are measured again')
  index = _make_index(store, dict(files), template)
  if os.access(store.folder, os.W_OK):
    try:
      write_index(path, index, store.opened.identity)
      remote.keep(path)
    except OSError as e:  # the run can do without it
      Terminal(stderr=True).print(f'{path}: cannot be written ({e.strerror}); the samples will be measured again')
  return index


def _make_index(store: Store, files: dict[str, bytes], template: str) -> Index:
  starts = range(0, len(store), CHUNK)
  jobs = [(store, files, template, start, min(start + CHUNK, len(store))) for start in starts]
  if len(store) <= SMALL:
    return _join(map(_examine_range, jobs))
  with (
    parallel_map(_examine_range, jobs, os.cpu_count() or 1) as parts,
    progress(Terminal(), 'measuring samples', len(store)) as advance,
  ):
    done = []
    for part in parts:
      done.append(part)
      advance(len(part.tokens))
  return _join(done)


def _examine_range(job: tuple[Store, dict[str, bytes], str, int, int]) -> Index:
  store, files, template, start, stop = job
  tokenizer, style = load_tokenizer(files), conversation.template(template)
  records = (store.record(i)[0] for i in range(start, stop))
  return Index.of(examine(r, style=style, tokenizer=tokenizer, images=None) for r in records)


def _join(parts: Iterable[Index]) -> Index:
  parts = list(parts)
  return Index(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Index)))


def fit(index: Index, data: DataConfig, num_image: int) -> tuple[np.ndarray, np.ndarray]:
  """What the run's buckets make of an index.

  Returns:
    (int32[N] text positions that each sample takes, uint8[N] code of the reason why it cannot be used, 0 if it can).
  """
  room = np.where(index.has_image, data.text_length + 1, data.text_length + num_image)
  too_long = (index.reach if data.truncate else index.tokens) > room
  reason = np.where((index.reason == 0) & too_long, CODES.index('too_long'), index.reason)
  taken = np.minimum(index.tokens, room) - np.where(index.has_image, 1, num_image)
  return np.maximum(taken, 1).astype(np.int32), reason.astype(np.uint8)
