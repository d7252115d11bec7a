"""Digests of prepared data: whatever changes the stream changes them, and nothing else does."""

import json
import os
import shutil
import subprocess
import sys

import llava_files
import pytest
from conftest import ROOT

from dynllava_jax.config import DataConfig
from dynllava_jax.data import check, preparation
from dynllava_jax.data.fingerprint import fingerprint
from dynllava_jax.data.integrity import FILES, SEAL
from dynllava_jax.data.store import Store


def prepared(root, name, samples, image_bytes=True, weight=1.0):
  path = llava_files.write_json(root / f'{name}.json', samples)
  data = DataConfig(conversation='vicuna_v1', text_length=90)
  scan = check.Scan(json={'mix': path}, images=root, data=data, tokenizer=None, num_patches=4, processes=1)
  assert preparation.prepare(scan, [weight], root / name, only_check=False, image_bytes=image_bytes, shard_samples=4)
  return root / name


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('data')
  llava_files.write_pictures(root)
  return root


def without_digests(folder):
  """As earlier versions wrote them."""
  content = json.loads((folder / 'prepared.json').read_text())
  (folder / 'prepared.json').write_text(json.dumps({k: v for k, v in content.items() if k not in (FILES, SEAL)}))


def samples():
  return [llava_files.sample(i) for i in range(6)]


def test_labels_order_weights_and_number_of_samples_count(root):
  other = samples()
  other[3]['conversations'][1]['value'] = other[3]['conversations'][1]['value'][::-1]  # of the same length
  folders = [
    prepared(root, 'first', samples()),
    prepared(root, 'label', other),
    prepared(root, 'order', samples()[::-1]),
    prepared(root, 'fewer', samples()[:5]),
    prepared(root, 'weight', samples(), weight=0.5),
  ]
  digests = [fingerprint(Store(str(folder)))['samples'] for folder in folders]
  assert len(set(digests)) == 5
  assert fingerprint(Store(str(shutil.copytree(folders[0], root / 'moved'))))['samples'] == digests[0]
  assert fingerprint(Store(str(prepared(root, 'again', samples()))))['samples'] == digests[0]


def test_folders_without_digests_are_read(root):
  folders = [prepared(root, 'plain', samples()), prepared(root, 'plain_label', samples()[::-1])]
  for folder in folders:
    without_digests(folder)
  first, second = (fingerprint(Store(str(folder))) for folder in folders)
  assert first['samples'] != second['samples'] and 'pictures' not in first


def test_pictures_that_such_a_folder_only_names_count(root, tmp_path):
  folder = prepared(root, 'paths', samples(), image_bytes=False)
  without_digests(folder)
  pictures = tmp_path / 'pictures'
  shutil.copytree(root, pictures, ignore=shutil.ignore_patterns('*.array_record*', 'first', 'paths'))
  first = fingerprint(Store(str(folder), str(pictures)))
  for file in (p for p in pictures.rglob('*') if p.suffix in ('.jpg', '.png', '.jpeg') and p.is_file()):
    file.write_bytes(file.read_bytes() + b' ')
  second = fingerprint(Store(str(folder), str(pictures)))
  assert first['samples'] == second['samples'] and first['pictures'] != second['pictures']


ANOTHER_PROCESS = """
import pathlib, sys
sys.path[:0] = ['tests', 'tests/data']
import llava_files, test_fingerprint
root = pathlib.Path(sys.argv[1])
test_fingerprint.prepared(root, 'elsewhere', test_fingerprint.samples())
"""


def test_another_process_makes_the_same_bytes(root):
  mine = prepared(root, 'here', samples())
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  subprocess.run([sys.executable, '-c', ANOTHER_PROCESS, str(root)], cwd=ROOT, env=env, check=True, capture_output=True)
  first, second = (fingerprint(Store(str(folder)))['samples'] for folder in (mine, root / 'elsewhere'))
  assert first == second
