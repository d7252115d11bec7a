"""docs/architecture.md names every file of the package, and no other."""

import re

from conftest import ROOT


def test_every_file_has_its_sentence():
  folder, named = '', {}
  for line in (ROOT / 'docs/architecture.md').read_text().splitlines():
    if re.fullmatch(r'dynllava_jax/[\w/]*', line):
      folder = line
    elif found := re.match(r'  (\w+\.py)\s+(.*)', line):
      named[folder + found[1]] = found[2]
  package = {str(p.relative_to(ROOT)): p for p in (ROOT / 'dynllava_jax').rglob('*.py')}
  missing = {n for n in package.keys() - named.keys() if not n.endswith('__init__.py')}
  assert not missing, f'docs/architecture.md: add a line for {sorted(missing)}'
  assert not named.keys() - package.keys(), f'docs/architecture.md: no such file: {sorted(named.keys() - package.keys())}'
  assert all(named.values()), 'docs/architecture.md: a file without a sentence'
