"""Preparing and checking: every fault is reported, nothing is lost, nothing comes twice."""

import collections
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import llava_files
import numpy as np
import pytest
from conftest import GOLDEN, ROOT
from PIL import Image
from rich.console import Console

from dynllava_jax.config import ConfigError, DataConfig
from dynllava_jax.data import check, preparation, records
from dynllava_jax.data.images import decode
from dynllava_jax.data.samples import REASONS, DataError
from dynllava_jax.data.store import Store
from dynllava_jax.data.tokenizer import read_files
from dynllava_jax.data.workers import parallel_map

TOKENIZER = GOLDEN / 'text' / 'tok_nonlegacy'
DATA = DataConfig(conversation='vicuna_v1', text_length=120, buckets=(60, 80), on_bad_sample='error')
SKIP = dataclasses.replace(DATA, on_bad_sample='skip')


def scan(root, json_files, **changes):
  settings = dict(json=json_files, images=root, data=DATA, tokenizer=read_files(TOKENIZER), num_patches=4, processes=1)
  return check.Scan(**settings | changes)


def run(what, out, **changes):
  settings = dict(only_check=False, image_bytes=True, shard_samples=30)
  return preparation.prepare(what, [1.0] * len(what.json), out, **settings | changes)


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


def ids(store):
  return [store.record(i)[0].id for i in range(len(store))]


@pytest.fixture(scope='module')
def faulty(root, tmp_path_factory):
  """(report, printed table) of a file with one sample per fault, its reason as id, between good ones."""
  folder = tmp_path_factory.mktemp('faulty')
  bad = [fault | {'id': reason} for reason, fault in llava_files.faults(root).items()]
  path = llava_files.write_json(folder / 'bad.jsonl', [llava_files.sample(1), *bad, llava_files.sample(2)])
  what = scan(root, {'bad': path})
  assert run(what, folder / 'out', only_check=True) is False
  content = json.loads((folder / 'out' / check.REPORT_FILE).read_text())
  console = Console(file=io.StringIO(), width=200)
  console.print(check.table(content))
  return content['sources']['bad'], console.file.getvalue()


@pytest.mark.parametrize('reason', REASONS)
def test_every_fault_is_reported_under_its_reason(faulty, reason):
  source, printed = faulty
  (problem,) = source['problems'][reason]['samples']
  assert problem['id'] == reason and reason in problem['message']
  assert f'{reason}: {REASONS[reason]}' in printed


def test_good_samples_are_not_reported(faulty):
  source, _ = faulty
  assert source['samples'] == len(REASONS) + 2 and source['usable'] == 2
  assert source['problems'].keys() == REASONS.keys()


def test_policy_error_writes_no_data_and_skip_leaves_the_bad_out(root, tmp_path):
  bad = [fault | {'id': reason} for reason, fault in llava_files.faults(root).items()]
  path = llava_files.write_json(tmp_path / 'mixed.json', [llava_files.sample(1), *bad, llava_files.sample(2)])
  assert run(scan(root, {'mixed': path}), tmp_path / 'out') is False
  with pytest.raises(ConfigError, match='no finished data set'):
    Store(str(tmp_path / 'out'))
  assert run(scan(root, {'mixed': path}, data=SKIP), tmp_path / 'out')
  assert ids(Store(str(tmp_path / 'out'))) == ['s1', 's2']


def test_what_was_mended_is_looked_at_again(root, tmp_path):
  path = llava_files.write_json(tmp_path / 'one.json', [llava_files.sample(1) | {'image': 'pictures/late.jpg'}])
  assert run(scan(root, {'one': path}), tmp_path / 'out') is False
  (root / 'pictures' / 'late.jpg').write_bytes((root / 'pictures' / '1.jpg').read_bytes())
  assert run(scan(root, {'one': path}), tmp_path / 'out')


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


