"""Conversion and export: killed, on full disks, from and to damaged files, twice at once."""

import shutil

import pytest
from fault_driver import GROSS, KINDS, damage_all, files_of, kill_all_along, permissions, refuse, start_twice, starve, undisturbed
from fault_programs import SOURCE, conversion, converted, export, exported
from fault_tally import Tally

pytest_plugins = ('fault_fixtures',)
pytestmark = pytest.mark.faults
CONFIGS = tuple(k for k in GROSS if k != 'deleted')  # some may be missing
CONVERSION, EXPORT = Tally('Conversion'), Tally('Export')


@pytest.fixture(scope='module')
def converting(nursery, tmp_path_factory):
  return undisturbed(nursery, conversion(), tmp_path_factory.mktemp('conversion'))


@pytest.fixture(scope='module')
def exporting(nursery, converting, tmp_path_factory):
  return undisturbed(nursery, export(converting[0]), tmp_path_factory.mktemp('export'))


@pytest.fixture
def both(converting, exporting):
  """(program, its counts, the folder of an undisturbed run and how it ended) of either direction."""
  return (conversion(), CONVERSION, converting), (export(converting[0]), EXPORT, exporting)


def test_kills(nursery, both, tmp_path):
  for program, tally, whole in both:
    kill_all_along(nursery, program, tally, tmp_path / tally.program, whole, 30)


def test_full_disks(nursery, both, tmp_path):
  for program, tally, whole in both:
    (tmp_path / tally.program).mkdir()
    expected = program.result(whole[0])
    starve(nursery, program, tally, tmp_path / tally.program, expected, (0, 100, 3000, 20_000, 10**6), (100, 66_000))


def test_two_at_once(nursery, both, tmp_path):
  for program, tally, whole in both:
    start_twice(nursery, program, tally, tmp_path / tally.program, program.result(whole[0]), whole[1].events - 4)


def test_damaged_sources(nursery, exporting, tmp_path):
  """An export, which carries digests of its tensors; its config has none, and a letter in it may be meant."""
  again = nursery.run(conversion(exporting[0]).words(tmp_path / 'expected'))
  assert again.code == 0, again.text
  without_report = lambda folder: {n: c for n, c in converted(folder).items() if n != 'conversion.json'}
  files = files_of(exporting[0], GROSS, lambda name: KINDS if name.endswith('.safetensors') else CONFIGS)
  command = lambda folder: conversion(folder).words(folder.parent / 'dst')
  arguments = (command, lambda folder: without_report(folder.parent / 'dst'), without_report(tmp_path / 'expected'))
  names = lambda name: (name, f'{name.partition("/")[0]}: no weights found')
  row = lambda name: 'a tensor of the source' if name.endswith('.safetensors') else None
  damage_all(nursery, CONVERSION, exporting[0], tmp_path / 'scratch', files, 50, *arguments, names, row=row)


def test_damaged_checkpoints(nursery, converting, exporting, tmp_path):
  command = lambda folder: export(folder).words(folder.parent / 'dst')
  names = lambda name: (name, 'integrity.json') if name.startswith('0/') else (name,)
  arguments = (command, lambda folder: exported(folder.parent / 'dst'), exported(exporting[0]), names)
  first = ('model.json', '0/integrity.json', '0/_CHECKPOINT_METADATA')
  files, row = files_of(converting[0], KINDS), lambda name: 'the checkpoint is damaged'
  damage_all(nursery, EXPORT, converting[0], tmp_path / 'scratch', files, 20, *arguments, first=first, row=row)


def test_permissions(nursery, converting, tmp_path):
  ours = shutil.copytree(converting[0], tmp_path / 'ours')
  (tmp_path / 'dst').mkdir()
  with permissions(tmp_path / 'dst', 0o500):
    refuse(nursery, CONVERSION, conversion().words(tmp_path / 'dst' / 'x'), 'dst', 'ermission denied', plain=1)
    refuse(nursery, EXPORT, export(ours).words(tmp_path / 'dst' / 'x'), 'dst', 'ermission denied', plain=1)
  source = shutil.copytree(SOURCE, tmp_path / 'source')
  for name in ('config.json', 'model.safetensors'):
    with permissions(source / name, 0):
      refuse(nursery, CONVERSION, conversion(source).words(tmp_path / 'y'), name, 'ermission denied', plain=1)
  for name in ('model.json', '0/integrity.json'):
    with permissions(ours / name, 0):
      refuse(nursery, EXPORT, export(ours).words(tmp_path / 'y'), name, 'ermission denied', plain=1)


def test_counts():
  for tally in (CONVERSION, EXPORT):
    tally.report()


def test_messages():
  CONVERSION.check_messages()
  EXPORT.check_messages()
