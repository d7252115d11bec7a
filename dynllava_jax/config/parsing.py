"""Building configuration strictly: a ConfigDict, or plain dicts, become frozen dataclasses.

Unknown keys, wrong types and impossible values are refused with one readable line (`ConfigError`).
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from dynllava_jax import paths

Path = Annotated[str, 'path']  # a field that is a path, or '' for none: checked and `~` expanded when it is read, see `paths`

# Settings that only one method knows the meaning of, as sorted (name, value) pairs, so that they can be hashed. In a config
# they are a group of settings; `dynllava_jax.methods` checks them against the method's own dataclass.
Options = tuple[tuple[str, Any], ...]


class ConfigError(ValueError):
  """A configuration that cannot be run; the message names the key, what was found and what to do."""


def require(ok: bool, message: str) -> None:
  """Raises ConfigError with `message` unless `ok`."""
  if not ok:
    raise ConfigError(message)


def require_positive(group: Any, where: str, *names: str) -> None:
  """Raises ConfigError unless all the named fields of `group` are positive."""
  for name in names:
    value = getattr(group, name)
    require(value > 0, f'{where}{name} is {value}, expected a positive number')


def require_seed(seed: int) -> None:
  """Raises ConfigError unless `seed` fits 32 bits."""
  require(0 <= seed < 2**32, f'seed is {seed}, expected 0 to {2**32 - 1}')


def from_config_dict(cls: type, config: Any, where: str = 'config') -> Any:
  """Builds dataclass `cls` from a ConfigDict or dict, strictly and recursively.

  Raises:
    ConfigError: unknown key (with the nearest known one), missing key, wrong type or impossible value.
  """
  require(hasattr(config, 'keys'), f'{where}: expected a group of settings, got {config!r}')
  hints = typing.get_type_hints(cls, include_extras=True)
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in config.keys():
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=1)
      hint = f'; did you mean {near[0]!r}?' if near else f'; known keys: {", ".join(fields)}'
      raise ConfigError(f'{where}.{key}: unknown key{hint}')
  values = {k: _typed(hints[k], config[k], f'{where}.{k}') for k in config.keys()}
  needed = [n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
  missing = [n for n in needed if n not in values]
  require(not missing, f'{where}: missing {", ".join(missing)}')
  try:
    return cls(**values)
  except ConfigError as e:
    raise e if str(e).startswith('config') else ConfigError(f'{where}: {e}') from None


def _typed(hint: Any, value: Any, where: str) -> Any:
  """`value` checked against, and where harmless converted to, the annotation `hint`."""
  if hint == Path:
    try:
      return _typed(str, value, where) and paths.expanded(value, where)
    except paths.PathError as e:
      raise ConfigError(str(e)) from None
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    if value is None:
      return None
    return _typed(next(a for a in args if a is not type(None)), value, where)
  if hasattr(hint, 'from_plain'):
    return hint.from_plain(value, where)
  if hint == Options:
    require(hasattr(value, 'keys'), f'{where}: expected a group of settings, got {value!r}')
    return as_options(value)
  if dataclasses.is_dataclass(hint):
    return from_config_dict(hint, value, where)
  if origin is tuple:
    require(isinstance(value, (list, tuple)), f'{where}: expected a list, got {value!r}')
    return tuple(_typed(args[0], v, f'{where}[{i}]') for i, v in enumerate(value))
  if origin is Mapping:
    require(hasattr(value, 'keys'), f'{where}: expected a group of settings, got {value!r}')
    return {k: _typed(args[1], value[k], f'{where}.{k}') for k in value.keys()}
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    try:
      value = float(value)
    except OverflowError:
      raise ConfigError(f'{where}: expected a finite number, got one of {len(str(value))} digits') from None
  wrong = not isinstance(value, hint) or (hint is int and isinstance(value, bool))
  require(not wrong, f'{where}: expected {hint.__name__}, got {value!r} ({type(value).__name__})')
  require(hint is not float or math.isfinite(value), f'{where}: expected a finite number, got {value}')
  return value


def to_dict(config: Any) -> dict[str, Any]:
  """The plain (JSON-ready) form of a dataclass built by `from_config_dict`."""
  hints = typing.get_type_hints(type(config))
  values = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
  return {name: dict(value) if hints[name] == Options else _plain(value) for name, value in values}


def _plain(value: Any) -> Any:
  if hasattr(value, 'to_plain'):
    return value.to_plain()
  if dataclasses.is_dataclass(value):
    return to_dict(value)
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def as_options(value: Any) -> Options:
  """Settings of a method, a group (`keys()` and items) or pairs already, as sorted pairs; lists become tuples."""
  pairs = [(k, value[k]) for k in value.keys()] if hasattr(value, 'keys') else value
  named = lambda p: isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str)
  require(isinstance(pairs, (tuple, list)) and all(map(named, pairs)), f'options are {value!r}, expected settings by their names')
  return tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in pairs))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
  """(dotted key, value before, value now) of each setting that differs between two plain configs, in the order of `now`."""
  for key in now:
    old, new = before.get(key), now[key]
    if isinstance(old, Mapping) and isinstance(new, Mapping):
      yield from ((f'{key}.{inner}', *values) for inner, *values in differences(old, new))
    elif old != new:
      yield key, old, new


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
  """The first of `differences`; None if there is none."""
  return next(differences(before, now), None)
