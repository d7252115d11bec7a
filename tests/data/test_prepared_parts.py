"""Several machines prepare one folder between them: the same bytes as one machine makes, whatever order they come in."""

import hashlib
import os
import subprocess
import sys

import llava_files
import pytest
from conftest import ROOT
from preparing import SKIP, TOKENIZER, ids, run, scan

from dynllava_jax.config import ConfigError
from dynllava_jax.data import check, parts
from dynllava_jax.data.store import Store

pytest_plugins = ('prepared_set',)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
  monkeypatch.setattr(check, 'CHUNK', 7)


def content(folder):
  return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file() and p.suffix != '.png'}


@pytest.mark.parametrize('text', ['', '3', '0/4', '5/4', '1/0', '3/16x', '-1/4', '1/4097', '٣/٤'])
def test_what_is_no_part(text):
  with pytest.raises(ConfigError, match='--part: .*such as 3/16'):
    parts.read(text)


@pytest.mark.parametrize('count, samples', [(3, 100), (16, 100), (5, 1)])
def test_parts_make_what_one_machine_makes(root, tmp_path, capsys, count, samples):
  path = llava_files.write_json(root / f'{count}-{samples}.json', [llava_files.sample(i, image=i % 5 != 0) for i in range(samples)])
  what = scan(root, {'mix': path})
  assert run(what, tmp_path / 'one')
  everybody = [parts.Part(n, count) for n in range(1, count + 1)]
  for part in reversed(everybody[1:]):
    assert run(what, tmp_path / 'many', part=part)
  if samples > 1:
    with pytest.raises(ConfigError, match='--finish: .* pieces are not checked'):
      run(what, tmp_path / 'many', finish=True)
  for part in everybody:  # the last one to check writes at once, the others when they come again
    assert run(what, tmp_path / 'many', part=part)
  shown = capsys.readouterr().out
  assert samples == 1 or '/s for each of 1 processes' in shown
  assert run(what, tmp_path / 'many', finish=True)
  assert content(tmp_path / 'many') == content(tmp_path / 'one')
  assert not (tmp_path / 'many' / '.unfinished').exists()
  assert len(Store(str(tmp_path / 'many'))) == samples


def test_finish_writes_what_no_part_wrote_and_the_bad_are_left_out(root, tmp_path):
  bad = llava_files.sample(3) | {'image': 'pictures/none.jpg'}
  samples = [llava_files.sample(1), bad, *(llava_files.sample(i) for i in range(4, 30))]
  path = llava_files.write_json(root / 'bad.json', samples)
  strict = scan(root, {'mix': path})
  assert run(strict, tmp_path / 'strict', part=parts.Part(1, 2)) and not run(strict, tmp_path / 'strict', part=parts.Part(2, 2))
  assert not run(strict, tmp_path / 'strict', finish=True)
  what = scan(root, {'mix': path}, data=SKIP)
  for part in (parts.Part(1, 2), parts.Part(2, 2)):
    assert run(what, tmp_path / 'out', part=part, shard_samples=5)
  assert run(what, tmp_path / 'out', finish=True, shard_samples=5)
  assert run(what, tmp_path / 'one', shard_samples=5)
  assert content(tmp_path / 'out') == content(tmp_path / 'one') and len(ids(Store(str(tmp_path / 'out')))) == 27


def test_parts_with_other_settings_do_not_mix(root, tmp_path):
  what = scan(root, {'mix': root / 'mix.json'})
  assert run(what, tmp_path / 'out', part=parts.Part(1, 2))
  with pytest.raises(ConfigError, match='was made with shard_samples 30'):
    run(what, tmp_path / 'out', part=parts.Part(2, 2), shard_samples=31)


@pytest.mark.slow
def test_on_the_command_line(root, tmp_path):
  flags = [
    f'--json={root}/mix.json',
    f'--images={root}',
    f'--out={tmp_path / "out"}',
    f'--tokenizer={TOKENIZER}',
    '--text_length=120',
  ]
  flags += ['--image_tokens=4', '--processes=1']

  def prepare(*more):
    command = [sys.executable, '-m', 'dynllava_jax.data.prepare', *flags, *more]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''}, capture_output=True, text=True)

  wrong = prepare('--part=1/1', '--finish')
  assert wrong.returncode == 1 and 'one of them at a time' in wrong.stderr and len(wrong.stderr.splitlines()) == 1
  done = prepare('--part=1/1')
  assert done.returncode == 0 and 'part 1/1 has written its 1 of 1 shards' in done.stdout, done.stderr
  assert prepare('--finish').returncode == 0 and len(Store(str(tmp_path / 'out'))) == 100


def test_parts_know_the_pictures_that_the_folder_only_names(root, tmp_path):
  what = scan(root, {'mix': root / 'mix.json'})
  assert run(what, tmp_path / 'one', image_bytes=False)
  for part in (parts.Part(2, 2), parts.Part(1, 2), parts.Part(2, 2)):
    assert run(what, tmp_path / 'many', part=part, image_bytes=False)
  assert run(what, tmp_path / 'many', finish=True, image_bytes=False)
  assert content(tmp_path / 'many') == content(tmp_path / 'one') and (tmp_path / 'many' / 'pictures.npz').exists()