@pytest.mark.parametrize('name', ['set[/train]/7', 'set[train]/7', 'a:dog:b', 'half\ud83d'])
def test_ids_and_paths_are_printed_as_they_are(root, tmp_path, capsys, monkeypatch, name):
  monkeypatch.setenv('COLUMNS', '300')
  bad = llava_files.sample(1) | {'id': name, 'conversations': llava_files.turns('<image>\nWhat?', '')}
  path = llava_files.write_json(tmp_path / 'odd.json', [bad, llava_files.sample(2)])
  source, out = 'odd[/b] $^$', tmp_path / 'out[' / 'x]'
  assert run(scan(root, {source: path}), out, only_check=True) is False
  printed = capsys.readouterr().out
  assert name.replace('\ud83d', '?') in printed and source in printed and f'all ids in {out}' in printed
  assert run(scan(root, {source: path}, data=SKIP), out) and f'{out}: 1 samples prepared' in capsys.readouterr().out


def test_samples_come_back_as_they_were(root, prepared):
  store = Store(str(prepared))
  raw = json.loads((root / 'mix.json').read_text())
  assert ids(store) == [s['id'] for s in raw]
  sample = store[3]
  assert list(sample.conversations) == raw[3]['conversations']
  want = decode((root / raw[3]['image']).read_bytes(), 'x')
  np.testing.assert_array_equal(np.asarray(sample.image), np.asarray(want))
  assert store[0].image is None
  assert (prepared / check.HISTOGRAM_FILE).read_bytes()[:4] == b'\x89PNG'
  assert not (prepared / preparation.UNFINISHED).exists()


