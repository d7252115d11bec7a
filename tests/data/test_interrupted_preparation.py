"""Preparation that is interrupted, or whose inputs change before it goes on: nothing is lost, nothing comes twice."""

import collections
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import llava_files
import pytest
from conftest import ROOT
from PIL import Image
from preparing import SKIP, ids, run, scan

from dynllava_jax.config import ConfigError
from dynllava_jax.data import check, preparation, records
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.store import Store
from dynllava_jax.data.workers import parallel_map

pytest_plugins = ('prepared_set',)


def killed(*_):
  raise KeyboardInterrupt  # leaves what kill -9 leaves


@pytest.mark.parametrize(
  'phase, before', [('report', b'no picture'), ('write_shard', None), ('write_index', None), ('write_metadata', b'')]
)
def test_an_image_mended_after_a_kill_is_not_left_out(tmp_path, monkeypatch, phase, before):
  llava_files.write_pictures(tmp_path)
  late = tmp_path / 'pictures' / 'late.jpg'
  if before is not None:
    late.write_bytes(before)
  samples = [llava_files.sample(i) | ({'image': 'pictures/late.jpg'} if i == 2 else {}) for i in range(5)]
  what = scan(tmp_path, {'mix': llava_files.write_json(tmp_path / 'mix.json', samples)}, data=SKIP)
  with monkeypatch.context() as patch:
    patch.setattr(preparation, phase, killed)
    with pytest.raises(KeyboardInterrupt):
      run(what, tmp_path / 'out')
  late.write_bytes((tmp_path / 'pictures' / '1.jpg').read_bytes())
  looked_at = []
  monkeypatch.setattr(check, 'examine', lambda entry, **how: looked_at.append(entry.id) or records.examine(entry, **how))
  assert run(what, tmp_path / 'out')
  assert ids(Store(str(tmp_path / 'out'))) == [s['id'] for s in samples]
  assert looked_at == ['s2']


def test_an_image_lost_after_the_check_is_noticed_by_the_next_start(tmp_path, monkeypatch):
  llava_files.write_pictures(tmp_path)
  path = llava_files.write_json(tmp_path / 'mix.json', [llava_files.sample(i) for i in range(5)])
  what = scan(tmp_path, {'mix': path}, data=SKIP)

  def lose_one(*args):
    (tmp_path / 'pictures' / '2.jpg').unlink()
    return check.report(*args)

  with monkeypatch.context() as patch:
    patch.setattr(preparation, 'report', lose_one)
    with pytest.raises(DataError, match='sample s2: image .*2.jpg cannot be read .*; start again') as caught:
      run(what, tmp_path / 'out')
  assert caught.value.reason == 'missing_image'
  assert run(what, tmp_path / 'out')
  assert ids(Store(str(tmp_path / 'out'))) == ['s0', 's1', 's3', 's4']


def test_findings_without_their_settings_are_not_believed(root, tmp_path, monkeypatch):
  """As they stay when the removal of the scan's files is interrupted."""
  path = llava_files.write_json(
    tmp_path / 'one.json', [llava_files.sample(1) | {'conversations': llava_files.turns('<image>\nWhat?')}]
  )
  monkeypatch.setattr(preparation, 'report', killed)
  with pytest.raises(KeyboardInterrupt):
    run(scan(root, {'one': path}), tmp_path / 'out')
  monkeypatch.undo()
  (tmp_path / 'out' / preparation.UNFINISHED / preparation.SETTINGS_FILE).unlink()
  llava_files.write_json(path, [llava_files.sample(1)])
  assert run(scan(root, {'one': path}), tmp_path / 'out')


KILLED_AFTER_TWO_SHARDS = """
import os, signal, sys
sys.path.insert(0, 'tests'); sys.path.insert(0, 'tests/data')
import pathlib, preparing as t
from dynllava_jax.data import preparation
whole, count = preparation.write_shard, [0]
def write_shard(job):
  count[0] += 1
  if count[0] == 3:
    job[0].with_name(job[0].name + '.1.tmp').write_bytes(b'half a shard')
    os.kill(os.getpid(), signal.SIGKILL)
  return whole(job)
preparation.write_shard = write_shard
root, out = map(pathlib.Path, sys.argv[1:])
t.run(t.scan(root, {'mix': root / 'mix.json'}), out)
"""


