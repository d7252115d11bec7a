"""Preparing and checking: every fault is reported, nothing is lost, nothing comes twice."""

import dataclasses
import io
import json
import os
import pathlib
import resource
import subprocess
import sys

import llava_files
import numpy as np
import pytest
from conftest import ROOT
from preparing import DATA, SKIP, ids, read_ids, run, scan
from rich.console import Console

from dynllava_jax.config import ConfigError
from dynllava_jax.data import check, preparation, records
from dynllava_jax.data.images import decode
from dynllava_jax.data.samples import REASONS, DataError
from dynllava_jax.data.store import Store
from dynllava_jax.data.workers import parallel_map

pytest_plugins = ('prepared_set',)


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


def test_a_full_disk_is_one_message(root, tmp_path):
  entries = [records.parse(llava_files.sample(i), 'mix', i) for i in range(100)]
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
  try:
    with pytest.raises(OSError, match=r'shard: cannot be written \(.*\); once that is mended'):
      preparation.write_shard((tmp_path / 'shard', entries, root, False, True))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert not (tmp_path / 'shard').exists()


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


@pytest.mark.parametrize('foreign', ['report.json', 'lengths.png'])
@pytest.mark.parametrize('only_check', [False, True])
def test_reports_of_somebody_else_are_not_replaced(root, tmp_path, foreign, only_check):
  (tmp_path / foreign).write_text('{"sources": "mine"}')
  with pytest.raises(ConfigError, match=f'{foreign} was not written by a preparation; move it away'):
    run(scan(root, {'mix': root / 'mix.json'}), tmp_path, only_check=only_check)
  assert [p.name for p in tmp_path.iterdir()] == [foreign]
