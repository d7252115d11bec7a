"""What of a model a run trains and what it leaves as it is: whole groups, or single parameters by their paths."""

import fnmatch
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dynllava_jax.config import ConfigError, TrainConfig
from dynllava_jax.config.groups import STORED_ALONG

Tree = dict[str, Any]


def split_frozen(params: Tree, held: tuple[str, ...], only: tuple[str, ...] = ()) -> tuple[Tree, Tree]:
  """(what is trained, what is left as it is), each a tree by group with the parameters that belong there.

  Args:
    params: in run form.
    held: groups, and paths of parameters, see `TrainConfig.frozen`.
    only: paths outside of which everything is held; () for none.
  """
  trained, frozen = {}, {}
  for group, tree in params.items():
    paths = [p for p in held if p.startswith(f'{group}/')]
    if group in held or group in STORED_ALONG:
      frozen[group] = tree
    elif not paths and not only:
      trained[group] = tree
    else:
      for path, leaf in _leaves(tree, (group,)):
        stays = any(matches(p, path) for p in paths) or bool(only and not any(matches(p, path) for p in only))
        _put(frozen if stays else trained, path, leaf)
  return trained, frozen


def matches(pattern: str, path: tuple[str, ...]) -> bool:
  """Whether a parameter lies at or below `pattern`, where `*` stands for any part, and `layers` for every stack of layers."""
  parts = pattern.split('/')
  named = [_stored(part) for part in path]
  return len(parts) <= len(named) and all(fnmatch.fnmatchcase(n, p) for n, p in zip(named, parts))


def _stored(part: str) -> str:
  """What a stack of layers is called in a path."""
  return re.sub(r'^stage_\d.*$', 'layers', part)


def joined(*trees: Tree) -> Tree:
  """The inverse of `split_frozen`: one tree of what several hold, none of it twice."""
  whole: Tree = {}
  for tree in trees:
    for name, value in tree.items():
      inside = isinstance(value, Mapping) and isinstance(whole.get(name), Mapping)
      whole[name] = joined(whole[name], value) if inside else value
  return whole


def check_paths(cfg: TrainConfig, params: Tree) -> None:
  """Raises ConfigError if a path of `frozen` or `only` names no parameter, or nothing is left to train; `params` in run form."""
  leaves = [path for path, _ in _leaves(params, ())]
  for field in ('frozen', 'only'):
    for pattern in getattr(cfg, field):
      if ('/' in pattern or field == 'only') and not any(matches(pattern, path) for path in leaves):
        some = ', '.join(
          sorted({'/'.join(map(_stored, path[:2])) for path in leaves if path[0] == pattern.split('/')[0]})
        ) or ', '.join(params)
        raise ConfigError(f'{field}: {pattern!r} names no parameter of this model; there are {some}')
  if not any(True for _ in _leaves(split_frozen(params, cfg.held, cfg.only)[0], ())):
    raise ConfigError(f'frozen: {", ".join(cfg.held)} leaves nothing to train')


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
  if not isinstance(tree, Mapping):
    yield path, tree
    return
  for name, value in tree.items():
    yield from _leaves(value, (*path, name))


def _put(tree: Tree, path: tuple[str, ...], leaf: Any) -> None:
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = leaf
