"""Conversion is strict, streamed, and never leaves half a checkpoint behind."""

import collections
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import xxhash
from conftest import GOLDEN, ROOT
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from dynllava_jax import checkpoint, command_line, progress, sharding
from dynllava_jax.checkpoint import CheckpointError
from dynllava_jax.config import MeshConfig
from dynllava_jax.convert import convert as converting
from dynllava_jax.convert.convert import check_destination, convert, new_directory
from dynllava_jax.convert.export import export
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import load_case
from dynllava_jax.convert.report import run_conversion
from dynllava_jax.convert.source import Request


@pytest.fixture
def source(tmp_path):
  """A copy of the safetensors case."""
  shutil.copytree(GOLDEN / 'public_b', tmp_path / 'case')
  return tmp_path / 'case' / 'checkpoint'


@pytest.fixture
def out(tmp_path):
  return tmp_path / 'out'


def test_converted_checkpoint_is_complete_in_itself(source, out):
  found, mapped = convert(Request(src=source), out)
  shutil.rmtree(source.parent)
  assert checkpoint.read_info(out) == found.info
  params = checkpoint.load_params(out)
  assert params['llama']['layers']['q'].shape == (4, 5, 80, 16)
  assert len({m.source for m in mapped}) == len(mapped) and len({m.target for m in mapped}) == len(mapped)


def test_every_number_arrives_exactly_once(source, out):
  """Sorted values of source and result agree."""
  weights = load_file(source / 'model.safetensors')
  convert(Request(src=source), out)
  params = checkpoint.load_params(out)
  ours = np.sort(
    np.concatenate([np.ravel(x) for k, x in params.items() if k not in ('vision', 'vision_tail') for x in jax.tree.leaves(x)])
  )
  theirs = np.sort(np.concatenate([np.ravel(x) for x in weights.values()]))
  np.testing.assert_array_equal(ours, theirs)


def test_int8_loads_as_what_is_made_of_the_whole_while_it_is_loaded(source, out, tmp_path):
  """Sealed, read back and cut like any other; refused where whole numbers are needed."""
  convert(Request(src=source), tmp_path / 'whole')
  _, mapped = convert(Request(src=source), out, 'int8')
  info = checkpoint.read_info(out)
  assert info.int8 and {m.target for m in mapped} >= {'llama/layers/q[3]', 'scales/layers/q[3]'}
  checkpoint.check_integrity(out / '0')
  for mesh in (None, sharding.make_mesh(MeshConfig(fsdp=4, data=2))):
    stored = checkpoint.load_params(out, mesh, stages=info.stages)
    made = checkpoint.load_params(tmp_path / 'whole', mesh, stages=info.stages, int8=True)
    assert jax.tree.structure(stored) == jax.tree.structure(made)
    jax.tree.map(np.testing.assert_array_equal, stored, made)
  with pytest.raises(CheckpointError, match='rounded to int8, for generation alone; take the checkpoint that it was made of'):
    checkpoint.load_params(out)
  with pytest.raises(ConversionError, match='rounded to int8, for generation here; export the checkpoint that it was made of'):
    export(out, tmp_path / 'back', 'llava')
  with pytest.raises(ConversionError, match='--dtype=int8: is for generation here'):
    export(tmp_path / 'whole', tmp_path / 'back', 'llava', dtype='int8')
  described = json.loads((out / checkpoint.MODEL_FILE).read_text())
  described.pop('sha256')
  checkpoint.write_description(out, described | {'int8': False})  # an edited description does not make whole numbers of them
  with pytest.raises(CheckpointError, match=r'\+ scales/layers/q: not part of the model'):
    checkpoint.load_params(out, stages=info.stages)


def test_loads_onto_a_mesh(source, out):
  """A chunk per layer on disk, any sharding in memory."""
  convert(Request(src=source), out)
  whole = checkpoint.load_params(out)
  cut = checkpoint.load_params(out, sharding.make_mesh(MeshConfig(fsdp=4, data=2)))
  assert cut['llama']['layers']['gate'].sharding.spec == PartitionSpec(None, 'fsdp', 'tensor')
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), whole, cut))


def test_report_holds_what_is_on_disk(source, out):
  _, mapped = convert(Request(src=source), out)
  report = json.loads((out / 'conversion.json').read_text())
  assert report['layout'] == 'Dynamic-LLaVA (the authors)' and len(report['tensors']) == len(mapped)
  line = next(t for t in report['tensors'] if t['source'] == 'model.layers.2.mlp.up_proj.weight')
  assert line['target'] == 'llama/layers/up[2]' and line['shape'] == [112, 80] and line['dtype'] == 'float32'
  content = load_file(source / 'model.safetensors')['model.layers.2.mlp.up_proj.weight'].T.tobytes()
  assert line['xxh3_128'] == xxhash.xxh3_128_hexdigest(content)
  assert (out / '0' / line['file']).read_bytes() == content


