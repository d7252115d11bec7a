"""The same over gs://, on the emulator of tests/cloud: killed, damaged, twice at once."""

import dataclasses
import shutil

import fault_programs
import pytest
from fault_driver import KINDS, Nursery, damage_all, files_of, kill_all_along, refuse, start_twice, undisturbed
from fault_programs import evaluated, exported, make_samples, tiny_config, trained
from fault_tally import Tally

from dynllava_jax import lease, paths, remote

pytestmark = [pytest.mark.faults, pytest.mark.parametrize('bucket', ['gs'], indirect=True)]
STORES = Tally('Object stores')
OBJECTS = tuple(k for k in KINDS if not k.startswith('a ') and k != 'huge')  # what an object can be


@pytest.fixture(scope='module')
def nursery(bucket, tmp_path_factory):
  made = Nursery(tmp_path_factory.mktemp('compiled'))
  yield made
  made.close()


class There:
  """Places below one folder here, and their namesakes in the store."""

  def __init__(self, bucket, root):
    self.bucket, self.root = bucket, root

  def url(self, place):
    return f'{self.bucket}/{self.root.name}/{place.relative_to(self.root).as_posix().replace(" ", "_")}'

  def fetched(self, place):
    return remote.fetched(paths.given(self.url(place), 'x'), set)

  def put(self, place):
    """Makes the store what a folder here is."""
    given = paths.given(self.url(place), 'x')
    fs, url = remote.store(given)
    for name in remote.listing(given):
      fs.rm_file(f'{url}/{name}')
    for file in (p for p in place.rglob('*') if p.is_file()):
      remote.write(given / file.relative_to(place).as_posix(), file.read_bytes())

  def program(self, program, progress=None):
    """A program whose folder is in the store. What is watched is where it lies here meanwhile."""
    return dataclasses.replace(
      program,
      words=lambda place: program.words(self.url(place)),
      result=lambda place: program.result(self.fetched(place)),
      progress=lambda place: progress(self.fetched(place)) if progress else 0,
      where=lambda place: paths.cache() / 'work',
    )


@pytest.fixture
def there(bucket, tmp_path):
  return There(bucket, tmp_path)


def of_run(workdir):
  """As here, but how many older steps were uploaded before a kill depends on the moment."""
  return {name: value for name, value in trained(workdir).items() if name != 'steps'}


def whole_steps(workdir):
  """The newest step that the store shows as whole."""
  folder = workdir / 'checkpoints'
  return max((int(p.parent.name) for p in folder.glob('*/integrity.json')), default=0)


def test_training(nursery, there, tmp_path):
  training = dataclasses.replace(fault_programs.training(tiny_config(tmp_path / 'config')), result=of_run)
  program = there.program(training, whole_steps)
  whole = undisturbed(nursery, program, tmp_path)
  kill_all_along(nursery, program, STORES, tmp_path, whole, 4, each=4, period=0.2)
  start_twice(nursery, program, STORES, tmp_path, program.result(whole[0]), whole[1].events, times=1)
  here = shutil.copytree(there.fetched(whole[0]), tmp_path / 'here')
  plain = lambda name: () if name.startswith(('tensorboard', 'evals', 'metrics', 'config.json')) else OBJECTS
  names = lambda name: (name, '/'.join(name.split('/')[:2])) if name.count('/') > 1 else (name,)
  arguments = (program.words, program.result, of_run(here), names, there.put)
  damage_all(nursery, STORES, here, tmp_path / 'scratch', files_of(here, OBJECTS, plain), 8, *arguments)


def test_evaluation(nursery, there, tmp_path):
  config = tiny_config(tmp_path / 'config')
  run = tmp_path / 'run'
  done = nursery.run((*there.program(fault_programs.training(config)).words(run), '--config.steps=1'))
  assert done.code == 0, done.text
  program = there.program(fault_programs.evaluation(config, there.url(run / 'checkpoints')), fault_programs.answered)
  whole = undisturbed(nursery, program, tmp_path)
  kill_all_along(nursery, program, STORES, tmp_path, whole, 3, each=3, period=0.2)
  start_twice(nursery, program, STORES, tmp_path, program.result(whole[0]), whole[1].events, times=1)
  here = shutil.copytree(there.fetched(whole[0]), tmp_path / 'here')
  files = files_of(here, OBJECTS, lambda name: None if name.startswith('answers/') else ())
  damage_all(
    nursery, STORES, here, tmp_path / 'scratch', files, 6, program.words, program.result, evaluated(here), arrive=there.put
  )


def test_preparation(nursery, there, tmp_path):
  source = make_samples(tmp_path / 'source')
  there.put(source)
  # Where the source lies is written down; that it lies in a store is all that matters here.
  program = there.program(fault_programs.preparation(there.url(source)))
  whole = undisturbed(nursery, program, tmp_path)
  kill_all_along(nursery, program, STORES, tmp_path, whole, 9, each=5, period=0.2)
  start_twice(nursery, program, STORES, tmp_path, program.result(whole[0]), whole[1].events, times=1)
  here = shutil.copytree(there.fetched(whole[0]), tmp_path / 'here')
  command = lambda folder: ('-m', 'dynllava_jax.data.verify', f'--path={there.url(folder)}', '--processes=1')
  files = files_of(here, OBJECTS, lambda name: () if name.startswith(('report', 'index')) or name.endswith('.png') else None)
  names = lambda name: (name, 'prepared.json')
  arguments = (command, fault_programs.tree, fault_programs.tree(here), names, there.put)
  damage_all(nursery, STORES, here, tmp_path / 'scratch', files, 10, *arguments)


def test_conversion_and_export(nursery, there, tmp_path):
  conversion = there.program(fault_programs.conversion())
  whole = undisturbed(nursery, conversion, tmp_path / 'c')
  kill_all_along(nursery, conversion, STORES, tmp_path / 'c', whole, 2, each=2)
  start_twice(nursery, conversion, STORES, tmp_path / 'c', conversion.result(whole[0]), whole[1].events, times=1)
  export = there.program(fault_programs.export(there.url(whole[0])))
  written = undisturbed(nursery, export, tmp_path / 'e')
  kill_all_along(nursery, export, STORES, tmp_path / 'e', written, 2, each=2)
  here = shutil.copytree(there.fetched(whole[0]), tmp_path / 'here')
  command = lambda folder: fault_programs.export(there.url(folder)).words(folder.parent / 'dst')
  names = lambda name: (name, 'integrity.json') if name.startswith('0/') else (name,)
  arguments = (command, lambda folder: exported(folder.parent / 'dst'), export.result(written[0]), names, there.put)
  damage_all(nursery, STORES, here, tmp_path / 'scratch', files_of(here, OBJECTS), 6, *arguments)
  remote.write(paths.given(there.url(whole[0]), 'x') / remote.UPLOADING, b'[]')
  refuse(nursery, STORES, export.words(tmp_path / 'e' / 'refused'), 'its upload was interrupted', row='an upload of a')


def test_nothing_is_left_of_a_lease_or_of_work(bucket):
  assert not [name for name in remote.listing(paths.given(bucket, 'x')) if name.rpartition('/')[2] == lease.LEASE]
  assert not list((paths.cache() / 'work').glob('*'))


def test_counts(bucket):
  STORES.report()


def test_messages(bucket):
  STORES.check_messages()
