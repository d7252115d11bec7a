"""ScienceQA's problems as LLaVA conversations, for training on them or where LLaVA's question file is not at hand.

python -m dynllava_jax.evals.benchmarks.scienceqa_prompts DIR test CQM-A

DIR holds `problems.json` and `pid_splits.json`; `llava_test_CQM-A.json` is written beside them. A format names the order of
context C, question Q and choices M, then what the answer says: A the letter, L the lecture, E the explanation; LEPA is
the chain of thought of LLaVA-ScienceQA. The file of that name in LLaVA's eval.zip words its questions differently.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from dynllava_jax import paths, remote
from dynllava_jax.data.samples import DataError
from dynllava_jax.display import printable
from dynllava_jax.evals.benchmarks.scienceqa import OPTIONS, PROBLEMS, SPLITS
from dynllava_jax.evals.folders import fields, read_json
from dynllava_jax.files import write_atomically

INPUTS = {'Q': 'Question: {question}', 'C': 'Context: {hint}', 'M': 'Options: {choices}'}
PARTS = {'L': '{lecture}', 'E': '{solution}', 'A': 'The answer is {letter}.'}


def example(problem: Mapping[str, Any], form: str, is_test: bool) -> tuple[str, str]:
  """(question, answer) of one problem.

  Args:
    problem: question, choices, answer (index), hint, lecture, solution.
    form: CQM or QCM, a hyphen, and A, LEA, ... or LEPA.
    is_test: leave the answer open.

  Raises:
    DataError: unknown format, or a problem that lacks something.
  """
  asked, _, answered = form.partition('-')
  if sorted(asked) != sorted(INPUTS) or not (answered == 'LEPA' or (answered and set(answered) <= set(PARTS))):
    raise DataError(f'ScienceQA format {form!r}: expected such as CQM-A, QCM-LEA or QCM-LEPA')
  question, choices, index, hint, lecture, solution = fields(
    dict(problem), ('question', 'choices', 'answer', 'hint', 'lecture', 'solution'), 'ScienceQA problem'
  )
  values = {
    'question': question,
    'hint': hint.strip() or 'N/A',
    'choices': ' '.join(f'({letter}) {choice}' for letter, choice in zip(OPTIONS, choices)),
    'letter': OPTIONS[index],
    'lecture': lecture,
    'solution': solution,
  }
  text = '\n'.join(INPUTS[c].format(**values) for c in asked)
  if is_test:
    answer = 'Answer:'
  elif answered == 'LEPA':
    named = (f'{name}: {values[name.lower()]}\n' for name in ('LECTURE', 'SOLUTION') if values[name.lower()].strip())
    answer = f'{"".join(named)}###\nANSWER: {values["letter"]}.'
  else:
    answer = 'Answer: ' + ' '.join(PARTS[c].format(**values) for c in answered)
  return text.replace('  ', ' ').strip(), answer.replace('  ', ' ').strip()


def main(directory: str, split: str, form: str) -> None:
  """Writes `llava_SPLIT_FORMAT.json`."""
  folder = paths.given(directory, 'DIR')
  base = remote.opened(folder)
  problems, samples = read_json(remote.here(base / PROBLEMS)), []
  for id_ in fields(read_json(remote.here(base / SPLITS)), (split,), str(base / SPLITS))[0]:
    question, answer = example(problems[id_], form, is_test=False)
    image = problems[id_].get('image')
    question = question.removeprefix('Question: ') + ('\n<image>' if image else '')
    turns = [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer.removeprefix('Answer: ')}]
    samples.append({'id': id_, 'conversations': turns} | ({'image': f'{id_}/{image}'} if image else {}))
  write_atomically(folder / f'llava_{split}_{form}.json', json.dumps(samples, indent=2).encode())


if __name__ == '__main__':
  if len(sys.argv) != 4:
    sys.exit('usage: python -m dynllava_jax.evals.benchmarks.scienceqa_prompts DIR SPLIT FORMAT')
  try:
    main(*sys.argv[1:])
  except (DataError, OSError) as e:
    sys.exit(f'error: {printable(e, lines=True)}')
