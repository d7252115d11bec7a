"""Pictures that a prepared folder only names: known by size and digest, compared at the start and when they are read."""

import dataclasses
import os
import pickle
import shutil

import llava_files
import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image
from preparing import run, scan

from dynllava_jax.config import ConfigError, DataConfig
from dynllava_jax.data import pictures, preparation
from dynllava_jax.data.fingerprint import fingerprint
from dynllava_jax.data.integrity import PICTURES_FILE, SETTINGS_FILE, open_folder, read_settings
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.sources import training_data
from dynllava_jax.data.store import Store
from dynllava_jax.data.tokenizer import read_files
from dynllava_jax.data.verify import verify

FILES = read_files(GOLDEN / 'text' / 'tok_nonlegacy')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  root = tmp_path_factory.mktemp('named')
  llava_files.write_pictures(root)
  samples = [llava_files.sample(i, image=i % 4 != 0) for i in range(14)]
  what = scan(root, {'mix': llava_files.write_json(root / 'mix.json', samples)})
  assert run(what, root / 'out', image_bytes=False, shard_samples=5)
  return root


@pytest.fixture
def copy(made, tmp_path):
  return shutil.copytree(made, tmp_path / 'copy', copy_function=shutil.copy2)


def data(root, **changes):
  settings = dict(source='prepared', path=str(root / 'out'), images=str(root), conversation='vicuna_v1', text_length=120)
  return DataConfig(**settings | changes)


def start(root, **changes):
  return training_data(data(root, **changes), 4, FILES, batch_size=2, seed=0).source


