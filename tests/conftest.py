"""Eight fake CPU devices, and the fixtures that several files share. Must run before jax starts."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ['DYNLLAVA_JAX_COMPILATION_CACHE'] = 'off'  # a test depends on nothing that another run left

import pathlib

import jax
import pytest
import stores
from absl import flags

from dynllava_jax import paths, presets, remote, sharding
from dynllava_jax.models.params import init_params

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / 'tests' / 'golden'
CASES = ('public_a', 'public_b')

for name in [name for name in os.environ if name.lower().endswith('_proxy')]:
  del os.environ[name]  # hermetic: stores and hosts of the tests are on this machine, and jax warns of a proxy in a line of its own

jax.config.update('jax_disable_most_optimizations', True)  # tiny programs: compiling them is what takes the time

if not flags.FLAGS.is_parsed():
  flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for absl flags


LONGEST = ('test_training.py', 'test_parity.py', 'test_invariants.py', 'test_command_line.py')  # first, so that none is the last


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope='session')
def tiny_params():
  """Random parameters of `presets.TINY` in checkpoint form."""
  return sharding.unboxed(init_params(presets.TINY, jax.random.key(0)))


@pytest.fixture(scope='session')
def gating_params(tiny_params):
  """The same with predictors of enough spread that about half of the generated tokens are dropped."""
  scaled = jax.tree.map(lambda x: x, tiny_params)
  scaled['text_predictor']['head']['linear_2']['kernel'] = scaled['text_predictor']['head']['linear_2']['kernel'] * 4
  return scaled


@pytest.fixture(scope='session', params=['gs', 's3'])
def bucket(request, tmp_path_factory):
  """The URL of an empty bucket in a store on this machine; command lines and this process find it."""
  pytest.importorskip({'gs': 'gcp_storage_emulator', 's3': 'moto'}[request.param])
  cache = {paths.CACHE: str(tmp_path_factory.mktemp('cache'))}
  with stores.running(request.param) as env, pytest.MonkeyPatch.context() as patch:
    for name, value in (env | cache).items():
      patch.setenv(name, value)
    remote.filesystem.cache_clear()
    yield f'{request.param}://{stores.BUCKET}'
  remote.filesystem.cache_clear()


@pytest.fixture
def cloud_folder(bucket, request):
  """A folder of the store for one test."""
  return f'{bucket}/{os.getpid()}-{request.node.name.partition("[")[0]}'
