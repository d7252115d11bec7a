"""A store of each scheme for all tests of this folder, and a cache of their own."""

import os

import pytest
import stores

from dynllava_jax import paths, remote


@pytest.fixture(scope='session', params=['gs', 's3'])
def store(request, tmp_path_factory):
  """The URL of an empty bucket; command lines and this process find it."""
  pytest.importorskip({'gs': 'gcp_storage_emulator', 's3': 'moto'}[request.param])
  with stores.running(request.param) as env, pytest.MonkeyPatch.context() as patch:
    for name, value in (env | {paths.CACHE: str(tmp_path_factory.mktemp('cache')), 'NO_PROXY': '127.0.0.1'}).items():
      patch.setenv(name, value)
    remote.filesystem.cache_clear()
    yield f'{request.param}://{stores.BUCKET}'
    remote.filesystem.cache_clear()


@pytest.fixture
def folder(store, request):
  """A folder of the store for one test."""
  return f'{store}/{os.getpid()}-{request.node.name.partition("[")[0]}'
