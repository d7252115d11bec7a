"""Arrays of a checkpoint step come in pieces, each block once, and no more than two of them are held besides what is made."""

import jax
import numpy as np
import pytest

from dynllava_jax import checkpoint, presets, sharding, stored
from dynllava_jax.arrangement import APART, STACKED
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import DENSE, MeshConfig, Stage
from dynllava_jax.generate import Generator
from dynllava_jax.models.params import cut_params
from dynllava_jax.training.saving import Saver

STAGES = (Stage(), Stage(start=1, selector='uniform', image_keep_rate=0.5), Stage(start=3, selector='uniform', image_keep_rate=0.2))


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tiny_params):
  directory = tmp_path_factory.mktemp('saved') / '..' / 'c'  # tensorstore takes no `..`
  checkpoint.write_info(directory, CheckpointInfo(model=presets.TINY))
  with Saver(directory) as saver:
    saver.save(1, {'params': tiny_params})
  return directory


@pytest.fixture
def one_layer_at_a_time(monkeypatch):
  monkeypatch.setattr(stored, 'PIECE', 1)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('stages', [None, DENSE, STAGES], ids=['whole', 'dense', 'three stages'])
@pytest.mark.parametrize('piece', [1, stored.PIECE])
def test_what_is_read_is_what_was_saved(folder, tiny_params, stages, piece, monkeypatch):
  monkeypatch.setattr(stored, 'PIECE', piece)
  same(checkpoint.load_params(folder, stages=stages), tiny_params if stages is None else cut_params(tiny_params, stages, APART))


def test_every_device_gets_its_part(folder, tiny_params, one_layer_at_a_time):
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
  loaded = checkpoint.load_params(folder, mesh, stages=STAGES)
  same(loaded, cut_params(tiny_params, STAGES))
  up = loaded['llama']['stage_1']['up']
  assert up.addressable_shards[0].data.size * 8 == up.size


def test_no_layer_is_read_or_held_twice(folder, tiny_params, one_layer_at_a_time, monkeypatch):
  """Counts rows that are read, and bytes of live arrays whenever a piece has been written."""
  rows, most = {}, [0]
  read, put = stored._read, stored._put

  def counted_read(piece, box):
    name = piece.array.kvstore.path
    rows[name] = rows.get(name, 0) + piece.stop - piece.start
    return read(piece, box)

  def measured_put(*args):
    result = put(*args)
    most[0] = max(most[0], sum(x.nbytes for x in jax.live_arrays()))
    return result

  monkeypatch.setattr(stored, '_read', counted_read)
  monkeypatch.setattr(stored, '_put', measured_put)
  before = sum(x.nbytes for x in jax.live_arrays())
  params = checkpoint.load_params(folder, stages=STAGES)
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  assert sum(rows.values()) == sum(x.shape[0] for x in jax.tree.leaves(tiny_params))
  assert most[0] - before <= 1.05 * size
  generator = Generator(presets.TINY, STAGES, params, max_new_tokens=2, eos_id=None)
  assert generator.params is params
  assert sum(x.nbytes for x in jax.live_arrays()) - before <= 1.05 * size


@pytest.mark.parametrize('lie', [STACKED, APART], ids=['stacked', 'apart'])
def test_parameters_cut_for_other_stages_are_refused(tiny_params, lie):
  cut = cut_params(tiny_params, STAGES, lie)
  with pytest.raises(ValueError, match=r'params: cut into \[1, 2, 1\] layers, but stages wants \[4\]'):
    Generator(presets.TINY, DENSE, cut, max_new_tokens=2, eos_id=None)
