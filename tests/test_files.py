"""Large arrays past the page cache, wherever they lie in a file."""

import errno
import os

import numpy as np
import pytest

from dynllava_jax import files
from dynllava_jax.files import BLOCK, SECTOR, is_array, read_array, write_array

SIZES = (1, SECTOR - 1, SECTOR, 3 * SECTOR + 5, BLOCK + SECTOR, 2 * BLOCK + 1)


@pytest.fixture(params=['past the cache', 'a file system that has only its cache'])
def disk(request, tmp_path, monkeypatch):
  """A folder, and whether its file system takes direct reads and writes."""
  real, opened = os.open, []

  def without_direct(path, flags, mode=0o777):
    opened.append(flags & files.DIRECT)
    if flags & files.DIRECT and request.param != 'past the cache':
      raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return real(path, flags, mode)

  monkeypatch.setattr(os, 'open', without_direct)
  yield tmp_path
  assert any(opened) == bool(files.DIRECT)


def numbers(size):
  return np.random.default_rng(size).integers(0, 256, size, np.uint8)


@pytest.mark.parametrize('size', SIZES)
def test_array_of_any_size(disk, size):
  value = numbers(size)
  write_array(disk / 'a', value)
  assert (disk / 'a').read_bytes() == value.tobytes() and is_array(disk / 'a', value)
  changed = value.copy()
  changed[-1] ^= 1
  assert not is_array(disk / 'a', changed)
  assert not is_array(disk / 'a', value[:-1]) and not is_array(disk / 'a', np.append(value, value[:1]))


@pytest.mark.parametrize('offset', [1, SECTOR - 1, SECTOR, BLOCK + 7])
def test_array_between_others(disk, offset):
  """What lies before and after it, in the same sectors too, stays as it is."""
  for size in SIZES:
    whole, value = numbers(offset + size + SECTOR + 3), numbers(size)
    whole.tofile(disk / 'a')
    write_array(disk / 'a', value, offset)
    whole[offset : offset + size] = value
    assert (disk / 'a').read_bytes() == whole.tobytes(), size
    assert np.array_equal(read_array(disk / 'a', offset, size), value), size


def test_array_of_other_numbers(disk):
  value = np.arange(7000, dtype=np.float32).reshape(70, 100)
  write_array(disk / 'a', value)
  assert is_array(disk / 'a', value)
  assert np.array_equal(read_array(disk / 'a', 400, 6900 * 4).view(np.float32).reshape(69, 100), value[1:])


def test_nothing(disk):
  write_array(disk / 'a', np.empty(0, np.uint8))
  assert (disk / 'a').read_bytes() == b'' and is_array(disk / 'a', np.empty(0)) and read_array(disk / 'a', 0, 0).size == 0


def test_file_that_ends_too_early(disk):
  write_array(disk / 'a', numbers(SECTOR + 10))
  with pytest.raises(OSError, match='the file ends 5 bytes too early; has it changed'):
    read_array(disk / 'a', 20, SECTOR - 5)
  with pytest.raises(OSError, match=r'the file ends [\d,]+ bytes too early'):
    read_array(disk / 'a', 3 * SECTOR, 1)