def test_dtype(source, out):
  convert(Request(src=source), out, dtype='bfloat16')
  params = checkpoint.load_params(out)
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {'bfloat16'}
  expected = load_file(source / 'model.safetensors')['model.embed_tokens.weight'].astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(np.asarray(params['llama']['embedding']), expected)


def test_bytes_that_change_on_the_way_to_disk_are_noticed(source, out, monkeypatch):
  real = converting.StepWriter.write

  def failing(self, path, index, value):
    real(self, path, index, value * 2 if path == ('llama', 'norm', 'scale') else value)

  monkeypatch.setattr(converting.StepWriter, 'write', failing)
  with pytest.raises(ConversionError, match='llama.norm.scale/0: read back, it is not model.norm.weight as written'):
    convert(Request(src=source), out)
  assert not out.exists() and not out.with_name('.out.partial').exists()


def test_destination_that_exists(source, out):
  convert(Request(src=source), out)
  with pytest.raises(ConversionError, match='exists and is not empty; choose another --dst, or replace it with --overwrite'):
    convert(Request(src=source), out)
  (out / 'tokenizer.model').touch()  # of an earlier source
  convert(Request(src=source), out, overwrite=True)
  assert not (out / 'tokenizer.model').exists() and checkpoint.load_params(out) and not out.with_name('.out.old').exists()
  with pytest.raises(ConversionError, match='is, holds or lies in the source'):
    convert(Request(src=source), source.parent, overwrite=True)


def test_what_may_not_be_overwritten(source, out):
  with pytest.raises(ConversionError, match='lies in the source .*clip'):  # the tower, which only the config names
    convert(Request(src=source), source.parent / 'clip', overwrite=True)
  assert (source.parent / 'clip' / 'model.safetensors').is_file()


@pytest.mark.parametrize(
  'files, reason',
  [
    (['photos/1.jpg'], 'is no checkpoint'),
    (['config.json'], 'is no checkpoint'),
    (['model.json'], 'is no checkpoint'),
    (['config.json', 'metrics.jsonl', 'model.safetensors'], 'it holds metrics.jsonl'),  # a training run
    (['config.json', 'checkpoints/model.json'], 'it holds checkpoints'),
    (['model.json', '500/params/x', '500/optimizer/x'], 'holds 500, of a training run'),  # its checkpoints
    (['model.json', '7/params/x'], 'holds 7, of a training run'),
    (['model.json', 'conversion.json', '0/params/x', '0/optimizer/x'], 'holds 0/optimizer, of a training run'),
    (['model.json', 'conversion.json', '0/params/x', '500/params/x'], 'holds 500, of a training run'),
    (['model.json', 'conversion.json', '0/params/x', 'checkpoints/model.json'], 'it holds checkpoints'),  # a run started in it
    (['model.json', 'conversion.json', '0/params/x', 'notes.txt'], 'it holds notes.txt'),
    (['config.json', 'model.safetensors', 'trainer_state.json'], 'it holds trainer_state.json'),  # a run of PyTorch's
    (['config.json', 'model.safetensors', 'checkpoint-500/model.safetensors'], 'it holds checkpoint-500'),
    (['config.json', 'model.safetensors', 'clip/config.json', 'clip/mine.txt'], 'it holds clip/mine.txt'),
    (['config.json', 'model.safetensors', 'clip/config.json'], None),
    (['config.json', 'model-00001-of-00002.safetensors', 'model.safetensors.index.json', 'tokenizer.model'], None),
    (['model.json', 'conversion.json', 'assets/vision/config.json', '0/params/x', '0/integrity.json'], None),
  ],
)
def test_only_conversions_and_exports_are_overwritten(tmp_path, files, reason):
  for name in files:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  if reason is None:
    check_destination(tmp_path, True)
    return
  with pytest.raises(ConversionError, match=f'{reason}.*and --overwrite replaces only those'):
    check_destination(tmp_path, True)


@pytest.mark.parametrize('name', ['.out.old', '.out.partial'])
def test_only_leftovers_of_a_conversion_are_removed(source, out, name):
  """Someone else's directory that has such a name stays."""
  (out.with_name(name) / 'photos').mkdir(parents=True)
  with pytest.raises(ConversionError, match=r'is not what an interrupted conversion leaves \(it holds photos\); move it away'):
    convert(Request(src=source), out)
  assert (out.with_name(name) / 'photos').exists() and not out.exists()