def test_after_kill_9_it_goes_on_with_nothing_lost_and_nothing_twice(root, prepared, tmp_path):
  out = tmp_path / 'out'
  killed = subprocess.run([sys.executable, '-c', KILLED_AFTER_TWO_SHARDS, str(root), str(out)], cwd=ROOT, timeout=300)
  assert killed.returncode == -signal.SIGKILL
  with pytest.raises(ConfigError, match='no finished data set'):
    Store(str(out))
  done = {p: p.stat().st_mtime_ns for p in out.glob('*.array_record-*') if not p.name.endswith('.tmp')}
  assert len(done) == 2
  assert run(scan(root, {'mix': root / 'mix.json'}), out)
  assert collections.Counter(ids(Store(str(out)))) == collections.Counter(ids(Store(str(prepared))))
  assert all(path.stat().st_mtime_ns == when for path, when in done.items())
  assert not list(out.glob('*.tmp')) and len(list(out.glob('*.array_record-*'))) == 4


def test_shards_of_an_attempt_with_other_samples_are_written_again(root, prepared, tmp_path):
  """Killed after two shards, `--check` in between, an image mended: finished shards must not be taken for the new ones."""
  missing = [llava_files.sample(i) | ({'image': 'pictures/mended.jpg'} if i == 3 else {}) for i in range(100)]
  path = llava_files.write_json(tmp_path / 'mix.json', missing)
  what = scan(root, {'mix': path}, data=SKIP)
  out = tmp_path / 'out'
  with pytest.MonkeyPatch.context() as patch:
    whole, count = preparation.write_shard, [0]

    def stop_at_the_third(job):
      count[0] += 1
      if count[0] == 3:
        raise KeyboardInterrupt
      return whole(job)

    patch.setattr(preparation, 'write_shard', stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
      run(what, out)
  run(what, out, only_check=True)
  (root / 'pictures' / 'mended.jpg').write_bytes((root / 'pictures' / '1.jpg').read_bytes())
  assert run(what, out)
  assert ids(Store(str(out))) == [s['id'] for s in missing]


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_ctrl_c_is_one_line_and_ends_the_workers(tmp_path):
  """In a terminal: all processes of the group get the signal, while one of them is in the middle of a sample."""
  Image.new('RGB', (4000, 4000)).save(tmp_path / 'large.jpg')  # so many of them take a minute
  large = [llava_files.sample(1) | {'image': 'large.jpg'}] * check.CHUNK
  text = [llava_files.sample(i, image=False) for i in range(check.CHUNK)]
  path = llava_files.write_json(tmp_path / 'mix.json', large + text + large)
  command = [sys.executable, '-m', 'dynllava_jax.data.prepare', '--processes=2', f'--json={path}', f'--images={tmp_path}']
  command += [f'--out={tmp_path / "out"}']
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background, it is ignored
  started = subprocess.Popen(command, cwd=ROOT, start_new_session=True, preexec_fn=heed, **pipes)
  try:
    deadline = time.monotonic() + 300
    second = tmp_path / 'out' / preparation.UNFINISHED / 'scan-000001.json'
    while not second.exists() and time.monotonic() < deadline:  # then both workers are at large pictures
      time.sleep(0.1)
    assert second.exists()
    os.killpg(started.pid, signal.SIGINT)
    out, error = started.communicate(timeout=300)
  finally:
    started.kill()
  assert started.returncode == 130 and error == '' and out.splitlines()[-1] == 'interrupted; the same command goes on'
  deadline = time.monotonic() + 60
  while (left := group(started.pid)) and time.monotonic() < deadline:  # multiprocessing's tracker ends a little later
    time.sleep(0.1)
  assert not left


def group(leader):
  """Processes of a group that are not merely waiting to be buried."""
  out = []
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError):
      state, _, number = path.read_text().rpartition(')')[2].split()[:3]
      out += [path.parent.name] if int(number) == leader and state != 'Z' else []
  return out


def test_a_killed_worker_is_one_message():
  with pytest.raises(ChildProcessError, match='a worker process was killed'), parallel_map(os._exit, [1, 1], 2) as results:
    list(results)


def test_a_plan_of_shards_is_read_no_further_than_it_is_long(tmp_path):
  (tmp_path / 'plan').write_text(preparation.as_json({'sha256': 'a'}))
  (tmp_path / 'device').symlink_to('/dev/zero')
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'longer').write_text(preparation.as_json({'sha256': 'a'}) + ' ')
  names = ('plan', 'device', 'pipe', 'longer', 'none', '.')
  assert [name for name in names if preparation.is_plan(tmp_path / name, {'sha256': 'a'})] == ['plan']
