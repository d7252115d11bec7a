"""Checkpoints on disk: whatever is damaged is noticed on load, with the file's name."""

import hashlib
import json
import re
import shutil

import jax
import pytest
from conftest import GOLDEN

from dynllava_jax import checkpoint, files, presets
from dynllava_jax.checkpoint import CheckpointError, CheckpointInfo
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.source import Request
from dynllava_jax.training.keeping import Keeping
from dynllava_jax.training.saving import Saver


@pytest.fixture(scope='module')
def written(tmp_path_factory, tiny_params):
  """One converted checkpoint, and one as training writes it."""
  converted, trained = tmp_path_factory.mktemp('converted') / 'c', tmp_path_factory.mktemp('trained') / 't'
  convert(Request(src=GOLDEN / 'public_b' / 'checkpoint'), converted)
  checkpoint.write_info(trained, CheckpointInfo(model=presets.TINY), {'tokenizer.model': b'tokenizer'}, {'config.json': b'{}'})
  with Saver(trained, Keeping(last=2)) as saver:
    for step in (1, 2):
      saver.save(step, {'params': tiny_params, 'optimizer': {'step': jax.numpy.int32(step)}})
  return {'converted': converted, 'trained': trained}


@pytest.fixture(params=['converted', 'trained'])
def damaged(request, written, tmp_path):
  return shutil.copytree(written[request.param], tmp_path / 'copy')


def largest_file(directory):
  step = checkpoint.locate(directory)[1]
  return max((p for p in (directory / str(step) / 'params').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def test_every_step_is_sealed_before_it_has_its_name(written):
  for step in (1, 2):
    table = json.loads((written['trained'] / str(step) / 'integrity.json').read_text())['files']
    assert any(n.startswith('params/') for n in table) and any(n.startswith('optimizer/') for n in table)
  checkpoint.load_params(written['trained'])
  checkpoint.check_integrity(written['trained'] / '1', 'optimizer')


def test_flipped_bit(damaged):
  file = largest_file(damaged)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  with pytest.raises(CheckpointError, match=re.escape(f'{file}: damaged')):
    checkpoint.load_params(damaged)


def test_truncated_and_missing_file(damaged):
  file = largest_file(damaged)
  size = file.stat().st_size
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(CheckpointError, match=re.escape(f'{file}: {size - 1} bytes, expected {size}')):
    checkpoint.load_params(damaged)
  file.unlink()
  with pytest.raises(CheckpointError, match=re.escape(f'{file}: missing')):
    checkpoint.load_params(damaged)


def test_damaged_description(damaged):
  file = damaged / checkpoint.MODEL_FILE
  text = file.read_text()
  assert '"rope_theta": 10000.0' in text
  file.write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 18000.0'))
  with pytest.raises(CheckpointError, match='model.json: does not match its own checksum'):
    checkpoint.read_info(damaged)
  file.write_text(text[: len(text) // 2])
  with pytest.raises(CheckpointError, match='model.json: unreadable'):
    checkpoint.read_info(damaged)


def test_damaged_checksums(damaged):
  file = damaged / str(checkpoint.locate(damaged)[1]) / 'integrity.json'
  file.write_text('{"files": 3}')
  with pytest.raises(CheckpointError, match='integrity.json: damaged'):
    checkpoint.load_params(damaged)
  file.unlink()
  with pytest.raises(CheckpointError, match='integrity.json: missing'):
    checkpoint.load_params(damaged)


def test_damaged_list_of_checksums(damaged):
  """A list that says nothing of a file would leave it unchecked."""
  file = damaged / str(checkpoint.locate(damaged)[1]) / 'integrity.json'
  content = json.loads(file.read_text())
  name = next(n for n in content['files'] if n.startswith('params/'))
  renamed = {n.replace(name, f'{name[:-1]}~'): v for n, v in content['files'].items()}
  file.write_text(json.dumps(content | {'files': renamed}))
  with pytest.raises(CheckpointError, match='integrity.json: damaged, it does not match its own checksum'):
    checkpoint.load_params(damaged)
  del content['sha256'], content['files'][name]
  file.write_text(json.dumps(content))
  with pytest.raises(CheckpointError, match=re.escape(f'{file.parent / name}: not listed in integrity.json')):
    checkpoint.load_params(damaged)
  file.write_text('{"files": {}}')
  with pytest.raises(CheckpointError, match='integrity.json: damaged, it lists no file of params'):
    checkpoint.load_params(damaged)


def test_sizes_of_every_part_can_be_checked(written, tmp_path):
  step = shutil.copytree(written['trained'], tmp_path / 'copy') / '2'
  checkpoint.check_integrity(step, contents=False)
  file = max((p for p in (step / 'optimizer').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(CheckpointError, match=re.escape(f'{file}: ')):
    checkpoint.check_integrity(step, contents=False)


def test_damaged_tokenizer_and_assets(written, tmp_path):
  directory = shutil.copytree(written['trained'], tmp_path / 'copy')
  assert checkpoint.read_tokenizer(directory) == {'tokenizer.model': b'tokenizer'}
  assert checkpoint.read_assets(directory) == {'config.json': b'{}'}
  (directory / 'tokenizer.model').write_bytes(b'Tokenizer')
  (directory / 'assets' / 'config.json').unlink()
  with pytest.raises(CheckpointError, match='tokenizer.model: damaged'):
    checkpoint.read_tokenizer(directory)
  with pytest.raises(CheckpointError, match='config.json: cannot be read'):
    checkpoint.read_assets(directory)
  (directory / 'tokenizer.model').unlink()
  with pytest.raises(CheckpointError, match='tokenizer.model: cannot be read'):
    checkpoint.read_tokenizer(directory)


def test_large_files_are_sampled_when_loaded_and_read_whole_on_request(written, tmp_path, monkeypatch):
  """Ends and middle of a file are among the samples; what lies between is compared by `check_integrity` alone."""
  monkeypatch.setattr(files, 'SAMPLED_FROM', 0)
  monkeypatch.setattr(files, 'SECTOR', 16)
  monkeypatch.setattr(files, 'STRIDE', 2**12)
  step = shutil.copytree(written['trained'], tmp_path / 'copy') / '2'
  (step / 'integrity.json').unlink()
  checkpoint.seal(step)
  file = largest_file(step.parent)
  whole = file.read_bytes()
  for place in (0, len(whole) - 1, 9):
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(CheckpointError, match=re.escape(f'{file}: damaged')):
      checkpoint.check_integrity(step, 'params', sampled=True)
  file.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
  checkpoint.check_integrity(step, 'params', sampled=True)
  with pytest.raises(CheckpointError, match=re.escape(f'{file}: damaged')):
    checkpoint.check_integrity(step, 'params')


def test_steps_of_earlier_versions_are_read_whole(damaged):
  """They were sealed without samples, and by SHA-256."""
  step = damaged / str(checkpoint.locate(damaged)[1])
  content = json.loads((step / 'integrity.json').read_text())
  for name, about in content['files'].items():
    del about['sample'], about['xxh3_128']
    about['sha256'] = hashlib.sha256((step / name).read_bytes()).hexdigest()
  del content['sha256']
  (step / 'integrity.json').write_text(json.dumps(content))
  assert checkpoint.load_params(damaged)
  test_flipped_bit(damaged)
