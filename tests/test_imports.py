"""The import order of the package, and what may import what from outside."""

import ast
import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT

# A module imports only from its own row and the rows above it.
ORDER = [
  ('config', 'presets', 'files', 'paths', 'locks', 'display', 'progress', 'remote', 'lease', 'workspace', 'hub', 'arrangement'),
  ('sharding', 'ops'),
  ('cache', 'cached_arrays', 'pruned_cache'),
  ('methods',),
  ('models',),
  ('arguments', 'buckets', 'compaction', 'compilation', 'conversation', 'costs', 'sampling'),
  ('losses', 'generated', 'generate', 'sealing', 'stored', 'checkpoint'),
  ('data',),
  ('training', 'evals', 'convert'),
  ('controller',),
  ('serving',),
  ('api',),
  ('server',),
  ('hosts', 'command_line'),
]
RANK = {name: i for i, row in enumerate(ORDER) for name in row}
# Programs that live beside what they drive; nothing imports them, and they stand where the root scripts stand.
PROGRAMS = {
  ROOT / 'dynllava_jax' / name
  for name in (
    'data/prepare.py',
    'data/inspect.py',
    'data/verify.py',
    'evals/benchmarks/scienceqa_prompts.py',
    'batch.py',
    'bench.py',
    'calibrate.py',
    'chat.py',
    'held.py',
    'hello.py',
    'looked.py',
    'controller/__main__.py',
    'methods/__main__.py',
    'serve.py',
    'visualize.py',
  )
}
FILES = sorted((ROOT / 'dynllava_jax').rglob('*.py'))


def imported(path: pathlib.Path) -> set[str]:
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def part(path: pathlib.Path) -> str:
  relative = path.relative_to(ROOT / 'dynllava_jax')
  return relative.parts[0].removesuffix('.py')


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_upwards(path):
  if part(path) == '__init__' or path in PROGRAMS:
    return
  for name in imported(path):
    if name.startswith('dynllava_jax.'):
      target = name.split('.')[1]
      assert RANK[target] <= RANK[part(path)], f'{path.name} imports {name}, which stands below it'


def test_nothing_imports_a_program():
  names = {str(p.relative_to(ROOT).with_suffix('')).replace('/', '.') for p in PROGRAMS}
  assert not [path for path in FILES if imported(path) & names]


def test_data_needs_nothing_of_the_model():
  for path in set(FILES) - PROGRAMS:
    if part(path) == 'data':
      ours = {n.split('.')[1] for n in imported(path) if n.startswith('dynllava_jax.')}
      assert ours <= {'config', 'files', 'paths', 'locks', 'display', 'progress', 'remote', 'workspace', 'data'}, path


@pytest.mark.parametrize(
  'library, places',
  [('flax', {'models', 'sharding'}), ('torch', {'convert/readers'}), ('tensorflow', set()), ('fastapi', {'serve.py', 'server/'})],
)
def test_libraries_stay_in_their_places(library, places):
  users = {path for path in FILES if any(n.split('.')[0] == library for n in imported(path))}
  allowed = {path for path in FILES if any(str(path.relative_to(ROOT / 'dynllava_jax')).startswith(p) for p in places)}
  assert users <= allowed


def test_training_evaluation_and_safetensors_conversion_do_not_load_torch(tmp_path):
  code = (
    'import sys, pathlib\n'
    'class NoTorch:\n'
    '  def find_spec(self, name, *_):\n'
    '    if name.split(".")[0] == "torch": raise ImportError("torch was asked for")\n'
    'sys.meta_path.insert(0, NoTorch())\n'
    'import dynllava_jax.training.loop, dynllava_jax.evals.report, dynllava_jax.convert.convert as c\n'
    'from dynllava_jax.convert.source import Request\n'
    f'c.convert(Request(src=pathlib.Path("tests/golden/public_b/checkpoint")), pathlib.Path({str(tmp_path)!r}))'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, timeout=120)
