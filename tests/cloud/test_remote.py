"""Files that come from a store and go there: whole, in order, and only by who holds the lease."""

import asyncio
import contextlib
import json
import os
import pathlib
import re
import socket
import time

import pytest

from dynllava_jax import lease, paths, remote, workspace
from dynllava_jax.data import cached_shards
from dynllava_jax.data.cached_shards import SHARD
from dynllava_jax.evals.folders import Folder
from dynllava_jax.locks import BusyError

STRANGE = 'a [1]*?#%{} \'"é~/b 50%.txt'


def put(folder, **files):
  for name, content in files.items():
    remote.write(paths.given(f'{folder}/{name.replace("__", "/")}', 'x'), content.encode())


def names(folder):
  return set(remote.listing(paths.given(folder, 'x')))


def read(folder, name):
  fs, url = remote.store(paths.given(f'{folder}/{name}', 'x'))
  return fs.cat_file(url).decode()


def test_what_is_read_is_what_the_store_has_now(cloud_folder):
  folder = cloud_folder
  put(folder, **{STRANGE: 'first', 'c': 'same'})
  path = paths.given(folder, '--data')
  local = remote.fetched(path)
  assert (local / STRANGE).read_text() == 'first' and paths.named(local / 'c') == f'{folder}/c'
  kept = (local / 'c').stat().st_ino
  put(folder, **{STRANGE: 'secnd'})  # as long as the first
  remote.fetched(path)
  assert (local / STRANGE).read_text() == 'secnd' and (local / 'c').stat().st_ino == kept
  fs, url = remote.store(path)
  fs.rm_file(f'{url}/c')
  assert not (remote.fetched(path) / 'c').exists()
  assert remote.fetched(paths.given(f'{folder}/{STRANGE}', 'x')).read_text() == 'secnd'
  assert not remote.fetched(paths.given(f'{folder}/nothing', 'x')).exists()


def test_of_a_checkpoint_the_newest_whole_step_is_read(cloud_folder):
  folder = cloud_folder
  put(
    folder, **{'model.json': '{}', '1__integrity.json': '{}', '1__params__a': '1', '2__integrity.json': '{}', '2__params__a': '2'}
  )
  put(folder, **{'3__params__a': '3', 'assets__4__a': '4'})
  local = remote.fetched(paths.given(folder, 'x'))
  assert sorted(p.name for p in local.iterdir()) == ['2', 'assets', 'model.json'] and (local / 'assets/4/a').exists()


def test_a_workspace_uploads_what_changed_and_only_that(cloud_folder, monkeypatch):
  folder = cloud_folder
  put(folder, kept='1', gone='2', changed='3', other__x='4')
  path, seen = paths.given(folder, '--out'), []
  with workspace.workspace(path, '--out', wanted=lambda n: not n.startswith('other')) as local:
    upload = workspace._Mirror._upload
    monkeypatch.setattr(workspace._Mirror, '_upload', lambda self, n: seen.append(n) or upload(self, n))
    assert sorted(p.name for p in local.iterdir()) == ['changed', 'gone', 'kept']
    assert lease.LEASE in names(folder)
    (local / 'kept').write_text('1')
    (local / 'gone').unlink()
    (local / 'changed').write_text('33')
    for name in ('new', '.hidden', 'half.tmp', '5.orbax-checkpoint-tmp'):
      (local / name).write_text('5')
  assert sorted(seen) == ['changed', 'new'] and names(folder) == {'kept', 'changed', 'new', 'other/x'}
  assert read(folder, 'changed') == '33' and not local.exists()


def test_markers_go_up_last_and_down_first(cloud_folder, monkeypatch):
  folder = cloud_folder
  put(folder, **{'model.json': '{}', '1__integrity.json': '{}', '1__params': '1', '7__params': 'cut off'})
  done = []
  for name in ('_upload', '_delete'):
    real = getattr(workspace._Mirror, name)
    monkeypatch.setattr(
      workspace._Mirror, name, lambda self, n, name=name, real=real: (done.append((name, n)) if n else None, real(self, n))[1]
    )
  with workspace.workspace(paths.given(folder, 'x'), '--out') as local:
    assert not (local / '7').exists()
    done.clear()
    (local / '1' / 'params').unlink()
    (local / '1' / 'integrity.json').unlink()
    (local / '2').mkdir()
    (local / '2' / 'integrity.json').write_text('{}')
    (local / '2' / 'params').write_text('2')
  assert done == [
    ('_upload', '2/params'),
    ('_upload', '2/integrity.json'),
    ('_delete', ['1/integrity.json']),
    ('_delete', ['1/params']),
  ]


