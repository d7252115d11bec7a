"""Marks in a question that stand for other content than words, as other projects write them: `<video>`, `<|image_1|>`, `[IMG]`.

There are too many to list, so a mark is told by its grammar: a tag all of whose words belong to how such marks are named, at least
one of them a medium. HTML with attributes, code, and brackets with further words in them are text.
"""

import re

from dynllava_jax.data.fields import ENCODED, FILE

MEDIA = """
images image imgs img pictures picture pics pic photos photo screenshot videos video vids vid audios audio aud speech speeches
sound sounds voice music wav frames frame clips clip pointclouds pointcloud pixels pixel
""".split()  # noqa: SIM905
# Words of a medium only where the mark cannot be anything else: with pipes, underscores, or a word of `AROUND`.
WEAK = ['media', 'visual', 'vision', 'vis', 'vi', 'im', 'point', 'points', 'pc', 'depth', 'document', 'doc', 'pdf', 'mel']
AROUND = """
placeholder tokens token context patches patch pad start begin end bos eos eoi soi boi eoa sep new newline line here features
feature embeds embed soft hard of fake around global local row col column break split slice sub tile crop cls plh cloud input
unk ids in out at latent query special the
""".split()  # noqa: SIM905
CHATML = ('<|im_start|>', '<|im_end|>', '<|im_sep|>')  # roles of chat templates
WORD = re.compile(f'(?:{"|".join(sorted(MEDIA + WEAK + AROUND, key=len, reverse=True))})+')
MEDIUM = re.compile(f'(?:{"|".join(AROUND)})*(?:{"|".join(MEDIA)})(?:{"|".join(MEDIA + AROUND)})*')
A_WEAK_ONE = re.compile(f'(?:{"|".join(AROUND)})*(?:{"|".join(WEAK)})(?:{"|".join(WEAK + AROUND)})*')

TAG = re.compile(r'<(?P<tag>[|/]*\s?[A-Za-z_][\w .:-]{0,40}?\s?[|/]*)>(?!\s*(?:tags?|elements?)\b)')
BRACKETS = re.compile(r'(?<![\w\])(=,!])(?<![(=,] )\[/?(?P<tag>[A-Za-z][\w -]{1,30})\](?!\s?[(:\[])')
IN_BRACKETS = ['images', 'image', 'imgs', 'img', 'videos', 'video', 'vids', 'vid', 'audios', 'audio', 'speech', 'frame', 'frames']
MARKDOWN = re.compile(r'!\[[^\]\n]*\]\(\s*<?(?P<target>[^()\s<>]+)')
ALONE = re.compile(
  r'^\s*<(?:img|video|audio)\s[^>]*\bsrc\s*=\s*["\']?(?P<target>[^"\'>\s]+)[^>]*>\s*(?:</(?:video|audio)>\s*)?$', re.I | re.M
)
HTML = re.compile(r'</?(?!(?:img|video|audio)\b)[a-z][a-z0-9]*(?:\s[^<>]*)?/?>', re.IGNORECASE)
CODE = re.compile(r'```.*?(?:```|$)|`[^`\n]*`', re.S)
OF_IMAGE = '<image>'  # LLaVA's own, looked after by those who put the picture there


def other_mark(question: str) -> str:
  """The first mark in a question that stands for something other than its picture; '' if there is none."""
  prose = CODE.sub('', question)
  for found in TAG.finditer(prose):
    if found[0] not in (OF_IMAGE, *CHATML) and _is_mark(found['tag']) and not (_is_element(found, prose) or _is_type(found, prose)):
      return found[0]
  for found in BRACKETS.finditer(prose):
    words = _words(found['tag'])
    if set(words) & set(IN_BRACKETS) and set(words) <= {*IN_BRACKETS, *AROUND}:
      return found[0]
  for found in MARKDOWN.finditer(prose):
    if FILE.search(found['target']) or ENCODED.match(found['target']):
      return found[0] + ')'
  for found in ALONE.finditer(prose):
    if (FILE.search(found['target']) or ENCODED.match(found['target'])) and not HTML.search(
      prose.replace('</video>', '').replace(OF_IMAGE, '')
    ):
      return found[0].strip()
  return ''


def _is_mark(tag: str) -> bool:
  """Whether the inside of a tag is the name of such a mark."""
  name = tag.strip('|/ ')
  words = _words(name)
  if not words or not all(WORD.fullmatch(word) for word in words):
    return False
  if any(MEDIUM.fullmatch(word) for word in words):
    return True
  decorated = '|' in tag or name != name.strip('_') or any(w in AROUND for w in words) or re.search(r'\d', name)
  glued = any(A_WEAK_ONE.fullmatch(word) and word not in WEAK for word in words)
  return bool((decorated or glued) and any(A_WEAK_ONE.fullmatch(word) for word in words))


def _is_type(found: re.Match, prose: str) -> bool:
  """Whether a tag is the argument of a type in code, as in `List<Image>`."""
  return found['tag'].istitle() and bool(re.search(r'\w$', prose[: found.start()]))


def _is_element(found: re.Match, prose: str) -> bool:
  """Whether a tag is HTML: one of a pair with other elements between them, as `<video><source src="a"></video>`."""
  name = found['tag'].strip('|/ ').lower()
  pair = re.search(rf'<{re.escape(name)}>(.*?)</{re.escape(name)}>', prose, re.I | re.S)
  return bool(name in ('video', 'audio', 'picture', 'frame') and pair and re.search(r'<(?:source|track|img|p|a)\b', pair[1], re.I))


def _words(name: str) -> list[str]:
  """`AudioHere`, `image_soft_token`, `IMG-2` -> their words in small letters, without numbers."""
  apart = re.sub(r'(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])', ' ', name)
  return [word.lower() for word in re.split(r'[\W_]+', apart) if word and not word.isdigit()]
