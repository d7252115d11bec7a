"""Token selection methods by name, one file each."""

from dynllava_jax.config import ConfigError
from dynllava_jax.methods import dynamic, everything, random, uniform
from dynllava_jax.methods.base import Selector, SelectorInputs

SELECTORS = {
  'all': everything.SELECTOR,
  'dynamic': dynamic.SELECTOR,
  'random': random.SELECTOR,
  'uniform': uniform.SELECTOR,
}


def get(name: str) -> Selector:
  """The selector called `name`; ConfigError with the known names otherwise."""
  if name not in SELECTORS:
    raise ConfigError(f'selector {name!r} is unknown; expected one of {", ".join(sorted(SELECTORS))}')
  return SELECTORS[name]


__all__ = ['SELECTORS', 'Selector', 'SelectorInputs', 'get']
