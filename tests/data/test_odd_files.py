"""Paths that lead out of their folder, and what is no file of sensible size: pipes, devices, files without end."""

import os
import time

import llava_files
import pytest
from preparing import run, scan

from dynllava_jax.config import DataConfig
from dynllava_jax.data import records
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.store import Store

GOOD = llava_files.sample(1)


@pytest.fixture
def odd_paths(tmp_path):
  """A folder of images, and what lies outside."""
  inside = tmp_path / 'images'
  llava_files.write_pictures(inside)
  picture = (inside / 'pictures' / '1.jpg').read_bytes()
  (tmp_path / 'secret.jpg').write_bytes(picture)
  (inside / 'link.jpg').symlink_to(tmp_path / 'secret.jpg')
  (inside / 'inner.jpg').symlink_to('pictures/1.jpg')
  (tmp_path / 'images_too').mkdir()
  (tmp_path / 'images_too' / '1.jpg').write_bytes(picture)
  (inside / 'elsewhere').symlink_to(tmp_path / 'images_too')
  os.mkfifo(inside / 'pipe.jpg')
  (inside / 'device.jpg').symlink_to('/dev/zero')
  with open(inside / 'huge.jpg', 'wb') as file:
    file.truncate(2**40)
  return inside


@pytest.mark.parametrize(
  'path', ['../secret.jpg', 'link.jpg', 'elsewhere/1.jpg', '../images_too/1.jpg', 'pictures/../../secret.jpg', 'ABSOLUTE']
)
def test_paths_that_lead_out_are_refused_unless_allowed(odd_paths, tmp_path, path):
  path = str(tmp_path / 'secret.jpg') if path == 'ABSOLUTE' else path
  with pytest.raises(DataError, match='sample s: image .*lies outside of .*--allow_outside') as caught:
    records.read_image('s', path, odd_paths)
  assert caught.value.reason == 'outside_image'
  assert records.read_image('s', path, odd_paths, allow_outside=True)


@pytest.mark.parametrize('path', ['pictures/1.jpg', './pictures/../pictures/1.jpg', 'inner.jpg', 'pictures//1.jpg'])
def test_paths_that_stay_inside_are_read(odd_paths, path):
  assert records.read_image('s', path, odd_paths)


@pytest.mark.parametrize('path', ['pipe.jpg', 'device.jpg', 'huge.jpg', 'pictures', 'no\x1b[31m\u202e.jpg', 'a\0b', 'x' * 5000])
def test_what_never_ends_is_one_line_at_once(odd_paths, path):
  start = time.monotonic()
  with pytest.raises(DataError) as caught:
    records.read_image('s', path, odd_paths, allow_outside=True)
  assert time.monotonic() - start < 5 and caught.value.reason == 'missing_image'
  assert str(caught.value).isprintable()


def test_stores_with_paths_follow_the_same_rule(odd_paths, tmp_path):
  path = llava_files.write_json(tmp_path / 'mix.json', [GOOD, GOOD | {'id': 'out', 'image': 'link.jpg'}])
  what = scan(odd_paths, {'mix': path})
  assert run(what, tmp_path / 'out') is False
  outside = DataConfig(conversation='vicuna_v1', text_length=120, allow_outside=True)
  assert run(scan(odd_paths, {'mix': path}, data=outside), tmp_path / 'all', image_bytes=False)
  with pytest.raises(DataError, match='sample out: image link.jpg'):
    Store(str(tmp_path / 'all'), str(odd_paths))[1]
  assert Store(str(tmp_path / 'all'), str(odd_paths), allow_outside=True)[1].image.size == (40, 31)


@pytest.mark.parametrize(
  'name', ['pipe.json', 'device.json', 'folder.json', 'huge.json', 'none.json', 'deep.json', 'deep.jsonl', 'binary.json']
)
def test_files_that_are_no_data_are_one_line_within_seconds(tmp_path, name):
  path = tmp_path / name
  if name == 'pipe.json':
    os.mkfifo(path)
  elif name == 'device.json':
    path.symlink_to('/dev/zero')
  elif name == 'folder.json':
    path.mkdir()
  elif name == 'huge.json':
    with open(path, 'wb') as file:
      file.truncate(2**40)
  elif name.startswith('deep'):
    path.write_text('[' * 10**6)
  elif name == 'binary.json':
    path.write_bytes(bytes(range(256)) * 10)
  start = time.monotonic()
  with pytest.raises(DataError, match=name) as caught:
    records.read_json(path)
  assert time.monotonic() - start < 5 and len(str(caught.value).splitlines()) == 1
  if name in ('pipe.json', 'device.json', 'folder.json', 'none.json'):
    with pytest.raises(DataError, match=name):
      run(scan(tmp_path, {'mix': path}), tmp_path / 'out')
