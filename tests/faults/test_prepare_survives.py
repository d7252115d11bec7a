"""Preparation: killed, on full disks, from damaged sources, over damaged leftovers, twice at once."""

import shutil

import pytest
from fault_driver import (
  GROSS,
  KINDS,
  damage_all,
  files_of,
  kill_all_along,
  permissions,
  refuse,
  start_twice,
  starve,
  tree,
  undisturbed,
)
from fault_programs import make_samples, preparation
from fault_tally import Tally

pytest_plugins = ('fault_fixtures',)
pytestmark = pytest.mark.faults
PREPARATION = Tally('Preparation')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return make_samples(tmp_path_factory.mktemp('data') / 'source')


@pytest.fixture(scope='module')
def whole(nursery, source, tmp_path_factory):
  folder = tmp_path_factory.mktemp('preparation')
  return folder / 'whole', undisturbed(nursery, preparation(source), folder)[1]


def test_killed_preparations(nursery, source, whole, tmp_path):
  kill_all_along(nursery, preparation(source), PREPARATION, tmp_path, whole, 66)


def test_damaged_sources(nursery, source, tmp_path, whole):
  """No digest tells of them, so that a letter may be meant; what cannot be used is named in the report or the message."""
  command = lambda folder: preparation(folder).words(folder.parent / 'out')

  def result(folder):
    shutil.rmtree(folder.parent / 'out', ignore_errors=True)

  files = {'mix.json': GROSS, '0.png': GROSS, 'tok/tokenizer.model': GROSS, 'tok/tokenizer_config.json': GROSS}
  names = lambda name: (name.rpartition('/')[2], 'holds no tokenizer' if name.startswith('tok') else 'samples cannot be used')
  row = lambda name: 'a picture is damaged' if name.endswith('.png') else None
  damage_all(nursery, PREPARATION, source, tmp_path / 'scratch', files, 40, command, result, None, names, row=row)


def test_damaged_leftovers(nursery, source, whole, tmp_path):
  """What a killed preparation left may be damaged when it goes on."""
  left = tmp_path / 'left' / 'out'
  program = preparation(source)
  done = nursery.run(program.words(left), watch=left, kill_at=int(0.7 * whole[1].events))
  assert done.code == -9 and len(program.progress(left)) == 4
  names = lambda name: (name, name.removeprefix('.unfinished/').removesuffix('.json'))  # a note is about a shard
  arguments = (program.words, tree, tree(whole[0]), names)
  damage_all(nursery, PREPARATION, left, tmp_path / 'scratch', files_of(left, KINDS), 60, *arguments)


def test_damaged_folders(nursery, whole, tmp_path):
  """Of a finished folder every byte that training reads is compared, if asked for; opening it: tests/data/test_damage.py."""
  files = files_of(whole[0], KINDS, lambda name: () if name.startswith(('report', 'index')) or name.endswith('.png') else None)
  command = lambda folder: ('-m', 'dynllava_jax.data.verify', f'--path={folder}', '--processes=1')
  names, row = lambda name: (name, 'prepared.json'), lambda name: 'a file of the folder'
  damage_all(nursery, PREPARATION, whole[0], tmp_path / 'scratch', files, 60, command, tree, tree(whole[0]), names, row=row)


def test_full_disks(nursery, source, whole, tmp_path):
  starve(nursery, preparation(source), PREPARATION, tmp_path, tree(whole[0]), (0, 100, 900, 5000, 70_000), (8, 100, 300))


def test_two_at_once(nursery, source, whole, tmp_path):
  start_twice(nursery, preparation(source), PREPARATION, tmp_path, tree(whole[0]), whole[1].events)


def test_permissions(nursery, source, tmp_path):
  copy = shutil.copytree(source, tmp_path / 'copy')
  program = preparation(copy)
  for name in ('mix.json', 'tok/tokenizer.model'):
    with permissions(copy / name, 0):
      refuse(nursery, PREPARATION, program.words(tmp_path / 'out'), name, 'ermission denied', plain=1)
  (tmp_path / 'dst').mkdir()
  with permissions(tmp_path / 'dst', 0o500):
    refuse(nursery, PREPARATION, program.words(tmp_path / 'dst' / 'x'), 'dst', 'ermission denied', plain=1)
  with permissions(copy / '0.png', 0):
    done = PREPARATION.check(nursery.run(program.words(tmp_path / 'z'), plain=1), 'a picture that may not be read')
    assert done.code == 1 and 'samples cannot be used' in done.out


def test_counts():
  PREPARATION.report()


def test_messages():
  PREPARATION.check_messages()
