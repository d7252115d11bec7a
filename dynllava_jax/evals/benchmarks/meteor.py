"""METEOR as NLTK computes it for one reference, with its parameters (alpha 0.9, beta 3, gamma 0.5).

It needs two data packages of NLTK: `wordnet` for synonyms and `punkt_tab` to find sentence ends. Without WordNet the
number is another one (exact and stem matches only) and never goes by the name METEOR.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

# Stands in for the Punkt model where that is absent: a period after these does not end a sentence.
ABBREVIATIONS = frozenset('a.m p.m e.g i.e etc vs mr mrs ms dr st no u.s u.k jr sr prof inc ltd co approx fig'.split())  # noqa: SIM905


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
def _sentence_splitter() -> Any:
  import nltk
  from nltk.tokenize import punkt

  try:
    nltk.data.find('tokenizers/punkt_tab/english')
    return punkt.PunktTokenizer('english')
  except LookupError:
    parameters = punkt.PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS)
    return punkt.PunktSentenceTokenizer(parameters)


def missing_data() -> list[str]:
  """NLTK data packages that are absent, each with what that changes."""
  import nltk

  missing = [] if wordnet() else ['wordnet: synonyms do not match, so this is not METEOR (python -m nltk.downloader wordnet)']
  try:
    nltk.data.find('tokenizers/punkt_tab/english')
  except LookupError:
    missing.append('punkt_tab: sentence ends are found with a short list of abbreviations (python -m nltk.downloader punkt_tab)')
  return missing


def tokens(text: str) -> list[str]:
  """Words and punctuation, sentence by sentence."""
  from nltk.tokenize import NLTKWordTokenizer

  words = NLTKWordTokenizer()
  return [token for sentence in _sentence_splitter().tokenize(text) for token in words.tokenize(sentence)]


def score(reference: str, answer: str, synonyms: Any | None) -> float:
  """METEOR of `answer` in [0, 1]; `synonyms` is WordNet, a table, or None for exact and stem matches only.

  As the authors do, the reference is lower-cased before it is cut into words, the answer after.
  """
  from nltk.translate.meteor_score import single_meteor_score

  return single_meteor_score(tokens(reference.strip().lower()), tokens(answer.strip()), wordnet=synonyms or Synonyms({}))
