"""Kills, damages, starves and doubles command lines, and counts what came of it, one `Tally` a program.

The rule: the same command once more ends with what an undisturbed run ends with, and nothing that was finished is lost; or one line
says what is wrong and where.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

from fault_tally import FULL, KILLED, TWICE

NURSERY = pathlib.Path(__file__).with_name('nursery.py')
HEX = re.compile('[0-9a-f]{32}')  # what Orbax calls the files of a database


@dataclasses.dataclass(frozen=True)
class Done:
  """How a command ended: exit status (negative: killed, None: stopped, 'late': it would not end), output, and what it did."""

  code: int | str | None
  out: str = ''
  err: str = ''
  events: int = 0
  seconds: float = 0.0
  pid: int = 0

  @property
  def text(self):
    return self.out + self.err


class Nursery:
  """The other end of `nursery.py`. `env`: of all commands."""

  def __init__(self, cache, env=None):
    flags = {'XLA_FLAGS': '--xla_force_host_platform_device_count=1', 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
    # Compiled once; a killed command reads what an undisturbed one has compiled.
    flags |= {'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'MPLBACKEND': 'agg'}
    flags |= {'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1', 'TF_CPP_MIN_LOG_LEVEL': '3'}
    self._process = subprocess.Popen(
      [sys.executable, str(NURSERY)], env=os.environ | flags | (env or {}), stdin=-1, stdout=-1, stderr=-3, text=True
    )

  def ask(self, job):
    self._process.stdin.write(json.dumps(job) + '\n')
    self._process.stdin.flush()
    return Done(**json.loads(self._process.stdout.readline()))

  def run(self, words, **how):
    """Runs a command line, `words` without 'python'. `how`: see nursery.py."""
    return self.ask({'words': [*map(str, words)], **{k: v if isinstance(v, int | float) else str(v) for k, v in how.items()}})

  def close(self):
    self._process.stdin.close()
    self._process.wait(20)


@dataclasses.dataclass(frozen=True)
class Program:
  """A command line under test.

  Attributes:
    words: makes its words from the folder that it fills.
    result: all that counts of a finished folder, comparable.
    progress: what is finished for good, as numbers or a set that only grow while commands are killed.
    where: makes the folder that is watched from the folder.
  """

  words: object
  result: object
  progress: object = lambda folder: 0
  where: object = lambda folder: folder


def undisturbed(nursery, program, folder):
  """Runs a command to its end twice, for the compiler's sake; (the second folder, how that ended)."""
  for name in ('first', 'whole'):
    whole = folder / name
    done = nursery.run(program.words(whole), watch=program.where(whole))
    assert done.code == 0, done.text
  first, second = program.result(folder / 'first'), program.result(whole)
  assert first == second, f'two runs alike end differently: {differences(first, second)}'
  return whole, done


def kill_all_along(nursery, program, tally, folder, whole, kills, each=5, **always):
  """Kills a command again and again, then lets it end: chains of `each` kills, until so many kills hit.

  Half of the kills come right before something is done to a file, at every place alike; the others at a moment. `whole`: the folder
  of an undisturbed run, and how that ended; `always`: what else holds for every start.
  """
  expected, done = program.result(whole[0]), whole[1]
  rng = random.Random(tally.program)
  hit = chain = 0
  while hit < kills:
    chain += 1
    assert chain <= 3 * kills, f'{hit} of {kills} kills hit'
    place = folder / f'chain {chain}'
    before, about, ended = None, '', None
    for _ in range(each):
      at, seconds = rng.randint(1, done.events), rng.uniform(0, done.seconds)
      how = {'kill_at': at} if rng.random() < 0.5 else {'kill_in': seconds}
      about += f' {how}'
      ended = tally.check(
        nursery.run(program.words(place), watch=program.where(place), **how, **always), f'{place.name}{about}', True, KILLED
      )
      if ended.code != -9:
        break
      hit += 1
      tally.add('kills')
      now = program.progress(place)
      if before is not None and not before <= now:
        tally.add('lost', f'{place.name}{about}: had {before}, has {now}')
      before = now
    if ended.code == -9:
      ended = tally.check(nursery.run(program.words(place), **always), f'{place.name}{about}, then to the end', row=KILLED)
    if ended.code == 0:
      found = program.result(place)
      if found != expected:
        tally.add('lost', f'{place.name}{about}: {differences(expected, found)}')
    elif ended.code == 1:
      tally.add('lost', f'{place.name}{about}: {ended.err}')
    shutil.rmtree(place, ignore_errors=True)