def test_checkpoint_set_aside_by_a_killed_overwrite_comes_back(source, out):
  convert(Request(src=source), out)
  os.replace(out, out.with_name('.out.old'))  # killed between the two renames
  out.with_name('.out.partial').mkdir()
  with pytest.raises(ConversionError, match='exists and is not empty'):
    convert(Request(src=source), out)
  checkpoint.load_params(out)
  assert not out.with_name('.out.partial').exists()


def test_failing_last_rename_leaves_the_old_checkpoint(source, out, monkeypatch):
  convert(Request(src=source), out)
  real = os.replace

  def replace(a, b):
    if str(a).endswith('.partial'):
      raise OSError(errno.EIO, 'Input/output error')
    real(a, b)

  monkeypatch.setattr(os, 'replace', replace)
  with pytest.raises(ConversionError, match='cannot be written .*Input/output error'), new_directory(out, 0):
    pass
  checkpoint.load_params(out)
  assert not out.with_name('.out.partial').exists() and not out.with_name('.out.old').exists()


def test_two_conversions_to_one_place(source, out):
  with new_directory(out, 0) as partial:
    (partial / 'config.json').touch()
    with pytest.raises(ConversionError, match='out: another process is writing it; wait for that one'):
      convert(Request(src=source), out)
    assert (partial / 'config.json').exists()
  assert (out / 'config.json').exists()


def test_mount_point_is_no_destination(source, out, monkeypatch):
  monkeypatch.setattr(os.path, 'ismount', lambda path: path == out)
  with pytest.raises(ConversionError, match='out: is a mount point, which cannot be renamed; choose a directory inside it'):
    convert(Request(src=source), out)


def test_interruption_is_one_line(source, out, monkeypatch, capsys):
  def interrupted(self, path, index, value):
    raise KeyboardInterrupt

  monkeypatch.setattr(converting.StepWriter, 'write', interrupted)
  for left in (f'nothing is at {out}', f'{out} is as it was'):
    with pytest.raises(SystemExit) as end, command_line.readable_errors():
      convert(Request(src=source), out, overwrite=True)
    assert end.value.code == 130 and capsys.readouterr().err == f'interrupted; {left}\n'
    assert not out.with_name('.out.partial').exists()
    shutil.copytree(source, out, dirs_exist_ok=True)


def spoiled(value=None, error=None):
  """A hook that makes the first tensor of a source give another value, or fail."""

  def read():
    if error:
      raise error
    return value

  def on_open(found):
    key, tensor = found.tensors[0]
    found.tensors[0] = key, dataclasses.replace(tensor, read=read)

  return on_open


@pytest.mark.parametrize(
  'hook, message',
  [
    (spoiled(error=OSError(errno.EIO, 'Input/output error')), r'model.safetensors: \S+ cannot be read .*Input/output error'),
    (spoiled(value=np.zeros(3, np.float32)), r'model.safetensors: \S+ has shape \(3,\), expected .*has the file changed'),
  ],
)
def test_source_that_fails_while_it_is_read(source, out, hook, message):
  with pytest.raises(ConversionError, match=message):
    convert(Request(src=source), out, on_open=hook)
  assert not out.exists()


