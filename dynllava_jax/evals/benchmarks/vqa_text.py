"""Answers as VQA servers compare them: normalisation, and agreement with ten annotators.

The rules are those of EvalAI's answer processor and of the M4C evaluator that LLaVA scores TextVQA with, quirks
included: commas and question marks vanish before punctuation is looked at, a period goes unless a digit follows,
and only the first 32 periods do.
"""

import re
from collections.abc import Callable, Sequence

from dynllava_jax.evals.benchmarks.base import added

ANNOTATORS = 10
PERIODS_REMOVED = 32  # the original passes a regex flag of this value where a count belongs
PERIOD = re.compile(r'\.(?!\d)')
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = dict(zip('none zero one two three four five six seven eight nine ten'.split(), map(str, [0, *range(11)])))  # noqa: SIM905
ARTICLES = ('a', 'an', 'the')

# Every contraction is also known without any one of its apostrophes, but not without all of several.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
you'd've you'll you're you've
""".split()  # noqa: SIM905
CONTRACTIONS = {w[:i] + w[i + 1 :]: w for w in _CONTRACTIONS for i, c in enumerate(w) if c == "'"}
CONTRACTIONS |= {"somebody'd": 'somebodyd'}  # backwards in the original too


def strip_words(text: str) -> str:
  """Lower case without commas and question marks; `'s` becomes a word."""
  return text.lower().replace(',', '').replace('?', '').replace("'s", " 's").strip()


def strip_punctuation(text: str) -> str:
  """Drops punctuation that touches a blank, turns other punctuation into a blank, drops periods before non-digits."""
  result = text
  for mark in PUNCTUATION:
    result = result.replace(mark, '' if f'{mark} ' in text or f' {mark}' in text else ' ')
  return PERIOD.sub('', result, count=PERIODS_REMOVED)


def normalize(text: str) -> str:
  """The form in which two answers are compared."""
  text = strip_punctuation(strip_words(text).replace('\n', ' ').replace('\t', ' ').strip())
  words = [NUMBERS.get(word, word) for word in text.split()]
  return ' '.join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_scores(answers: Sequence[str], form: Callable[[str], str] = normalize) -> dict[str, float]:
  """Score of every answer in the `form` compared: for each annotator, min(1, how many of the *others* gave it / 3), averaged.

  Raises:
    ValueError: not exactly ten answers.
  """
  if len(answers) != ANNOTATORS:
    raise ValueError(f'expected {ANNOTATORS} annotators, found {len(answers)}')
  given = [form(a) for a in answers]
  scores = {}
  for answer in set(given):
    shares = [min(1, (given.count(answer) - (own == answer)) / 3) for own in given]
    scores[answer] = added(shares) / len(shares)
  return scores


def accuracy(answer: str, answers: Sequence[str], form: Callable[[str], str] = normalize) -> float:
  """VQA accuracy of one answer in [0, 1], the annotators' put into `form`; ValueError unless there are ten."""
  return soft_scores(answers, form).get(normalize(answer), 0.0)
