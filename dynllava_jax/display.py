"""Text for people's eyes: nothing that a file or a name holds may steer a terminal or be taken for markup.

Ids, paths and texts of data come from anywhere. Characters that move the cursor, change colours, turn the direction of writing or
begin a new line are shown as escapes.
"""

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from dynllava_jax import paths

# C0 and C1 control characters, halves of surrogate pairs, line and paragraph separators, marks and switches of the writing
# direction, invisible operators, the byte order mark, tags.
UNSAFE = re.compile(
  '[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]'
)


def printable(text: Any, *, lines: bool = False) -> str:
  """Text with every character that is more than a sign on the screen shown as an escape: `\\x1b`, `\\u202e`.

  Args:
    text: anything; `str` is taken of it.
    lines: line breaks stay, for a message of several lines.
  """
  return UNSAFE.sub(lambda found: found[0] if lines and found[0] == '\n' else _escaped(found[0]), paths.named(text))


def _escaped(character: str) -> str:
  return ascii(character)[1:-1]


class Terminal(Console):
  """A rich console that prints what it is given: no markup, no emoji codes, no control characters, no wrapped lines."""

  def __init__(self, **options: Any):
    super().__init__(**dict(soft_wrap=True, markup=False, emoji=False, highlight=False) | options)

  def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
    """Segments of anything printed; rich's own control segments pass."""
    for segment in super().render(renderable, options):
      yield segment if segment.control else segment._replace(text=printable(segment.text, lines=True))
