"""Dynamic-LLaVA (arXiv 2412.00876) in JAX/Flax: static shapes, batched, sharded over meshes.

    import dynllava_jax as dl

    model = dl.load('runs/digits/dynamic/checkpoints')
    model.answer('scene.png', 'How many digits are there?')

What is named in `__all__` is the public surface, described in docs/inference.md; it is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dynllava_jax.api import Model, load
  from dynllava_jax.config import Piece, Stage
  from dynllava_jax.serving.chat import Chat
  from dynllava_jax.serving.request import Options, Reply

_PLACES = {
  'Chat': 'serving.chat',
  'Model': 'api',
  'Options': 'serving.request',
  'Piece': 'config',
  'Reply': 'serving.request',
  'Stage': 'config',
  'load': 'api',
}
__all__ = ['Chat', 'Model', 'Options', 'Piece', 'Reply', 'Stage', 'load']


def __getattr__(name: str) -> Any:
  if name not in _PLACES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = getattr(importlib.import_module(f'{__name__}.{_PLACES[name]}'), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