def differences(a, b):
  """Names of what differs between two results."""
  if isinstance(a, dict) and isinstance(b, dict):
    return [name for name in sorted(a.keys() | b.keys(), key=str) if a.get(name) != b.get(name)]
  return f'{str(a)[:200]} is now {str(b)[:200]}'


def fill(path, make):
  """Something else in the place of a file."""
  path.unlink()
  make(path)


def flip(path, rng):
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def cut(path, rng):
  os.truncate(path, rng.randrange(path.stat().st_size))


KINDS = {
  'flip': flip,
  'flip again': flip,
  'cut': cut,
  'empty': lambda path, rng: os.truncate(path, 0),
  'zeros': lambda path, rng: path.write_bytes(bytes(path.stat().st_size)),
  'random': lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size)),
  'longer': lambda path, rng: path.write_bytes(path.read_bytes() + rng.randbytes(1 + rng.randrange(40))),
  'deleted': lambda path, rng: path.unlink(),
  'a folder': lambda path, rng: fill(path, pathlib.Path.mkdir),
  'a pipe': lambda path, rng: fill(path, os.mkfifo),
  'a device': lambda path, rng: fill(path, lambda p: p.symlink_to('/dev/zero')),
  'a dead link': lambda path, rng: fill(path, lambda p: p.symlink_to('nowhere')),
  'other JSON': lambda path, rng: path.write_text('[{"a": 1}]'),
  'deep': lambda path, rng: path.write_text('[' * 10**5),
  'huge': lambda path, rng: os.truncate(path, 2**40),
}
GROSS = tuple(k for k in KINDS if not k.startswith('flip'))  # of files without digest: a letter may be meant


def trials(files, count, rng, first=()):
  """(file, kind) pairs: every file and every kind comes about equally often, the files in no order.

  Args:
    files: names with the kinds that make sense.
    count: so many, besides those of the files in `first`, which get all kinds.
  """
  if first:
    return trials({n: files[n] for n in first}, 10**6, rng) + trials({n: k for n, k in files.items() if n not in first}, count, rng)
  names = sorted(files, key=lambda n: HEX.sub('*', n))  # names that differ from run to run are tried alike
  rng.shuffle(names)  # where there are more than trials, each folder has its share
  left = {name: rng.sample([*files[name]], len(files[name])) for name in names}
  out, tried = [], collections.Counter()
  while len(out) < count and any(left.values()):
    for name, kinds in left.items():
      if kinds and len(out) < count:
        kind = min(kinds, key=tried.__getitem__)
        kinds.remove(kind)
        tried[kind] += 1
        out.append((name, kind))
  return out


def damage_all(
  nursery,
  tally,
  whole,
  scratch,
  files,
  count,
  command,
  result,
  expected,
  names=lambda name: (name,),
  arrive=lambda folder: None,
  told=(),
  first=(),
  row=lambda name: None,
):
  """Damages files of a folder, one at a time, and runs a command on it.

  Args:
    whole: what is damaged is a copy of it, `scratch`.
    files: kinds of damage by file.
    command: words, from the folder.
    result: what is compared with `expected` if the command ends well, from the folder.
    names: what of a file's name a message must hold to have named it, any of them.
    count, first: see `trials`.
    told: parts of the result that may differ if the damage was named.
    arrive: brings the damaged folder to where the command finds it.
    row: see `Tally.check`, by the file's name.
  """
  rng = random.Random(0)
  for name, kind in trials(files, count, rng, first):
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(whole, scratch, symlinks=True)
    KINDS[kind](scratch / name, rng)
    arrive(scratch)
    about = f'{name}: {kind}'
    tally.add('damaged')
    bad = len(tally.wrong)
    done = tally.check(nursery.run(command(scratch)), about, row=row(name))
    named = any(part in done.text for part in names(name))
    if len(tally.wrong) > bad:
      continue
    if done.code == 0:
      found = result(scratch)
      differ = [] if found == expected else differences(expected, found)
      if differ and not (named and set(differ) <= set(told)):
        tally.add('silent', f'{about}: {differ}; {done.text[-300:]}')
      else:
        tally.add('named' if named else 'exact')
    elif named:
      tally.add('named')
    else:
      tally.add('silent', f'{about}: the message does not name it: {done.err}')


