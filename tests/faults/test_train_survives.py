"""Training: killed, on full disks, with damaged files of its own, twice at once."""

import random
import shutil

import fault_programs
import pytest
from fault_driver import (
  GROSS,
  KINDS,
  damage_all,
  files_of,
  flip,
  kill_all_along,
  permissions,
  refuse,
  start_twice,
  starve,
  undisturbed,
)
from fault_programs import tiny_config, trained
from fault_tally import Tally

pytest_plugins = ('fault_fixtures',)
pytestmark = pytest.mark.faults
TRAINING = Tally('Training')


@pytest.fixture(scope='module')
def training(tmp_path_factory):
  return fault_programs.training(tiny_config(tmp_path_factory.mktemp('config')))


@pytest.fixture(scope='module')
def whole(nursery, training, tmp_path_factory):
  folder = tmp_path_factory.mktemp('training')
  return folder / 'whole', undisturbed(nursery, training, folder)[1]


def test_killed_runs(nursery, training, whole, tmp_path):
  kill_all_along(nursery, training, TRAINING, tmp_path, whole, 24, each=6)


def test_damaged_files(nursery, training, whole, tmp_path):
  """All files but those that are only looked at. Those without digest may hold other numbers: metrics.jsonl, config.json."""
  shown = lambda name: name.startswith(('tensorboard', 'evals'))
  plain = lambda name: () if shown(name) else GROSS if name in ('metrics.jsonl', 'config.json') else None

  def names(name):
    parts = name.split('/')
    return (name, '/'.join(parts[:2])) if len(parts) > 2 else (name,)

  def row(name):
    known = {'run.json': '`run.json`', 'metrics.jsonl': '`metrics.jsonl`', 'checkpoints/model.json': '`model.json`'}
    return 'the newest step' if name.startswith('checkpoints/5/') else known.get(name)

  files = files_of(whole[0], KINDS, plain)
  first = ('run.json', 'metrics.jsonl', 'checkpoints/model.json')
  arguments = (training.words, trained, trained(whole[0]), names)
  damage_all(
    nursery, TRAINING, whole[0], tmp_path / 'scratch', files, 35, *arguments, told=('steps', 'metrics'), first=first, row=row
  )


def test_full_disks(nursery, training, whole, tmp_path):
  starve(nursery, training, TRAINING, tmp_path, trained(whole[0]), (0, 700, 12_000), (8, 500))


def test_two_at_once(nursery, training, whole, tmp_path):
  start_twice(nursery, training, TRAINING, tmp_path, trained(whole[0]), whole[1].events)


def test_permissions(nursery, training, whole, tmp_path):
  place, unwritable = tmp_path / 'w', 'the workdir cannot be written'
  assert nursery.run(training.words(place)).code == 0
  with permissions(tmp_path, 0o500):
    refuse(nursery, TRAINING, training.words(tmp_path / 'x'), 'cannot be written', 'ermission denied', row=unwritable, plain=1)
  with permissions(place, 0o500):
    refuse(nursery, TRAINING, training.words(place), 'cannot be written', 'ermission denied', row=unwritable, plain=1)
  for name in ('run.json', 'checkpoints'):
    with permissions(place / name, 0):
      refuse(nursery, TRAINING, training.words(place), name, 'ermission denied', plain=1)
  with permissions(place / 'checkpoints', 0o500):
    flip(max((place / 'checkpoints' / '5').rglob('*'), key=lambda p: p.stat().st_size), random.Random(0))
    refuse(nursery, TRAINING, training.words(place), 'ermission denied', plain=1)
  done = nursery.run(training.words(place))
  assert done.code == 0 and trained(place) == trained(whole[0])


def test_nothing_left(nursery, training, whole, tmp_path):
  place = shutil.copytree(whole[0], tmp_path / 'w')
  shutil.rmtree(place / 'checkpoints')
  refuse(nursery, TRAINING, training.words(place), 'no step is left', row='no step is left')


def test_counts():
  TRAINING.report()


def test_messages():
  TRAINING.check_messages()