def test_what_tells_whose_a_shard_is_goes_up_before_it_and_down_after_it(cloud_folder, monkeypatch):
  done = []
  for name in ('_upload', '_delete'):
    real = getattr(workspace._Mirror, name)
    monkeypatch.setattr(
      workspace._Mirror, name, lambda self, n, real=real: (done.extend([n] if isinstance(n, str) else n), real(self, n))[1]
    )
  with workspace.workspace(paths.given(cloud_folder, 'x'), '--out') as local:
    (local / '.unfinished').mkdir()
    for name in ('a.shard', 'b.shard'):
      (local / name).write_text(name)
      (local / '.unfinished' / f'{name}.json').write_text(name)
  assert {*done[:2]} == {'.unfinished/a.shard.json', '.unfinished/b.shard.json'} and len(done) == 4
  done.clear()
  with workspace.workspace(paths.given(cloud_folder, 'x'), '--out') as local:
    for file in [p for p in local.rglob('*') if p.is_file()]:
      file.unlink()
  assert {*done[2:]} == {'.unfinished/a.shard.json', '.unfinished/b.shard.json'} and len(done) == 4


def test_an_upload_at_once_that_was_cut_off_is_refused_and_cleaned(cloud_folder, monkeypatch):
  folder = cloud_folder
  path = paths.given(folder, '--dst')
  with contextlib.suppress(ZeroDivisionError), workspace.workspace(path, '--dst', at_once=True) as local:
    (local / 'a').write_text('1')
    raise ZeroDivisionError
  assert not names(folder)

  def fails(self, name):
    raise remote.StoreError('the network is gone')

  with monkeypatch.context() as patch, pytest.raises(remote.StoreError), workspace.workspace(path, '--dst', at_once=True) as local:
    (local / 'a').write_text('1')
    put(folder, a='half')
    patch.setattr(workspace._Mirror, '_upload', fails)
  assert names(folder) == {'a', remote.UPLOADING}
  with pytest.raises(remote.StoreError, match='was interrupted'):
    remote.fetched(path)
  with workspace.workspace(path, '--dst', at_once=True) as local:
    assert not any(local.iterdir())
    (local / 'b').write_text('2')
  assert names(folder) == {'b'}


def test_one_program_at_a_time(cloud_folder):
  folder = cloud_folder
  path = paths.given(folder, '--workdir')
  with lease.lease(path, '--workdir') as held:
    with pytest.raises(BusyError, match=f'process {os.getpid()} on .*choose another --workdir'), lease.lease(path, '--workdir'):
      pass
    held.check()
    put(folder, **{lease.LEASE: json.dumps({'owner': 'x', 'host': 'elsewhere', 'process': 5, 'time': time.time()})})
    with pytest.raises(BusyError, match='process 5 on elsewhere'), lease.lease(path, '--workdir'):
      pass
  assert json.loads(read(folder, lease.LEASE))['owner'] == 'x'  # not ours to give back
  put(folder, **{lease.LEASE: json.dumps({'owner': 'x', 'time': time.time() - lease.LASTS - 1})})
  with lease.lease(path, '--workdir') as held:
    assert json.loads(read(folder, lease.LEASE))['owner'] == held.owner['owner']
  assert not names(folder)
  put(folder, **{lease.LEASE: json.dumps(held.owner | {'process': 2**22 + 1, 'time': time.time()})})
  with lease.lease(path, '--workdir'):
    pass  # of a process of this machine that was killed


def test_benchmark_folders_are_fetched_as_they_are_asked_for(cloud_folder):
  put(cloud_folder, **{'pope__q.jsonl': '{"a": 1}', 'pope__images__1.jpg': 'x', 'gqa__images__1.jpg': 'large'})
  folder = Folder(remote.opened(paths.given(cloud_folder, '--data')), ('pope',))
  assert folder.need('q.jsonl').read_text() == '{"a": 1}' and (folder.need('images') / '1.jpg').read_text() == 'x'
  assert folder.find('none') is None and not (folder.root / 'gqa').exists()
  assert not remote.opened(paths.given(f'{cloud_folder}/nothing', '--data')).exists()


def test_the_cache_of_shards_is_bounded(cloud_folder, monkeypatch):
  names = [f'llava-train{SHARD}0000{i}-of-00003' for i in range(3)]
  put(cloud_folder, **{name: str(i) * 600 for i, name in enumerate(names)}, other='x')
  monkeypatch.setenv(cached_shards.LIMIT, '1.3e-6')
  shards = cached_shards.CachedShards(paths.given(cloud_folder, 'config.data.path'))
  assert shards.sizes() == dict.fromkeys(names, 600)
  places = [shards.open(name, lambda path: path.read_text() and path) for name in (names[0], names[1], names[0], names[2])]
  assert [place.exists() for place in places] == [True, False, True, True]
  assert shards.open(names[1], lambda path: path.read_text()) == '1' * 600