def test_source_truncated_while_it_is_read(source, out):
  file = source / 'model.safetensors'
  message = r'model.safetensors: \S+ cannot be read \(the file ends [\d,]+ bytes too early; has it changed\?\)'
  with pytest.raises(ConversionError, match=message):
    convert(Request(src=source), out, on_open=lambda _: os.truncate(file, file.stat().st_size // 2))
  assert not out.exists()


def test_disk_that_takes_little_at_a_time_and_then_nothing(source, out, monkeypatch):
  """The last bytes of an array count: none is lost, and an error says what the system said."""
  real, room = os.pwrite, [10**9]

  def pwrite(file, data, offset):
    if not room[0]:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    written = real(file, data[: min(1000, room[0])], offset)
    room[0] -= written
    return written

  monkeypatch.setattr(os, 'pwrite', pwrite)
  convert(Request(src=source), out, readback=False)
  checkpoint.check_integrity(out / '0', 'params')
  room[0] = 100
  with pytest.raises(ConversionError, match=r'out: cannot be written \(.*No space left on device\)'):
    convert(Request(src=source), out, overwrite=True, readback=False)
  checkpoint.check_integrity(out / '0', 'params')


def test_checkpoint_that_the_benchmark_makes(tmp_path, out):
  script = 'import pathlib, sys, convert; convert.synthesise(pathlib.Path(sys.argv[1]), convert.SIZES["tiny"])'
  paths = os.pathsep.join((str(ROOT), str(ROOT / 'benchmarks')))
  subprocess.run([sys.executable, '-c', script, tmp_path / 'made'], env=os.environ | {'PYTHONPATH': paths}, check=True)
  source, mapped = convert(Request(src=tmp_path / 'made'), out)
  assert source.layout == 'LlavaForConditionalGeneration (Hugging Face)' and len(mapped) == len(source.tensors)


def test_progress_without_a_terminal(source, out, monkeypatch, capsys):
  monkeypatch.setattr(progress, 'LINE_EVERY', 0.0)
  run_conversion(Request(src=source), out, 'keep', False, False, None)
  captured = capsys.readouterr()
  assert re.match(r'converting: 0.00 of 0.00 GB, \d.\d\d GB/s, 0 min left\n', captured.err)
  assert re.search(r'\nconverting: (\d.\d\d) of \1 GB, \d.\d\d GB/s\n$', captured.err)
  assert captured.out.startswith('layout: Dynamic-LLaVA (the authors)\nconverted 124 tensors')


@pytest.mark.parametrize(
  'change, message',
  [
    ({'pixel_values': np.zeros(7)}, r'pixel_values has shape \(7,\), the model asks for \(any, 3, 112, 112\)'),
    ({'train/grad_ce/model.layers.9.mlp.up_proj.weight': np.zeros(1)}, 'is about a parameter that the model does not have'),
    ({'prefill_b1/logits': None}, "array 'prefill_b1/logits' is missing"),
  ],
)
def test_case_of_another_model_is_refused_before_anything_is_written(source, out, tmp_path, capsys, change, message):
  case = {k: v for k, v in (load_case(GOLDEN / 'public_b' / 'case.npz') | change).items() if v is not None}
  np.savez(tmp_path / 'other.npz', **case)
  with pytest.raises(ConversionError, match=f'other.npz: .*{message}'):
    run_conversion(Request(src=source), out, 'keep', False, True, str(tmp_path / 'other.npz'))
  assert not out.exists() and capsys.readouterr().out == 'layout: Dynamic-LLaVA (the authors)\n'  # it is said at the start


def test_destination_that_cannot_be_written(source, tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  with pytest.raises(ConversionError, match='file: is a file'):
    convert(Request(src=source), tmp_path / 'file')
  with pytest.raises(ConversionError, match='cannot be written'):
    convert(Request(src=source), tmp_path / 'file' / 'below')

  def full(self, path, index, value):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(converting.StepWriter, 'write', full)
  with pytest.raises(ConversionError, match='cannot be written .*No space left on device'):
    convert(Request(src=source), tmp_path / 'filling')
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: collections.namedtuple('Usage', 'free')(10**6))
  with pytest.raises(ConversionError, match='needs 0.07 GB, its disk has 0.00 GB free'):
    convert(Request(src=source), tmp_path / 'full')
  assert {p.name for p in tmp_path.iterdir()} == {'case', 'file'}


def test_killed_conversion_leaves_nothing_that_looks_finished(source, out):
  """SIGKILL in the middle; the next attempt clears up and succeeds."""
  code = (
    'import os, signal, pathlib, sys\n'
    'from dynllava_jax.convert import convert as c\n'
    'from dynllava_jax.convert.source import Request\n'
    'real, count = c.StepWriter.write, []\n'
    'def write(self, *a):\n'
    '  real(self, *a); count.append(1)\n'
    '  if len(count) == 40: os.kill(os.getpid(), signal.SIGKILL)\n'
    'c.StepWriter.write = write\n'
    'c.convert(Request(src=pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))\n'
  )
  killed = subprocess.run([sys.executable, '-c', code, source, out], cwd=ROOT, env=os.environ, timeout=120)
  assert killed.returncode == -signal.SIGKILL
  assert not out.exists() and out.with_name('.out.partial').exists()
  convert(Request(src=source), out)
  assert checkpoint.load_params(out) and not out.with_name('.out.partial').exists()


def test_safetensors_header_of_any_length(source, out, tmp_path):
  """Writers pad the header to 8 bytes, but the format does not ask for it: the numbers may lie anywhere."""
  convert(Request(src=source), out)
  file = source / 'model.safetensors'
  content = file.read_bytes()
  (size,) = struct.unpack('<Q', content[:8])
  file.write_bytes(struct.pack('<Q', size + 3) + content[8 : 8 + size] + b'   ' + content[8 + size :])
  convert(Request(src=source), tmp_path / 'again')
  stored = [json.loads((folder / '0' / 'integrity.json').read_text())['files'] for folder in (out, tmp_path / 'again')]
  names = [m['file'] for m in json.loads((out / 'conversion.json').read_text())['tensors']]
  assert [stored[0][n] for n in names] == [stored[1][n] for n in names]
