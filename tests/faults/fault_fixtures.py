"""The fixture that the fault tests share."""

import pytest
from fault_driver import Nursery


@pytest.fixture(scope='module')
def nursery(tmp_path_factory):
  """Starts commands for the tests of one file."""
  made = Nursery(tmp_path_factory.mktemp('compiled'))
  yield made
  made.close()
