"""Large arrays past the page cache, wherever they lie in a file."""

import errno
import fcntl
import os
import resource
import signal

import numpy as np
import pytest

from dynllava_jax import files
from dynllava_jax.files import BLOCK, SECTOR, is_array, read_array, write_array

SIZES = (1, SECTOR - 1, SECTOR, 3 * SECTOR + 5, BLOCK + SECTOR, 2 * BLOCK + 1)


@pytest.fixture(params=['past the cache', 'a file system that has only its cache', 'larger sectors', 'odd pieces'])
def disk(request, tmp_path, monkeypatch):
  """A folder on a disk of that kind."""
  calls = {name: getattr(os, name) for name in ('open', 'pwrite', 'preadv')}

  def opened(path, flags, mode=0o777):
    if flags & files.DIRECT and request.param == 'a file system that has only its cache':
      raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return calls['open'](path, flags, mode)

  def moved(name):
    def move(handle, data, offset):
      if request.param == 'larger sectors' and fcntl.fcntl(handle, fcntl.F_GETFL) & files.DIRECT:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
      if request.param == 'odd pieces':  # an interrupted call, a full disk, a limit
        data = data[:70_001] if name == 'pwrite' else [data[0][:70_001]]
      return calls[name](handle, data, offset)

    return move

  monkeypatch.setattr(os, 'open', opened)
  for name in ('pwrite', 'preadv'):
    monkeypatch.setattr(os, name, moved(name))
  return tmp_path


def numbers(size):
  return np.random.default_rng(size).integers(0, 256, size, np.uint8)


def written(path, value):
  path.touch()
  write_array(path, value)


@pytest.mark.parametrize('size', SIZES)
def test_array_of_any_size(disk, size):
  value = numbers(size)
  written(disk / 'a', value)
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
  written(disk / 'a', value)
  assert is_array(disk / 'a', value)
  assert np.array_equal(read_array(disk / 'a', 400, 6900 * 4).view(np.float32).reshape(69, 100), value[1:])


def test_nothing(disk):
  written(disk / 'a', np.empty(0, np.uint8))
  assert (disk / 'a').read_bytes() == b'' and is_array(disk / 'a', np.empty(0)) and read_array(disk / 'a', 0, 0).size == 0


def test_file_that_ends_too_early(disk):
  written(disk / 'a', numbers(SECTOR + 10))
  with pytest.raises(OSError, match='the file ends 5 bytes too early; has it changed'):
    read_array(disk / 'a', 20, SECTOR - 5)
  with pytest.raises(OSError, match='the file ends 8,183 bytes too early'):
    read_array(disk / 'a', 3 * SECTOR, 1)


def test_file_that_may_not_grow(tmp_path):
  """The error is the system's, not that of the attempt to go on in the middle of a sector."""
  (tmp_path / 'a').touch()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK + 1000, limits[1]))
  try:
    with pytest.raises(OSError, match='File too large'):
      write_array(tmp_path / 'a', numbers(2 * BLOCK))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, ignored)


def test_file_that_is_gone_is_not_made_again(tmp_path):
  with pytest.raises(FileNotFoundError):
    write_array(tmp_path / 'a', numbers(10))
  assert not (tmp_path / 'a').exists()
