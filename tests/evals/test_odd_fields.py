"""Every field of every question, label and answer file, replaced by what does not belong there."""

import json
import re
import shutil

import pytest
from answer_files import answers_for, folder_of, scored

from dynllava_jax.config import ConfigError
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals import score
from dynllava_jax.evals.benchmarks import suite

pytest_plugins = ('tiny_suite',)

ODD = (None, [], [1], {'a': 1}, True, 5, 0.5, 10**400, 'x', '')
# A Python exception in a message tells its author something, and a user nothing.
INSIDE = re.compile(r"\w+Error: |has no attribute|unhashable|not subscriptable|object is not|'NoneType'")
BENCHMARKS = ('gqa', 'pope', 'textvqa', 'seed', 'scienceqa', 'vqav2_val', 'vizwiz_val', 'mmvet', 'lvis_multi', 'mme')


def places(content, path=()):
  """Paths to the values of a tree; of a list or a table only the first entry is looked into."""
  items = content.items() if isinstance(content, dict) else enumerate(content[:1]) if isinstance(content, list) else ()
  for key, value in list(items)[:8]:
    yield (*path, key)
    yield from places(value, (*path, key))


def replaced(content, path, value):
  if not path:
    return value
  copy = dict(content) if isinstance(content, dict) else list(content)
  copy[path[0]] = replaced(content[path[0]], path[1:], value)
  return copy


@pytest.mark.parametrize('name', BENCHMARKS)
def test_no_odd_value_is_told_in_words_of_python(name, eval_data, tmp_path, monkeypatch):
  monkeypatch.setattr(score, 'RESAMPLES', 2)
  benchmark = suite.get(name)
  own = next(folder for folder in benchmark.folders if (eval_data / folder).is_dir())
  shutil.copytree(eval_data / own, tmp_path / own)
  answers = answers_for(name, eval_data, tmp_path / 'answers.jsonl')
  files = [f for f in (tmp_path / own).rglob('*.json*') if f.is_file()] + [answers]
  tried = 0
  for file in files:
    before = file.read_text()
    by_line = before.startswith('{') and '\n{' in before
    content = [json.loads(line) for line in before.splitlines()] if by_line else json.loads(before)
    for path in list(places(content)):
      for value in ODD:
        odd = replaced(content, path, value)
        file.write_text(''.join(json.dumps(row) + '\n' for row in odd) if by_line else json.dumps(odd))
        tried += 1
        try:
          score.questions(benchmark, folder_of(name, tmp_path))
          scored(name, tmp_path, answers)
        except (DataError, ConfigError) as e:
          assert not INSIDE.search(str(e)), f'{file.name}: {path} = {value!r:.50}: {e}'
    file.write_text(before)
  assert tried >= 90, 'the files were found'
