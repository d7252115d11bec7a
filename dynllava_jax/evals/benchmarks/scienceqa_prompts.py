"""ScienceQA's problems as LLaVA conversations, for training on them or where LLaVA's question file is not at hand.

python -m dynllava_jax.evals.benchmarks.scienceqa_prompts DIR test CQM-A

DIR holds `problems.json` and `pid_splits.json`; `llava_test_CQM-A.json` is written beside them. A format is one of `ASKED`, the
order of context C, question Q, choices M, lecture L and explanation E, a hyphen, and one of `ANSWERED` or LEPA, the chain of
thought of LLaVA-ScienceQA. All are worded as LLaVA's converter does (scripts/convert_sqa_to_llava_base_prompt.py), which gives the
explanation for AL and the lecture for AE. The file of that name in LLaVA's eval.zip words its questions differently.
"""

import json
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

from dynllava_jax import command_line, paths, remote
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.benchmarks.scienceqa import OPTIONS, PROBLEMS, SPLITS, right_letter
from dynllava_jax.evals.reading import fields, read_objects
from dynllava_jax.files import write_atomically

ASKED = ('CQM', 'QCM', 'QCML', 'QCME', 'QCMLE', 'QCLM', 'QCEM', 'QCLEM')
# What follows the letter, or goes before it.
ANSWERED = {
  'A': 'The answer is {letter}.',
  'AL': 'The answer is {letter}. BECAUSE: {solution}',
  'AE': 'The answer is {letter}. BECAUSE: {lecture}',
  'ALE': 'The answer is {letter}. BECAUSE: {lecture} {solution}',
  'AEL': 'The answer is {letter}. BECAUSE: {solution} {lecture}',
  'LA': '{lecture} The answer is {letter}.',
  'EA': '{solution} The answer is {letter}.',
  'LEA': '{lecture} {solution} The answer is {letter}.',
  'ELA': '{solution} {lecture} The answer is {letter}.',
}
LEPA = 'LEPA'
LINES = {
  'Q': 'Question: {question}',
  'C': 'Context: {hint}',
  'M': 'Options: {choices}',
  'L': 'BECAUSE: {lecture}',
  'E': 'BECAUSE: {solution}',
  'LE': 'BECAUSE: {lecture} {solution}',
}


def example(problem: Mapping[str, Any], form: str, is_test: bool, where: str = 'ScienceQA problem') -> tuple[str, str]:
  """(question, answer) of one problem.

  Args:
    problem: question, choices, answer (index); hint, lecture and solution may be absent or null.
    form: such as CQM-A; see the top of this file.
    is_test: leave the answer open.
    where: what error messages call the problem.

  Raises:
    DataError: unknown format, or a problem that lacks something.
  """
  asked, _, answered = form.partition('-')
  if asked not in ASKED or answered not in (*ANSWERED, LEPA):
    raise DataError(
      f'ScienceQA format {form!r}: unknown; choose one of {", ".join(ASKED)}, a hyphen, and one of {", ".join((*ANSWERED, LEPA))}'
    )
  question, choices, index = fields(problem, {'question': str, 'choices': list, 'answer': int}, where)
  letter = right_letter(choices, index, where)
  values = {name: problem.get(name) or '' for name in ('hint', 'lecture', 'solution')}
  for name, text in values.items():
    if not isinstance(text, str):
      raise DataError(f'{where}: {name} is {text!r}, expected a text; get {PROBLEMS} again')
  values = {name: text.replace('\\n', '\n') for name, text in values.items()} | {  # as its converter does with a written \n
    'question': question,
    'hint': values['hint'].strip() or 'N/A',
    'choices': ' '.join(f'({letter}) {choice}' for letter, choice in zip(OPTIONS, choices)),
    'letter': letter,
  }
  text = '\n'.join(LINES[part].format(**values) for part in re.findall('LE|.', asked))
  if is_test:
    answer = 'Answer:'
  elif answered == LEPA:
    named = (f'{name}: {values[name.lower()]}\n' for name in ('LECTURE', 'SOLUTION') if values[name.lower()].strip())
    answer = f'{"".join(named)}###\nANSWER: {letter}.'
  else:
    answer = f'Answer: {ANSWERED[answered].format(**values)}'
  return _tidy(text), _tidy(answer)


def _tidy(text: str) -> str:
  """Single blanks, and no BECAUSE without a reason."""
  text = text.replace('  ', ' ').strip()
  return text.replace('BECAUSE:', '').strip() if text.endswith('BECAUSE:') else text


def main(directory: str, split: str, form: str) -> None:
  """Writes `llava_SPLIT_FORMAT.json`; DataError for files that do not fit together, a split or format that is not known."""
  folder = paths.given(directory, 'DIR')
  base = remote.opened(folder)
  problems, samples = read_objects(remote.here(base / PROBLEMS)), []
  (ids,) = fields(read_objects(remote.here(base / SPLITS)), {split: list}, str(base / SPLITS))
  for id_ in map(str, ids):
    if id_ not in problems:
      raise DataError(f'{base / SPLITS}: {split} names problem {id_}, which {base / PROBLEMS} lacks; get both files of one release')
    problem, where = problems[id_], f'{base / PROBLEMS}, problem {id_}'
    question, answer = example(problem, form, False, where)
    image = problem.get('image')
    if image and (not isinstance(image, str) or pathlib.PurePath(image).name != image):
      raise DataError(f'{where}: image is {image!r}, expected the name of a file; get {PROBLEMS} again')
    if question.startswith('Question: '):
      question = question.replace('Question: ', '')
    if answer.startswith('Answer: '):
      answer = answer.replace('Answer: ', '')
    turns = [{'from': 'human', 'value': question + ('\n<image>' if image else '')}, {'from': 'gpt', 'value': answer}]
    samples.append({'id': id_} | ({'image': f'{id_}/{image}'} if image else {}) | {'conversations': turns})
  write_atomically(folder / f'llava_{split}_{form}.json', json.dumps(samples, indent=2).encode())


if __name__ == '__main__':
  if len(sys.argv) != 4:
    sys.exit('usage: python -m dynllava_jax.evals.benchmarks.scienceqa_prompts DIR SPLIT FORMAT')
  with command_line.readable_errors():
    main(*sys.argv[1:])
