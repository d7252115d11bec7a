"""Every file of a prepared folder flipped, cut, deleted and replaced: what is read is exact, or one line names the file."""

import collections
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import llava_files
import pytest
from conftest import GOLDEN, ROOT
from preparing import run, scan

from dynllava_jax.config import ConfigError
from dynllava_jax.data import verify
from dynllava_jax.data.index import load_index
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.store import Store
from dynllava_jax.data.tokenizer import read_files

FLIPS = 24  # places of a file
TOKENIZER = GOLDEN / 'text' / 'tok_nonlegacy'


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  root = tmp_path_factory.mktemp('damage')
  llava_files.write_pictures(root)
  samples = [llava_files.sample(i, image=i % 5 != 0) for i in range(12)]
  path = llava_files.write_json(root / 'mix.json', samples)
  assert run(scan(root, {'mix': path}), root / 'out', shard_samples=6)
  return root / 'out'


def content(folder):
  """All that training takes from a folder."""
  store = Store(str(folder))
  index = load_index(store, read_files(TOKENIZER), 'vicuna_v1')
  records = [store.record(i) for i in range(len(store))]
  return repr((records, store.parts, index.tokens.tolist(), index.reach.tolist(), index.has_image.tolist(), index.reason.tolist()))


def flip(path, at, bit):
  data = bytearray(path.read_bytes())
  data[at] ^= 1 << bit
  path.write_bytes(data)


def replace(path, make):
  path.unlink()
  make(path)


