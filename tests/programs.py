"""Modules of programs, for tests of the functions in them."""

import importlib
from types import ModuleType

from absl import flags


def program(name: str) -> ModuleType:
  """`dynllava_jax.NAME` without its flags: programs have flags of the same names, and one process can define each once."""
  before = set(flags.FLAGS)
  module = importlib.import_module(f'dynllava_jax.{name}')
  by_module = flags.FLAGS.flags_by_module_dict()
  own = {flag.name for where, defined in by_module.items() if where.startswith('dynllava_jax') for flag in defined}
  flags.FLAGS.remove_flag_values(own - before)
  return module
