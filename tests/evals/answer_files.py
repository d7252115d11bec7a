"""Answer files made for a test, and what scoring says to them."""

import json

from dynllava_jax.config import EvalConfig, EvalRun
from dynllava_jax.evals import score
from dynllava_jax.evals.benchmarks import suite
from dynllava_jax.evals.folders import Folder


def folder_of(name, root, labels=''):
  return Folder(root, suite.get(name).folders, labels)


def answers_for(name, data, path, change=lambda rows: rows, text='yes'):
  """An answer file that answers every question with `text`, after `change`."""
  questions = suite.get(name).questions(folder_of(name, data))
  rows = [{'question_id': q.id, 'prompt': q.prompt, 'text': text} for q in questions]
  path.write_text(''.join(json.dumps(r) + '\n' for r in change(rows)))
  return path


def scored(name, data, path, partial=False, labels=''):
  return score.score_file(suite.get(name), folder_of(name, data, labels), path, partial)


def config(name, **changes):
  """An evaluation of the tiny checkpoint."""
  runs = {'own': EvalRun()}
  return EvalConfig(runs=runs, benchmark=name, text_lengths=(192,), questions=0, batch_size=2, max_new_tokens=3, **changes)
