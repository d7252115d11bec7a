"""Training data from a prepared store: lengths, buckets, policies, and workers that end with their parent."""

import contextlib
import dataclasses
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import llava_files
import numpy as np
import pytest
from conftest import GOLDEN, ROOT

from dynllava_jax.config import IGNORE, ConfigError, DataConfig, VisionConfig
from dynllava_jax.data import check, index, preparation
from dynllava_jax.data.integrity import FILES as FILES_KEY
from dynllava_jax.data.integrity import SEAL
from dynllava_jax.data.pipeline import LayOut, supervised_tokens, training_batches
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.sources import training_data
from dynllava_jax.data.tokenizer import read_files

FILES = read_files(GOLDEN / 'text' / 'tok_nonlegacy')
VISION = VisionConfig(image_size=28, hidden_size=32, num_heads=4)  # 4 patches
COUNT = 60


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """60 samples, every fifth without image, two of them longer than 100 tokens."""
  root = tmp_path_factory.mktemp('llava')
  llava_files.write_pictures(root)
  samples = [llava_files.sample(i, image=i % 5 != 0, words=150 if i in (7, 10) else 2 + i % 20) for i in range(COUNT)]
  path = llava_files.write_json(root / 'mix.json', samples)
  data = DataConfig(conversation='vicuna_v1', text_length=1000)
  scan = check.Scan(json={'mix': path}, images=root, data=data, tokenizer=None, num_patches=4, processes=1)
  assert preparation.prepare(scan, [1.0], root / 'out', only_check=False, image_bytes=True, shard_samples=25)
  return str(root / 'out')


def settings(folder, **changes):
  base = dict(source='prepared', path=folder, conversation='vicuna_v1', text_length=400, buckets=(70, 90))
  return DataConfig(**base | changes)


def batches(data, count, *, batch_size=8, step=0, layout=None, **where):
  training = training_data(data, VISION.num_patches, FILES, batch_size=batch_size, seed=0)
  layout = layout or LayOut(data, VISION, FILES, VISION.num_patches)
  with contextlib.closing(training_batches(training, layout, batch_size=batch_size, step=step, **where)) as stream:
    return training, list(itertools.islice(stream, count))


def test_the_index_is_made_once_and_depends_on_tokenizer_and_template(folder):
  training, _ = batches(settings(folder), 0)
  path = index.index_path(training.source.folder, FILES, 'vicuna_v1')
  made = path.stat().st_mtime_ns
  batches(settings(folder), 0)
  assert path.stat().st_mtime_ns == made
  legacy = read_files(GOLDEN / 'text' / 'tok')
  keys = {index.index_key(f, t) for f in (FILES, legacy) for t in ('vicuna_v1', 'plain')}
  assert len(keys) == 4


@pytest.mark.parametrize('group', [False, True])
def test_batches_take_the_smallest_bucket_that_holds_them(folder, group):
  training, stream = batches(settings(folder, group_lengths=group), 7)
  widths = [b.tokens.shape[1] - 4 for b in stream]
  for batch, width in zip(stream, widths):
    assert width in (70, 90, 400) and batch.length.max() <= width + 4
    assert width == 70 or batch.length.max() > {90: 70, 400: 90}[width] + 4
  plan = {u.text_length: u.batches for u in training.order.bucket_plan()}
  assert plan == {w: widths.count(w) for w in (70, 90, 400)}


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_agree_on_buckets_and_rows(folder, hosts):
  data = settings(folder, group_lengths=True)
  _, whole = batches(data, 3, step=5)
  for host in range(hosts):
    _, share = batches(data, 3, step=5, hosts=hosts, host=host)
    for a, b in zip(whole, share, strict=True):
      np.testing.assert_array_equal(np.split(a.tokens, hosts)[host], b.tokens)
      np.testing.assert_array_equal(np.split(a.pixels, hosts)[host], b.pixels)


def test_text_rows_share_batches_with_image_rows_in_one_shape(folder):
  _, stream = batches(settings(folder), 7)
  mixed = [b for b in stream if (b.image_start < 0).any() and (b.image_start >= 0).any()]
  assert mixed
  for batch in mixed:
    assert not batch.pixels[batch.image_start < 0].any() and batch.pixels[batch.image_start >= 0].any()


def test_images_only_leaves_text_out(folder):
  training, stream = batches(settings(folder, images_only=True), 6)
  assert training.order.whole == 48 and all((b.image_start >= 0).all() for b in stream)


def test_too_long_samples_stop_the_run_by_id_or_are_skipped_and_counted(folder):
  data = settings(folder, text_length=100, buckets=())
  with pytest.raises(DataError, match=r'(?s)2 of 60 samples.*2 too_long \(longer than the largest bucket\): s7, s10'):
    batches(data, 1)
  training, _ = batches(dataclasses.replace(data, on_bad_sample='skip'), 1)
  assert training.skipped == {'too_long': ['s7', 's10']} and training.order.whole == 56


