"""Modules of programs, for tests of the functions in them."""

import importlib
from types import ModuleType

from absl import flags


def program(name: str) -> ModuleType:
  """`dynllava_jax.NAME`, its flags defined apart: programs have flags of the same names, and a process can have each once."""
  others = _ours()
  flags.FLAGS.remove_flag_values(others)
  try:
    return importlib.import_module(f'dynllava_jax.{name}')
  finally:
    flags.FLAGS.remove_flag_values(_ours())
    for name, flag in others.items():
      flags.FLAGS[name] = flag


def _ours() -> dict[str, flags.Flag]:
  """The flags that there are besides absl's own."""
  by_module = flags.FLAGS.flags_by_module_dict()
  absl = {flag.name for where, defined in by_module.items() if where.startswith('absl') for flag in defined}
  return {name: flags.FLAGS[name] for name in flags.FLAGS if name not in absl}
