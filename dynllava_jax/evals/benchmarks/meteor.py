"""METEOR as NLTK computes it for one reference, with its parameters (alpha 0.9, beta 3, gamma 0.5).

It needs two data packages of NLTK: `wordnet` for synonyms and `punkt_tab` to find sentence ends. Without WordNet only exact and
stem matches count, and the number never goes by the name METEOR. Without Punkt's model its list of abbreviations alone tells the
ends; after an abbreviation, an initial, a number or an ellipsis that is a guess, and what has a guess in it has another name too.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

# Those that the English model of Punkt knows (abbrev_types.txt of NLTK's punkt_tab).
ABBREVIATIONS = """
a.a a.c a.d a.g a.h a.m a.m.e a.s a.t adm ala ariz aug ave b.f b.v bros c c.i.t c.o.m.b c.v calif chg cie co col colo conn corp
cos ct d d.c d.h d.w dec dr e e.f e.h e.l e.m f f.g f.j feb fla fri ft g g.d g.f g.k ga gen h h.c h.f h.m i.m.s ill inc j.b j.c
j.j j.k j.p j.r jan jr k kan ky l l.a l.f l.p lt ltd m m.b.a m.d.c m.j maj messrs mg mich minn mr mrs ms n n.c n.d n.h n.j n.m
n.v n.y nev nov oct ok okla ore p p.a.m p.m pa ph.d prof r r.a r.h r.i r.j r.k r.t rep reps s s.a s.a.y s.c s.g s.p.a s.s sen
sep sept sr st sw t t.j tenn tues u.k u.n u.s u.s.a u.s.s.r v va vs vt w w.c w.r w.va w.w wash wed wis yr
""".split()  # noqa: SIM905
# What the number is called, by what is at hand.
NAMES = {
  'meteor': 'METEOR',
  'meteor_without_synonyms': 'METEOR without synonyms',
  'meteor_without_punkt': "METEOR with guessed sentence ends instead of Punkt's",
  'meteor_without_synonyms_and_punkt': "METEOR without synonyms, with guessed sentence ends instead of Punkt's",
}


class Synonyms:
  """A table of synonyms with WordNet's interface: word -> synsets, each a list of words."""

  def __init__(self, table: Mapping[str, Sequence[Sequence[str]]]):
    self._table = table

  def synsets(self, word: str) -> list['_Synset']:
    return [_Synset(words) for words in self._table.get(word, ())]


class _Synset:
  def __init__(self, words: Sequence[str]):
    self._words = words

  def lemmas(self) -> list['_Lemma']:
    return [_Lemma(w) for w in self._words]


class _Lemma:
  def __init__(self, word: str):
    self._word = word

  def name(self) -> str:
    return self._word


@functools.cache
def wordnet() -> Any | None:
  """NLTK's WordNet, or None if its data is not installed."""
  from nltk.corpus import wordnet as corpus

  try:
    corpus.ensure_loaded()
  except LookupError:
    return None
  return corpus


@functools.cache
def punkt() -> Any | None:
  """NLTK's English sentence splitter, or None if its data is not installed."""
  from nltk.tokenize import punkt as library

  try:
    return library.PunktTokenizer('english')
  except LookupError:
    return None


@functools.cache
def _plain_splitter() -> Any:
  from nltk.tokenize import punkt as library

  class Plain(library.PunktSentenceTokenizer):
    """Punkt with its abbreviations alone; `guessed`: whether its whole model may have decided otherwise somewhere."""

    guessed = False

    def _second_pass_annotation(self, token, following):
      typ = token.type_no_period
      self.guessed |= bool(
        following and token.period_final and (token.abbr or token.ellipsis or token.is_initial or typ == '##number##')
      )
      return super()._second_pass_annotation(token, following)

  parameters = library.PunktParameters()
  parameters.abbrev_types = set(ABBREVIATIONS)
  return Plain(parameters)


def is_guess(text: str) -> bool:
  """Whether `tokens` may cut this text elsewhere than with Punkt's model, which is absent."""
  if punkt():
    return False
  splitter = _plain_splitter()
  splitter.guessed = False
  splitter.tokenize(text)
  return splitter.guessed


def missing_data() -> list[str]:
  """NLTK data packages that are absent, each with what that changes."""
  missing = [] if wordnet() else ['wordnet: synonyms do not match, so this is not METEOR (python -m nltk.downloader wordnet)']
  if not punkt():
    missing.append('punkt_tab: sentence ends may be guessed, and then this is not METEOR (python -m nltk.downloader punkt_tab)')
  return missing


def tokens(text: str) -> list[str]:
  """Words and punctuation, sentence by sentence."""
  from nltk.tokenize import NLTKWordTokenizer

  words = NLTKWordTokenizer()
  return [token for sentence in (punkt() or _plain_splitter()).tokenize(text) for token in words.tokenize(sentence)]


def score(reference: str, answer: str, synonyms: Any | None) -> float:
  """METEOR of `answer` in [0, 1]; `synonyms` is WordNet, a table, or None for exact and stem matches only.

  As the authors do, the reference is lower-cased before it is cut into words, the answer after.
  """
  from nltk.translate.meteor_score import single_meteor_score

  return single_meteor_score(tokens(reference.strip().lower()), tokens(answer.strip()), wordnet=synonyms or Synonyms({}))