def test_tfds_reads_it_by_folder_and_by_name_without_tensorflow(prepared):
  code = (
    'import sys, tensorflow_datasets as tfds\n'
    f'one = tfds.builder_from_directory({str(prepared)!r}).as_data_source("train")\n'
    f'two = tfds.data_source("llava", data_dir={str(prepared.parent.parent)!r}, split="train")\n'
    'assert len(one) == len(two) == 100 and one[7]["id"] == two[7]["id"] == b"s7"\n'
    'assert "tensorflow" not in sys.modules and "torch" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code], check=True, timeout=300)


def test_paths_instead_of_bytes_give_the_same_samples(root, prepared, tmp_path):
  out = tmp_path / 'out'
  assert run(scan(root, {'mix': root / 'mix.json'}), out, image_bytes=False)
  by_path, by_bytes = Store(str(out), str(root)), Store(str(prepared))
  assert by_path.record(3)[1] == b'' and len(by_bytes.record(3)[1]) > 100
  np.testing.assert_array_equal(np.asarray(by_path[3].image), np.asarray(by_bytes[3].image))
  with pytest.raises(DataError, match='sample s3: image .*3.jpg cannot be read'):
    Store(str(out), str(tmp_path))[3]


def test_two_files_are_two_weighted_sources(root, tmp_path):
  other = llava_files.write_json(tmp_path / 'other.jsonl', [llava_files.sample(i) for i in range(20)])
  what = scan(root, {'mix': root / 'mix.json', 'other': other})
  assert preparation.prepare(what, [1.0, 2.5], tmp_path / 'out', only_check=False, image_bytes=True, shard_samples=50)
  parts = Store(str(tmp_path / 'out')).parts
  assert [(p.start, p.stop, p.weight) for p in parts] == [(0, 100, 1.0), (100, 120, 2.5)]
  turned = scan(root, {'other': other, 'mix': root / 'mix.json'})
  with pytest.raises(ConfigError, match=r"was made with sources \['mix', 'other'\], now it is \['other', 'mix'\]"):
    run(turned, tmp_path / 'out')


def test_other_settings_are_refused(root, prepared):
  what = scan(root, {'mix': root / 'mix.json'}, num_patches=9)
  with pytest.raises(ConfigError, match='was made with num_patches 4, now it is 9'):
    run(what, prepared)
  what = scan(root, {'mix': root / 'mix.json'}, data=dataclasses.replace(DATA, conversation='plain'))
  with pytest.raises(ConfigError, match=f"was made with data.conversation '{DATA.conversation}', now it is 'plain'"):
    run(what, prepared)


KILLED_AFTER_TWO_SHARDS = """
import os, signal, sys
sys.path.insert(0, 'tests'); sys.path.insert(0, 'tests/data')
import pathlib, test_prepare as t
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


def test_a_full_disk_is_one_message(root, tmp_path):
  entries = [records.parse(llava_files.sample(i), 'mix', i) for i in range(100)]
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
  try:
    with pytest.raises(OSError, match=r'shard: cannot be written \(.*\); once that is mended'):
      preparation.write_shard((tmp_path / 'shard', entries, root, False))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert not (tmp_path / 'shard').exists()


def read_ids(path):
  store = Store(path)
  return os.getpid(), [store[i].id for i in range(len(store))]


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


def test_nothing_usable_and_half_characters_are_one_message(root, tmp_path):
  broken = llava_files.sample(1)
  broken['conversations'][1]['value'] += '\ud83d'
  path = llava_files.write_json(tmp_path / 'broken.json', [broken])
  with pytest.raises(DataError, match='no usable sample'):
    run(scan(root, {'broken': path}, data=SKIP), tmp_path / 'out')
  assert 'half of a surrogate pair' in (tmp_path / 'out' / check.REPORT_FILE).read_text()


def test_two_processes_read_the_same_store(prepared):
  with parallel_map(read_ids, [str(prepared)] * 2, 2) as results:
    (one, first), (two, second) = results
  assert first == second == ids(Store(str(prepared)))
  assert one != os.getpid() and two != os.getpid()


def test_command_line_checks_in_parallel_and_fails_by_exit_status(root, tmp_path):
  path = llava_files.write_json(tmp_path / 'bad.json', [llava_files.sample(1), llava_files.faults(root)['missing_image']])
  command = [sys.executable, '-m', 'dynllava_jax.data.prepare', '--check', '--processes=2']
  command += [f'--json={path}', f'--images={root}', f'--out={tmp_path / "out"}']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 1 and 'missing_image' in done.stdout and 'Traceback' not in done.stderr
  report = json.loads(pathlib.Path(tmp_path / 'out' / check.REPORT_FILE).read_text())
  assert report['text_tokens'] == 'not measured: no tokenizer given'
  command[-2] = f'--images={root / "nowhere"}'
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 1 and done.stderr.startswith(f'error: --images: {root / "nowhere"} is no folder')


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


def test_a_sample_without_id_is_called_by_its_place():
  entry = llava_files.sample(1)
  assert records.parse(entry | {'id': None}, 'mix', 3).id == 'mix#3'
  assert records.parse(entry | {'id': 7}, 'mix', 3).id == '7'


def test_a_list_of_one_image_is_that_image():
  entry = llava_files.sample(1)
  assert records.parse(entry | {'image': [entry['image']]}, 'mix', 0) == records.parse(entry, 'mix', 0)
  with pytest.raises(DataError, match='2 images, one is supported'):
    records.parse(entry | {'image': [entry['image']] * 2}, 'mix', 0)


@pytest.mark.parametrize(
  'content', ['{"a": 1}', '[{"id": 1},', '', f'[{"9" * 5000}]'], ids=['object', 'cut', 'empty', 'huge number']
)
def test_files_that_are_no_list_are_named(root, tmp_path, content):
  path = tmp_path / 'broken.json'
  path.write_text(content)
  with pytest.raises(DataError, match='broken.json'):
    run(scan(root, {'broken': path}), tmp_path / 'out')


def test_the_builder_of_tfds_writes_the_same(root, tmp_path):
  import tensorflow_datasets as tfds

  from dynllava_jax.data import tfds_builder

  assert tfds_builder.Llava.name == 'llava'
  builder = tfds.builder('llava', data_dir=tmp_path, json=str(root / 'mix.json'), images=str(root), shard_samples=40)
  builder.download_and_prepare()
  store = Store(str(builder.data_dir))
  assert len(store) == 100 and sorted(ids(store)) == sorted(s['id'] for s in json.loads((root / 'mix.json').read_text()))
  assert store[0].id.startswith('s') and store.parts[0].weight == 1.0