def test_words_of_a_store_that_cannot_be_reached_are_one_line(cloud_folder):
  fs, url = remote.store(paths.given(f'{cloud_folder}/x', 'x'))
  with pytest.raises(remote.StoreError, match=f'^{re.escape(url)}: .*no such key') as found, remote.readable(url):
    raise RuntimeError('no such key\nand more')
  assert '\n' not in str(found.value) and fs


@pytest.mark.parametrize('content', [b'\r', b'a\r', b'a\r\n', b'a\n\r', b'\n--==0==--\na', b'', bytes(range(256)), b'\r' * 3000])
def test_what_is_written_is_there_to_the_last_byte(cloud_folder, content):
  """gcsfs loses what looks like the frame that it sends files in: of 256 files of numbers one ends in a carriage return."""
  path = paths.given(cloud_folder, '--out')
  remote.write(path / 'a', content)
  with workspace.workspace(path, '--out') as local:
    assert (local / 'a').read_bytes() == content
    (local / 'b').write_bytes(content)
  assert (remote.fetched(path) / 'b').read_bytes() == content


@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError('no way')])
def test_what_the_last_upload_did_not_bring_is_kept(cloud_folder, monkeypatch, error):
  def fails(*_):
    raise error

  raises = pytest.raises(type(error), match='what is not uploaded is in ')
  with raises as found, workspace.workspace(paths.given(cloud_folder, '--out'), '--out') as local:
    (local / 'a').write_text('answers')
    monkeypatch.setattr(remote, 'put', fails)
  monkeypatch.undo()
  kept = pathlib.Path(str(found.value.args[-1]).rpartition('is in ')[2])
  assert (kept / 'a').read_text() == 'answers' and not local.exists() and lease.LEASE not in names(cloud_folder)


def test_a_store_that_says_nothing_is_an_error_and_no_wait(bucket, monkeypatch):
  """gcsfs by itself waits for an answer for ever."""
  if not bucket.startswith('gs'):
    pytest.skip('s3fs has limits of its own')
  sleep = asyncio.sleep
  monkeypatch.setattr(asyncio, 'sleep', lambda seconds, *rest: sleep(min(seconds, 0.01), *rest))  # between gcsfs's attempts
  monkeypatch.setattr(remote, 'SILENCE', 0.2)
  remote.filesystem.cache_clear()
  try:
    with socket.create_server(('127.0.0.1', 0)) as silent:
      monkeypatch.setenv('STORAGE_EMULATOR_HOST', f'http://127.0.0.1:{silent.getsockname()[1]}')
      began = time.monotonic()
      with pytest.raises(remote.StoreError, match=f'{bucket}/x'):
        remote.listing(paths.given(f'{bucket}/x', 'x'))
      assert time.monotonic() - began < 30
  finally:
    remote.filesystem.cache_clear()


def test_an_older_step_stays_until_a_newer_one_is_there(cloud_folder, monkeypatch):
  put(cloud_folder, **{'c__model.json': '{}', 'c__1__integrity.json': '{}', 'c__1__params': '1'})
  upload = workspace._Mirror._upload
  monkeypatch.setattr(workspace._Mirror, '_upload', lambda self, n: False if n == 'c/2/params' else upload(self, n))
  with workspace.workspace(paths.given(cloud_folder, 'x'), '--out') as local:
    (local / 'c' / '1').rename(local / 'c' / '2')
  assert names(cloud_folder) == {'c/model.json', 'c/1/integrity.json', 'c/1/params'}


def test_what_goes_while_it_is_looked_at_or_uploaded_is_not_believed_alone(cloud_folder, monkeypatch):
  """A preparation ends, between two looks or while its files go up: its notes go, and the file that says so comes."""
  given = paths.given(cloud_folder, 'x')
  walk, upload = os.walk, workspace._Mirror._upload

  def finish():
    (local / 'dataset_info.json').write_text('{}')
    (local / '.unfinished' / 'a.json').unlink(missing_ok=True)

  def finished_in_between(folder):
    for place in walk(folder):
      yield place
      finish()

  def finished_before(self, name):
    finish()
    return upload(self, name)

  for target, name, change in ((os, 'walk', finished_in_between), (workspace._Mirror, '_upload', finished_before)):
    with workspace.workspace(given, '--out') as local, monkeypatch.context() as patch:
      (local / '.unfinished').mkdir(exist_ok=True)
      for file in ('.unfinished/a.json', 'a'):
        (local / file).write_text(name)
      (local / 'dataset_info.json').unlink(missing_ok=True)
      held = lease.Lease(given, '--out')
      held.check = lambda: None
      mirror = workspace._Mirror(given, local, held)
      patch.setattr(target, name, change)
      mirror.sync()
      there = names(cloud_folder)
      assert 'a' not in there or there & {'.unfinished/a.json', 'dataset_info.json'}, there
    assert names(cloud_folder) == {'dataset_info.json', 'a'}
    for name in names(cloud_folder):
      remote.store(given)[0].rm_file(f'{cloud_folder}/{name}')