def files_of(folder, kinds, but=lambda name: None):
  """Every file below a folder with the kinds of damage; `but` gives other kinds for some."""
  names = [p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file() and not p.is_symlink()]
  return {n: kinds if but(n) is None else but(n) for n in names}


def starve(nursery, program, tally, folder, expected, sizes, full=()):
  """Lets the disk be full: no file beyond a size, or some KiB in all where a file system can be mounted. Then there is room."""
  for size in sizes:
    place = folder / f'full at {size}'
    _starved(nursery, program, tally, place, expected, {'fsize': size})
  for kilobytes in full:
    mount = folder / f'disk of {kilobytes}'
    mount.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={kilobytes}k', 'none', mount], capture_output=True).returncode:
      break
    try:
      place = mount / 'x'
      _starved(nursery, program, tally, place, expected, {}, room=['mount', '-o', 'remount,size=1g', mount])
    finally:
      subprocess.run(['umount', '-l', mount], check=True)


def _starved(nursery, program, tally, place, expected, how, room=None):
  done = tally.check(nursery.run(program.words(place), **how), place.name, row=FULL)
  tally.also('full disks')
  if done.code == 0 and program.result(place) != expected:
    tally.add('silent', f'{place}: {differences(expected, program.result(place))}; {done.text}')
  if room:
    subprocess.run(room, check=True)
  again = tally.check(nursery.run(program.words(place)), f'{place.name}, then with room')
  if again.code or program.result(place) != expected:
    found = program.result(place) if again.code == 0 else again.err
    tally.add('lost', f'{place.name}: {differences(expected, found)}, after {done.text}')


def start_twice(nursery, program, tally, folder, expected, events, times=2):
  """Stops a command somewhere in its work and starts it once more; then the first goes on."""
  rng = random.Random(0)
  for number in range(times):
    place = folder / f'twice {number}'
    first = nursery.run(program.words(place), watch=program.where(place), stop_at=rng.randint(2, events))
    assert first.code is None, first.text
    second = tally.check(nursery.run(program.words(place)), 'the second of two', row=TWICE)
    tally.also('started twice')
    if second.code == 0:
      tally.add('silent', f'two at once: {second.text}')
    ended = tally.check(nursery.ask({'end': first.pid, 'kill': 0}), 'the first of two')
    if ended.code or program.result(place) != expected:
      tally.add('lost', f'the first of two: {ended.text}')


@contextlib.contextmanager
def permissions(path, mode):
  """A file or folder with other permissions for a while."""
  before = path.stat().st_mode
  path.chmod(mode)
  try:
    yield
  finally:
    path.chmod(before)


def refuse(nursery, tally, words, *parts, row=None, **how):
  """Runs a command that must be refused with one line that holds all of `parts`. `row`: see `Tally.check`."""
  done = tally.check(nursery.run(words, **how), ' '.join(map(str, words)), row=row)
  if done.code != 1 or not all(part in done.err for part in parts):
    tally.add('silent', f'{words}: expected {parts}, got {done.code} {done.text}')
  return done


def tree(folder, but=lambda name: False):
  """Every file's bytes below a folder by name, but some."""
  names = [p for p in sorted(folder.rglob('*')) if p.is_file() and not but(p.relative_to(folder).as_posix())]
  return {p.relative_to(folder).as_posix(): p.read_bytes() for p in names}