def test_truncation_uses_what_fits(folder):
  training, stream = batches(settings(folder, text_length=100, buckets=(), truncate=True, shuffle=False), 2)
  assert not training.skipped and training.order.whole == 56
  lengths = np.concatenate([b.length for b in stream])
  assert lengths[7] == lengths[10] == 104
  assert (np.concatenate([b.labels for b in stream])[7, -1]) != IGNORE


class Unsupervised(LayOut):
  """A layout with a fault: nothing is supervised."""

  def __call__(self, sample, number, text_length):
    row = super().__call__(sample, number, text_length)
    return dataclasses.replace(row, labels=np.full_like(row.labels, IGNORE))


def test_a_batch_without_supervised_token_stops_the_run_with_its_ids(folder):
  data = settings(folder, shuffle=False)
  assert supervised_tokens(batches(data, 1)[1][0]) > 8
  with pytest.raises(DataError, match='step 1: no supervised token in the batch of samples s8, s9, s10, s11, s12, s13, s14, s15'):
    batches(data, 1, step=1, layout=Unsupervised(data, VISION, FILES, VISION.num_patches))


@pytest.mark.parametrize('known', [True, False])
def test_a_picture_that_rotted_after_the_check_stops_the_run_by_id(tmp_path, known):
  llava_files.write_pictures(tmp_path)
  path = llava_files.write_json(tmp_path / 'mix.json', [llava_files.sample(i) for i in range(4)])
  data = DataConfig(conversation='vicuna_v1', text_length=1000)
  scan = check.Scan(json={'mix': path}, images=tmp_path, data=data, tokenizer=None, num_patches=4, processes=1)
  assert preparation.prepare(scan, [1.0], tmp_path / 'out', only_check=False, image_bytes=False, shard_samples=25)
  if not known:  # folders of earlier versions have no table of their pictures
    content = json.loads((tmp_path / 'out' / 'prepared.json').read_text())
    (tmp_path / 'out' / 'prepared.json').write_text(json.dumps({k: v for k, v in content.items() if k not in (FILES_KEY, SEAL)}))
  picture, data = tmp_path / 'pictures' / '2.jpg', settings(str(tmp_path / 'out'), images=str(tmp_path), shuffle=False)
  training = training_data(data, VISION.num_patches, FILES, batch_size=4, seed=0)
  picture.write_bytes(picture.read_bytes()[:-100])
  stream = training_batches(training, LayOut(data, VISION, FILES, VISION.num_patches), batch_size=4, step=0)
  if known:
    with contextlib.closing(stream), pytest.raises(ConfigError, match='sample s2: image pictures/2.jpg is not the one that was'):
      next(stream)
    return
  with contextlib.closing(stream), pytest.raises(DataError, match='sample s2: image pictures/2.jpg: cannot be decoded') as caught:
    next(stream)
  assert pickle.loads(pickle.dumps(caught.value)).reason == 'undecodable_image'  # as it comes out of a worker process


def test_a_template_that_the_tokenizer_cannot_end_is_refused(folder):
  with pytest.raises(ConfigError, match=r'answers end in <\|im_end\|>'):
    batches(settings(folder, conversation='chatml_direct'), 1)


READING = """
import multiprocessing, sys, time
sys.path.insert(0, 'tests'); sys.path.insert(0, 'tests/data')
import conftest, test_store_stream as t
if __name__ == '__main__':
  data = t.settings(sys.argv[1], workers=2)
  training = t.training_data(data, t.VISION.num_patches, t.FILES, batch_size=4, seed=0)
  stream = t.training_batches(training, t.LayOut(data, t.VISION, t.FILES, t.VISION.num_patches), batch_size=4, step=0)
  next(stream)
  print(*[p.pid for p in multiprocessing.active_children()], flush=True)
  time.sleep(600)
"""
STARTING = """
import multiprocessing, time
from dynllava_jax.data import workers
def late(begun):
  begun.set()
  time.sleep(1)  # long enough for the parent to be gone
  workers.die_with_parent()
  time.sleep(600)
if __name__ == '__main__':
  context = multiprocessing.get_context('spawn')
  events = [context.Event(), context.Event()]
  for event in events:
    context.Process(target=late, args=[event]).start()
    event.wait()
  print(*[p.pid for p in multiprocessing.active_children()], flush=True)
  time.sleep(600)
"""


def alive(pid):
  try:
    return open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] != 'Z'
  except OSError:
    return False


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
@pytest.mark.parametrize('program', [READING, STARTING], ids=['reading', 'starting'])
def test_workers_end_with_a_parent_killed_by_9(program, folder, tmp_path):
  script = tmp_path / 'watched.py'
  script.write_text(program)
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  parent = subprocess.Popen([sys.executable, str(script), folder], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
  try:
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) >= 2 and all(map(alive, workers))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < deadline:
      time.sleep(0.2)
    assert not any(map(alive, workers))
  finally:
    parent.kill()
