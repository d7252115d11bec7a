"""A small data set and what preparation makes of it: fixtures for files that name this as a plugin."""

import llava_files
import pytest
from preparing import run, scan


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp('llava')
  llava_files.write_pictures(folder)
  llava_files.write_json(folder / 'mix.json', [llava_files.sample(i, image=i % 5 != 0) for i in range(100)])
  return folder


@pytest.fixture(scope='module')
def prepared(root):
  out = root / 'prepared' / 'llava' / '1.0.0'
  assert run(scan(root, {'mix': root / 'mix.json'}), out)
  return out
