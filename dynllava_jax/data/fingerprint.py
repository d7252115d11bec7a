"""Digests of what a training stream is made of, so that a run that goes on notices other data.

They are those of `prepared.json` and of the table of pictures beside it. Of folders without them, such as TFDS's own, what is small
is read whole; of what is large, evenly spaced blocks and every shard's size.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable

import numpy as np

from dynllava_jax.data.integrity import FILES, SOURCES_FILE, read_settings
from dynllava_jax.data.records import read_image
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.sources import Source
from dynllava_jax.data.store import Store

WHOLE = 2**28  # bytes of a store that are read in full; of a larger one about as many
BLOCK = 2**16
PICTURES = 64  # image files that are looked at where the store holds their paths only, and no table of them


def fingerprint(source: Source) -> dict[str, str]:
  """SHA-256 by what it is of ('samples', 'pictures'); empty for embedded sources, which follow from settings and code."""
  if not isinstance(source, Store):
    return {}
  known = read_settings(source.folder).get(FILES)
  if known:  # whatever else `prepared.json` says, such as where the pictures lay, changes no sample
    content = {name: known[name]['sha256'] for name in (*source.opened.shards, SOURCES_FILE) if name in known}
    out = {'samples': hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}
  else:
    out = {'samples': _files(source.folder / name for name in source.opened.shards)}
  if source.pictures:
    out['pictures'] = source.pictures.fingerprint()
  elif source.images is not None:
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
