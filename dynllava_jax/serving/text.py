"""Token ids to text while they come: pieces that no later token changes, and an end at a stop string."""

from collections.abc import Sequence

from dynllava_jax.data.tokenizer import Tokenizer

UNFINISHED = '\ufffd'  # what an incomplete character is decoded to


class Text:
  """The text of one answer. `tokens`: its ids so far."""

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
    self.tokens: list[int] = []
    self._tokenizer, self._stop = tokenizer, tuple(stop)
    self._cut: str | None = None  # the whole text once a stop string was met
    self._given = ''

  def push(self, token: int) -> bool:
    """Adds a token; whether a stop string is complete with it, after which nothing may be added."""
    self.tokens.append(token)
    if self._stop:
      text = self._tokenizer.decode(self.tokens)
      found = [at for at in map(text.find, self._stop) if at >= 0]
      if found:
        self._cut = text[: min(found)].rstrip()
    return self._cut is not None

  @property
  def text(self) -> str:
    """The answer so far."""
    return self._tokenizer.decode(self.tokens) if self._cut is None else self._cut

  def piece(self, last: bool = False) -> str:
    """What is certain of the text and was not given yet; `last`: all that is left."""
    text = self.text
    if not last and self._cut is None:
      text = text.rstrip(UNFINISHED)
      held = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
      text = text[: len(text) - held].rstrip() if held else text
    if not text.startswith(self._given):
      return ''
    piece, self._given = text[len(self._given) :], text
    return piece