def same_size(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  return bytes(content)


def replaced(path, content, keep_time):
  before = path.stat()
  path.write_bytes(content)
  if keep_time:
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_table_has_a_row_per_sample_and_is_sealed(copy):
  store = start(copy)
  assert PICTURES_FILE in read_settings(store.folder)['files']
  table = store.pictures
  assert len(table.paths) == len(store) == 14 and table.paths[:3] == ['', 'pictures/1.jpg', 'pictures/2.jpg']
  assert table.sizes[1] == (copy / 'pictures/1.jpg').stat().st_size and not table.digests[0].any()
  (store.folder / PICTURES_FILE).write_bytes((store.folder / PICTURES_FILE).read_bytes()[:-1])
  with pytest.raises(ConfigError, match=r'pictures.npz: is missing or damaged \(.* bytes'):
    open_folder(store.folder)
  (store.folder / PICTURES_FILE).unlink()
  with pytest.raises(ConfigError, match='pictures.npz: is missing'):
    start(copy)


@pytest.mark.parametrize('keep_time', [False, True])
def test_another_picture_of_the_same_size_is_never_trained_on(copy, keep_time):
  path = copy / 'pictures' / '3.jpg'
  replaced(path, same_size(path), keep_time)
  if not keep_time:
    with pytest.raises(ConfigError, match=r'images: 1 of 7 pictures .* were prepared: pictures/3.jpg \(other content\)'):
      start(copy)
    return
  store = pickle.loads(pickle.dumps(start(copy)))  # as worker processes have it
  store[2]
  with pytest.raises(ConfigError, match='sample s3: image pictures/3.jpg is not the one that was prepared'):
    store[3]


def test_other_sizes_and_missing_pictures_are_refused_and_named(copy):
  (copy / 'pictures' / '1.jpg').unlink()
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(copy / 'pictures' / '2.jpg')
  with pytest.raises(ConfigError, match=r'2 of 7 .*1.jpg \(missing\), pictures/2.jpg \(\d+ bytes, .* prepared\); put back'):
    start(copy)


def test_copied_pictures_with_other_times_are_the_same(copy, monkeypatch):
  for path in (copy / 'pictures').iterdir():
    os.utime(path, ns=(0, 0))
  read = []
  monkeypatch.setattr(pictures, '_sha256', lambda path, known=pictures._sha256: read.append(path) or known(path))
  start(copy)
  assert len(read) == 7
  monkeypatch.setattr(pictures, 'READ', 2000)  # of many only some are read at the start
  start(copy)
  assert 7 < len(read) < 14


def test_the_fingerprint_is_of_all_pictures_and_of_nothing_else(copy, made):
  before = fingerprint(start(made))
  os.utime(copy / 'pictures' / '5.jpg', ns=(0, 0))
  replaced(copy / 'pictures' / '6.jpg', same_size(copy / 'pictures' / '6.jpg'), True)
  what = scan(copy, {'mix': copy / 'mix.json'})
  assert run(what, copy / 'again', image_bytes=False, shard_samples=4)
  changed = fingerprint(Store(str(copy / 'again'), str(copy)))
  assert changed['pictures'] != before['pictures']
  shutil.copy(made / 'pictures' / '6.jpg', copy / 'pictures' / '6.jpg')
  assert run(what, copy / 'third', image_bytes=False, shard_samples=14)
  assert fingerprint(Store(str(copy / 'third')))['pictures'] == before['pictures']


def test_paths_without_a_folder_to_start_from_are_refused(copy, monkeypatch):
  monkeypatch.chdir(copy)  # where they would be found by chance
  with pytest.raises(ConfigError, match=r'data.images: is empty, and .*out holds paths .* \(sample s1: pictures/1.jpg\)'):
    start(copy, images='')
  with pytest.raises(ConfigError, match='config.data.images: is empty'):
    Store(str(copy / 'out'))[1]
  assert Store(str(copy / 'out'))[0].image is None
  start(copy, images='.')


def test_absolute_paths_need_no_folder(tmp_path):
  llava_files.write_pictures(tmp_path)
  samples = [llava_files.sample(i) | {'image': str(tmp_path / 'pictures' / f'{i}.jpg')} for i in range(3)]
  what = scan(tmp_path, {'mix': llava_files.write_json(tmp_path / 'mix.json', samples)})
  what = dataclasses.replace(what, data=dataclasses.replace(what.data, allow_outside=True))
  assert run(what, tmp_path / 'out', image_bytes=False)
  assert start(tmp_path, images='', allow_outside=True)[1].image is not None


def test_an_interrupted_preparation_keeps_what_it_knows_of_pictures(copy, monkeypatch):
  shutil.rmtree(copy / 'out')
  what = scan(copy, {'mix': copy / 'mix.json'})
  written = []

  def stop_at_the_third(job, whole=preparation.write_shard):
    written.append(job[0].name)
    if len(written) == 3:
      raise KeyboardInterrupt
    return whole(job)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(preparation, 'write_shard', stop_at_the_third)
    run(what, copy / 'out', image_bytes=False, shard_samples=5)
  (copy / 'out' / '.unfinished' / f'{written[0]}.npz').write_bytes(b'damaged')
  with pytest.raises(OSError, match='npz: read back it is not what was written; is the disk failing'):
    run(what, copy / 'out', image_bytes=False, shard_samples=5)
  assert run(what, copy / 'out', image_bytes=False, shard_samples=5)
  assert len(start(copy).pictures.paths) == 14 and not (copy / 'out' / '.unfinished').exists()
  assert (copy / 'out' / SETTINGS_FILE).exists()


def test_bytes_in_the_shards_need_no_table(made, tmp_path):
  assert run(scan(made, {'mix': made / 'mix.json'}), tmp_path / 'bytes')
  store = Store(str(tmp_path / 'bytes'))
  assert store.pictures is None and 'pictures' not in fingerprint(store) and not (tmp_path / 'bytes' / PICTURES_FILE).exists()
  with pytest.raises(DataError):
    Store(str(made / 'out'), str(tmp_path))[1]


def test_verify_compares_every_picture(copy):
  assert verify(str(copy / 'out'), 1, str(copy)) == []
  replaced(copy / 'pictures' / '5.jpg', same_size(copy / 'pictures' / '5.jpg'), True)
  (copy / 'pictures' / '6.jpg').unlink()
  found = verify(str(copy / 'out'), 1, str(copy))
  assert [line.partition(':')[0] for line in found] == ['sample s5', 'sample s6', 'sample s13']
  assert 'pictures/5.jpg is not the one that was prepared' in found[0] and 'cannot be read' in found[1]
  assert verify(str(copy / 'out'), 1) == []
