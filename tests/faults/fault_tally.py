"""What came of kills and damage, one `Tally` a program: counts, what went wrong, and whether messages in docs/ were said."""

import os
import re

from conftest import ROOT

PROMISES = ROOT / 'docs' / 'reliability.md'
MOST_LINES = 16  # of an error that lists files
KILLED, TWICE, FULL = 'killed at any moment', 'started twice', 'the disk is full'  # rows of all programs
# Kills that hit and files damaged in a whole run, at least.
LEAST = {
  'Training': (24, 75),
  'Evaluation': (30, 90),
  'Preparation': (66, 150),
  'Conversion': (30, 50),
  'Export': (30, 50),
  'Object stores': (20, 30),
}


class Tally:
  """Counts of one program, what went wrong in words, and all that it said."""

  def __init__(self, program):
    self.program, self.wrong = program, []
    self.said = {}  # what commands said, by the row of docs/reliability.md that they are a case of
    self.counts = dict.fromkeys(('kills', 'lost', 'damaged', 'named', 'exact', 'silent', 'tracebacks'), 0)
    self.more = {}  # what else was tried

  def add(self, name, what=''):
    self.counts[name] += 1
    if what:
      self.wrong.append(f'{name}: {what}')
      print(self.program, self.wrong[-1], flush=True)

  def also(self, name):
    self.more[name] = self.more.get(name, 0) + 1

  def check(self, done, about, killed=False, row=None):
    """That a command ended, said what a person can read, and died of nothing but what it was given.

    Notes what it said; `row`: how the row of docs/reliability.md begins that this is a case of.
    """
    self.said.setdefault(row, []).append(re.sub(r'\s+', ' ', done.text))
    lines = done.err.strip().splitlines()
    if 'Traceback (most recent' in done.text or (isinstance(done.code, int) and done.code < 0 and not killed):
      self.add('tracebacks', f'{about}: {done.code} {done.err[-600:]}')
    elif done.code == 'late':
      self.add('tracebacks', f'{about}: did not end: {done.text[-300:]}')
    elif (done.code not in (0, None, -9) and not ('error: ' in done.err if lines else done.out)) or len(lines) > MOST_LINES:
      self.add('tracebacks', f'{about}: exit status {done.code} without one line: {done.text[-600:]}')
    return done

  def report(self):
    """Prints the line of counts, and fails if anything went wrong or too little was tried."""
    parts = [f'{name} {count}' for name, count in {**self.counts, **self.more}.items()]
    line = f'{self.program}: {", ".join(parts)}'
    print(line, flush=True)
    if where := os.environ.get('FAULT_COUNTS'):
      with open(where, 'a') as file:
        file.write(line + '\n')
    assert not self.wrong, '\n'.join([line, *self.wrong])
    kills, damaged = LEAST[self.program]
    assert self.counts['kills'] >= kills and self.counts['damaged'] >= damaged, f'{line}: expected {kills} and {damaged} at least'

  def check_messages(self):
    """That each message of this program's part of docs/reliability.md was said in a case of its row, and each row had one."""
    rows = table(self.program)
    cases = {row: [text for name, texts in self.said.items() if name and row.startswith(name) for text in texts] for row in rows}
    unknown = [name for name in self.said if name and not any(row.startswith(name) for row in rows)]
    missing = [(row, m) for row, found in rows.items() for m in found if not any(re.search(pattern(m), t) for t in cases[row])]
    assert not unknown, f'docs/reliability.md has no row for {unknown}'
    assert not missing, f'docs/reliability.md promises what no test saw: {missing}'


def table(program):
  """Rows of the table below the heading of a program: the first column, and the messages in backquotes in the second."""
  part = PROMISES.read_text().split(f'\n## {program}\n')[1].split('\n## ')[0]
  rows = [line.removeprefix('| ').split(' | ') for line in part.splitlines() if line.startswith('| ') and ' | ' in line]
  return {row[0]: re.findall(r'`([^`]+)`', row[1]) for row in rows[1:]}


def pattern(message):
  """A message as a regular expression; three dots stand for what differs."""
  return re.escape(message).replace(re.escape('...'), '.{1,400}?')
