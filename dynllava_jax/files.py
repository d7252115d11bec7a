"""Writing files: small ones replaced whole or not at all, large arrays in place and surely on the disk."""

import os
import pathlib
from typing import BinaryIO

import numpy as np


def write_atomically(path: pathlib.Path, content: bytes) -> None:
  """Writes to a temporary name in the same folder, then renames: an interruption leaves the old file or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  temporary.write_bytes(content)
  os.replace(temporary, path)


def write_array(file: BinaryIO, value: np.ndarray, offset: int = 0) -> None:
  """Writes all bytes of a contiguous array into an unbuffered file; returns when the disk has them.

  Raises:
    OSError: says why; numpy's `tofile` may lose the end of an array on a full disk without a word.
  """
  data = value.reshape(-1).view(np.uint8).data
  while data:
    written = os.pwrite(file.fileno(), data, offset)
    offset, data = offset + written, data[written:]
  os.fsync(file.fileno())
