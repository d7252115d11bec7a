"""A batch of training on disk, with the ids of its samples and the tokenizer: what a run leaves of a step that went wrong.

`python -m dynllava_jax.data.inspect --batch=FILE` shows its rows.
"""

import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynllava_jax.config import ConfigError
from dynllava_jax.data.batches import Batch
from dynllava_jax.files import check_regular, write_atomically

FIELDS = tuple(f.name for f in dataclasses.fields(Batch))
ABOUT, TOKENIZER = 'about', 'tokenizer/'


def save_batch(
  path: pathlib.Path, batch: Batch, ids: Sequence[str], tokenizer: Mapping[str, bytes], num_image: int, **about: Any
) -> None:
  """Writes a .npz file.

  Args:
    path: where to.
    batch: on the host.
    ids: of its samples.
    tokenizer: its files.
    num_image: positions that an image takes.
    about: further facts, JSON-ready.
  """
  files = {f'{TOKENIZER}{name}': np.frombuffer(content, np.uint8) for name, content in tokenizer.items()}
  text = json.dumps({'ids': list(ids), 'num_image': num_image} | about)
  content = io.BytesIO()
  np.savez_compressed(content, **{ABOUT: np.array(text)}, **{name: np.asarray(getattr(batch, name)) for name in FIELDS}, **files)
  write_atomically(path, content.getvalue())


def load_batch(path: pathlib.Path) -> tuple[Batch, dict[str, Any], dict[str, bytes]]:
  """(batch, {'ids', 'num_image', ...}, the tokenizer's files); ConfigError if the file is no such batch."""
  try:
    check_regular(path)
    with np.load(path, allow_pickle=False) as found:
      about = json.loads(str(found[ABOUT]))
      batch = Batch(**{name: found[name] for name in FIELDS})
      files = {n.removeprefix(TOKENIZER): found[n].tobytes() for n in found.files if n.startswith(TOKENIZER)}
    if len(about['ids']) != len(batch.tokens) or not isinstance(about['num_image'], int):
      raise ValueError('its parts do not fit together')
  except Exception as e:  # numpy, zipfile, zlib and tokenize each have their own
    raise ConfigError(
      f'--batch={path}: cannot be read as a batch that training left ({e}); name a file of WORKDIR/bad_steps'
    ) from None
  return batch, about, files
