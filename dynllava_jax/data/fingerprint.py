"""Digests of what a training stream is made of, so that a run that goes on notices other data.

What is small is read whole. Of a large data set, hundreds of gigabytes, evenly spaced blocks are: every shard's size and
some of its content.
"""

import hashlib
import pathlib
from collections.abc import Iterable

import numpy as np

from dynllava_jax.data.records import read_image
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.sources import Source
from dynllava_jax.data.integrity import SOURCES_FILE
from dynllava_jax.data.store import Store

WHOLE = 2**28  # bytes of a store that are read in full; of a larger one about as many
BLOCK = 2**16
PICTURES = 64  # image files that are looked at where the store holds their paths only


def fingerprint(source: Source) -> dict[str, str]:
  """SHA-256 by what it is of ('samples', 'pictures'); empty for embedded sources, which follow from settings and code."""
  if not isinstance(source, Store):
    return {}
  shards = sorted(p for p in source.folder.iterdir() if '.array_record' in p.name and not p.name.startswith('.'))
  described = source.folder / SOURCES_FILE
  out = {'samples': _files([*shards, *([described] if described.exists() else [])])}
  if source.images != pathlib.Path():
    out['pictures'] = _pictures(source)
  return out


def _files(paths: Iterable[pathlib.Path]) -> str:
  """Names, sizes and content, or some of it, of files."""
  sizes = {path: path.stat().st_size for path in paths}
  share = min(1.0, WHOLE / max(sum(sizes.values()), 1))
  digest = hashlib.sha256()
  for path, size in sizes.items():
    digest.update(f'{path.name} {size} '.encode())
    blocks = max(-(-size // BLOCK), 1)
    read = np.unique(np.linspace(0, blocks - 1, max(int(blocks * share), min(blocks, 2))).astype(int))
    with path.open('rb') as file:
      for number in read:
        file.seek(int(number) * BLOCK)
        digest.update(file.read(BLOCK))
  return digest.hexdigest()


def _pictures(source: Store) -> str:
  digest = hashlib.sha256()
  for index in np.unique(np.linspace(0, len(source) - 1, PICTURES).astype(int)):
    record, content = source.record(index)
    if record.image_path and not content:
      digest.update(record.image_path.encode())
      try:
        digest.update(hashlib.sha256(read_image(record.id, record.image_path, source.images, source.allow_outside)).digest())
      except DataError:
        digest.update(b'missing')  # named when its sample is read
  return digest.hexdigest()