def kinds(folder, name):
  """Name of a kind of damage -> what does it to a file."""
  path, rng = folder / name, random.Random(name)
  size = path.stat().st_size
  places = {0, 1, size // 2, size - 1, max(size - 2**16, 0)} | {rng.randrange(size) for _ in range(FLIPS)}
  out = {f'flip {at}': (lambda at=at: flip(path, at, rng.randrange(8))) for at in sorted(places)}
  for keep in sorted({0, 1, size // 3, size // 2, size - 1}):
    out[f'cut to {keep}'] = lambda keep=keep: os.truncate(path, keep)
  longer = path.read_bytes()
  return out | {
    'one byte more': lambda: path.write_bytes(longer + b'\0'),
    'twice': lambda: path.write_bytes(longer * 2),
    'zeros': lambda: path.write_bytes(bytes(size)),
    'random': lambda: path.write_bytes(rng.randbytes(size)),
    'zeros at the end': lambda: path.write_bytes(longer[: size // 2] + bytes(size - size // 2)),
    'deleted': path.unlink,
    'a folder': lambda: replace(path, pathlib.Path.mkdir),
    'a pipe': lambda: replace(path, os.mkfifo),
    'a device': lambda: replace(path, lambda p: p.symlink_to('/dev/zero')),
    'a dead link': lambda: replace(path, lambda p: p.symlink_to('nowhere')),
    'huge': lambda: os.truncate(path, 2**40),
    'other JSON': lambda: path.write_text('[{"a": 1}]'),
    'null': lambda: path.write_text('null'),
    'deep': lambda: path.write_text('[' * 10**5),
    'another file': lambda: shutil.copy(folder / ('prepared.json' if name != 'prepared.json' else 'sources.json'), path),
  }


def trials(whole, scratch):
  """(file, kind, 'exact' or 'named' or what was wrong) of all of them, each begun with a line of its own."""
  expected = content(whole)
  for name in sorted(p.name for p in whole.iterdir()):
    for kind in kinds(whole, name):
      shutil.rmtree(scratch, ignore_errors=True)
      shutil.copytree(whole, scratch)
      kinds(scratch, name)[kind]()
      print(json.dumps([name, kind]), flush=True)
      try:
        result = 'exact' if content(scratch) == expected else 'SILENT'
      except (ConfigError, DataError) as e:
        one_line = str(e).isprintable() and len(str(e)) < 600
        named = (name in str(e) or 'prepared.json' in str(e)) and ('prepare it' in str(e))
        result = 'named' if one_line and named else f'UNCLEAR: {e}'
      except Exception as e:
        result = f'TRACEBACK: {type(e).__name__}: {e}'
      print(json.dumps([name, kind, result]), flush=True)


def test_every_damage_is_exact_or_named(prepared, tmp_path):
  code = "import sys; sys.path[:0] = ['tests', 'tests/data']; import pathlib, test_damage as t; "
  code += 't.trials(*map(pathlib.Path, sys.argv[1:]))'
  command = [sys.executable, '-c', code, str(prepared), str(tmp_path / 'scratch')]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
  lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
  assert done.returncode == 0, f'died at {lines[-1]}: {done.stderr[-500:]}'
  results = {(name, kind): result[0] for name, kind, *result in lines if result}
  wrong = {key: result for key, result in results.items() if result not in ('exact', 'named')}
  assert not wrong
  assert len(results) >= 200
  counts = collections.Counter(results.values())
  print(f'prepared folder: damaged {len(results)}, named {counts["named"]}, exact {counts["exact"]}, silent 0, tracebacks 0')
  shards = [result for (name, kind), result in results.items() if 'array_record' in name and not kind.startswith('flip')]
  assert set(shards) == {'named'}


@pytest.mark.parametrize(
  'field, value', [('samples', 10**12), ('weight', 1e300), ('weight', float('nan')), ('samples', -1), ('name', 7)]
)
def test_absurd_numbers_of_a_folder_without_digests_are_named(prepared, tmp_path, field, value):
  """As of earlier versions, which kept no digests."""
  folder = tmp_path / 'old'
  shutil.copytree(prepared, folder)
  settings = json.loads((folder / 'prepared.json').read_text())
  (folder / 'prepared.json').write_text(json.dumps({k: v for k, v in settings.items() if k not in ('files', 'sha256')}))
  assert content(folder) == content(prepared)
  sources = json.loads((folder / 'sources.json').read_text())
  sources[0][field] = value
  (folder / 'sources.json').write_text(json.dumps(sources))
  store = None
  with pytest.raises(ConfigError, match=r'sources.json: is missing or damaged .* prepare it again|an epoch would draw'):
    store = Store(str(folder))
    from dynllava_jax.data.order import Order

    Order(store.parts, 2, 0, (10,))


@pytest.mark.parametrize('lengths', [['1000000000000'], ['6', '-6'], ['x'], [], None, ['6']])
def test_absurd_shards_of_a_folder_without_digests_are_named(prepared, tmp_path, lengths):
  folder = tmp_path / 'old'
  shutil.copytree(prepared, folder)
  (folder / 'prepared.json').write_text('{}')
  info = json.loads((folder / 'dataset_info.json').read_text())
  info['splits'][0]['shardLengths'] = lengths
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  with pytest.raises(ConfigError, match=r'(dataset_info.json|sources.json|00000-of-00001): is missing or damaged'):
    Store(str(folder))


def test_verify_finds_what_opening_does_not_look_at(prepared, tmp_path):
  folder = tmp_path / 'copy'
  shutil.copytree(prepared, folder)
  assert verify.verify(str(folder), 1) == []
  shard = next(folder.glob('*-00001-of-*'))
  flip(shard, shard.stat().st_size // 2 + 5000, 3)
  Store(str(folder))
  assert verify.verify(str(folder), 1) == [f'{shard}: its content has changed']
  counts = folder / 'token_counts.npy'
  counts.write_bytes(counts.read_bytes()[:-1])
  assert verify.verify(str(folder), 1) == [f'{path}: its content has changed' for path in (shard, counts)]
  counts.unlink()
  os.mkfifo(counts)
  assert verify.verify(str(folder), 1)[1] == f'{counts}: it is no regular file'
  command = [sys.executable, '-m', 'dynllava_jax.data.verify', f'--path={folder}', '--processes=1']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 1 and f'{shard}: its content has changed' in done.stdout and 'prepare it again' in done.stdout
  (folder / 'prepared.json').unlink()
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 1 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1


def test_a_finished_folder_that_is_damaged_is_not_called_prepared(prepared, tmp_path):
  folder = tmp_path / 'out'
  shutil.copytree(prepared, folder)
  root = prepared.parent
  next(folder.glob('*-00000-of-*')).unlink()
  with pytest.raises(ConfigError, match='00000-of-00002: is missing or damaged'):
    run(scan(root, {'mix': root / 'mix.json'}), folder, shard_samples=6)


@pytest.mark.parametrize('name', ['prepared.json', 'scan-000000.json', 'shards.json'])
@pytest.mark.parametrize('left', [b'', b'{"a": 1}', b'[1, 2]', b'\xff\xfe\xff'], ids=['empty', 'object', 'list', 'bytes'])
def test_what_an_interrupted_run_left_may_be_damaged(tmp_path, monkeypatch, name, left):
  from dynllava_jax.data import preparation

  llava_files.write_pictures(tmp_path)
  what = scan(tmp_path, {'mix': llava_files.write_json(tmp_path / 'mix.json', [llava_files.sample(i) for i in range(5)])})

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(preparation, 'write_metadata', killed)
    with pytest.raises(KeyboardInterrupt):
      run(what, tmp_path / 'out')
  (tmp_path / 'out' / preparation.UNFINISHED / name).write_bytes(left)
  try:
    assert run(what, tmp_path / 'out')
  except ConfigError as e:
    assert name == 'prepared.json' and left.startswith(b'{') and 'was made with' in str(e)
    return
  assert len(Store(str(tmp_path / 'out'))) == 5


def test_a_second_preparation_is_kept_out(tmp_path):
  from dynllava_jax.locks import BusyError, sole_use

  llava_files.write_pictures(tmp_path)
  path = llava_files.write_json(tmp_path / 'mix.json', [llava_files.sample(1)])
  command = [
    sys.executable,
    '-m',
    'dynllava_jax.data.prepare',
    f'--json={path}',
    f'--images={tmp_path}',
    f'--out={tmp_path / "out"}',
  ]
  with sole_use(tmp_path / 'out', '--out'):
    done = subprocess.run([*command, '--processes=1'], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and 'another process is writing there' in done.stderr and done.stderr.count('\n') == 1
    with pytest.raises(BusyError), sole_use(tmp_path / 'out', '--out'):
      pass
  assert not (tmp_path / 'out' / 'prepared.json').exists()
