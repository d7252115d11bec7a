"""Starts command lines as processes that have their imports done: a fork takes milliseconds, importing jax takes seconds.

A program of its own, as a fork needs one thread and no backend of jax. It reads one job a line from its standard input, runs the
command in a fork, and answers one line: exit status, output, how often the command touched its files, how long that took. What can
be asked of a job besides its command:

    watch     a folder; touching a file in it (opening it to write, renaming, removing, making folders) is an event
    kill_at   kill -9 right before this event
    kill_in   kill -9 so many seconds after the first event, wherever it is then, also in the middle of a C++ library's write
    stop_at   stop before this event and answer; the job {'end': PID} lets it go on, or ends it with 'kill'
    fsize     no file may be larger than so many bytes (RLIMIT_FSIZE), as on a full disk
    plain     permissions count: root gives up the right to pass over them
    period    seconds between uploads to an object store
"""

import atexit
import contextlib
import ctypes
import json
import os
import pathlib
import resource
import runpy
import select
import signal
import sys
import threading
import time
import traceback

# What ends a job that would not end, however busy the machine is: seconds of the processor, ten times what any command here takes;
# and seconds in which it used none of them.
LONGEST, IDLE = 60.0, 90.0
TOUCHING = ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate', 'os.symlink')


def touches(event, arguments, root):
  """Whether an audit event is about to change something in the folder."""
  if event == 'open':
    path, mode, flags = arguments
    if not (flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else mode and set(mode) & set('wax+')):
      return False
  elif event not in TOUCHING:
    return False
  path = arguments[0]
  if isinstance(path, int) or path is None:
    return False
  return os.path.abspath(os.fsdecode(path)).startswith(root)


class Events:
  """Counts what a command does to its files, and ends the process where the job says so."""

  def __init__(self, job):
    self.job, self.count, self.first, self.lock = job, 0, None, threading.Lock()
    sys.addaudithook(self.see)

  def see(self, event, arguments):
    if not touches(event, arguments, self.job['watch']):
      return
    with self.lock:
      self.count += 1
      if self.first is None:
        self.first = time.monotonic()
        if seconds := self.job.get('kill_in'):
          timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
          timer.daemon = True
          timer.start()
      if self.count == self.job.get('kill_at'):
        os.kill(os.getpid(), signal.SIGKILL)
      if self.count == self.job.get('stop_at'):
        os.kill(os.getpid(), signal.SIGSTOP)


def obey_permissions():
  """Takes from root what passes over the permissions of files (Linux: capset with nothing in it)."""
  header = (ctypes.c_uint32 * 2)(0x20080522, 0)
  if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
    raise OSError(ctypes.get_errno(), 'capset')


def command(job, report):
  """Runs a command line in this process, as `python WORDS` would; never returns."""
  words, code = job['words'], 1
  os.environ.update(job.get('env', {}))
  if job.get('plain'):
    obey_permissions()
  if job.get('fsize') is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (job['fsize'],) * 2)
  if job.get('period'):
    workspace.PERIOD = job['period']
  events = Events(job) if job.get('watch') else None
  try:
    if words[0] == '-m':
      sys.argv = words[1:]
      runpy.run_module(words[1], run_name='__main__', alter_sys=True)
    else:
      sys.argv = words
      runpy.run_path(words[0], run_name='__main__')
    code = 0
  except SystemExit as e:
    code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    if isinstance(e.code, str):
      print(e.code, file=sys.stderr)
  except BaseException:
    traceback.print_exc()
  threading._shutdown()
  atexit._run_exitfuncs()
  sys.stdout.flush()
  sys.stderr.flush()
  if events:
    seconds = time.monotonic() - events.first if events.first else 0.0
    os.write(report, json.dumps({'events': events.count, 'seconds': seconds}).encode())
  os._exit(code)


class Child:
  """A command that runs, its output and its report."""

  def __init__(self, job):
    ours, theirs = zip(*(os.pipe() for _ in range(3)))
    sys.stdout.flush()
    self.pid = os.fork()
    if not self.pid:
      for number, pipe in zip((1, 2), theirs):
        os.dup2(pipe, number)
      os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
      for pipe in (*ours, *theirs[:2]):
        os.close(pipe)
      sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, buffering=1) for n, mode in enumerate('rww'))
      command(job, theirs[2])
    for pipe in theirs:
      os.close(pipe)
    self.pipes = dict.fromkeys(ours, b'')
    self.spent, self.seen = 0.0, time.monotonic()

  def stuck(self):
    """Whether it computes without end, or waits for what does not come."""
    fields = pathlib.Path(f'/proc/{self.pid}/stat').read_text().rpartition(')')[2].split()
    spent = sum(map(int, fields[11:13])) / os.sysconf('SC_CLK_TCK')
    if spent > self.spent:
      self.spent, self.seen = spent, time.monotonic()
    return spent > LONGEST or time.monotonic() - self.seen > IDLE

  def wait(self):
    """Until it has ended or stopped; the answer."""
    late = False
    while True:
      self.read(0.01)
      pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
      if pid and os.WIFSTOPPED(status):
        return {'pid': self.pid, 'code': None}
      if pid:
        break
      if not late and self.stuck():
        late = True
        os.kill(self.pid, signal.SIGKILL)
    while self.read(0):
      pass
    out, err, report = (content.decode(errors='replace') for content in self.pipes.values())
    for pipe in self.pipes:
      os.close(pipe)
    code = 'late' if late else os.waitstatus_to_exitcode(status)
    return {'code': code, 'out': out, 'err': err} | (json.loads(report) if report else {})

  def read(self, seconds):
    """Reads what is there; whether anything was."""
    found = False
    for pipe in select.select([*self.pipes], [], [], seconds)[0]:
      content = os.read(pipe, 2**16)
      self.pipes[pipe] += content
      found |= bool(content)
    if not found and seconds:
      time.sleep(seconds)
    return found


def serve():
  """Answers jobs until the input ends."""
  stopped = {}
  for line in sys.stdin:
    job = json.loads(line)
    if 'end' in job:
      child = stopped.pop(job['end'])
      os.kill(child.pid, signal.SIGKILL if job['kill'] else signal.SIGCONT)
      child.seen = time.monotonic()
    else:
      child = Child(job)
    answer = child.wait()
    if answer['code'] is None:
      stopped[child.pid] = child
    print(json.dumps(answer), flush=True)
  for pid in stopped:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)


if __name__ == '__main__':
  root = pathlib.Path(__file__).parents[2]
  os.chdir(root)
  sys.path[0] = str(root)
  from absl import logging

  logging.use_absl_handler()  # before any library logs and is given another, as in the programs
  import tensorflow_datasets  # noqa: F401

  import dynllava_jax.convert.inspection
  import dynllava_jax.convert.report
  import dynllava_jax.data.check
  import dynllava_jax.data.pipeline
  import dynllava_jax.evals.report
  import dynllava_jax.training.loop
  import dynllava_jax.training.plot  # noqa: F401
  from dynllava_jax import workspace

  with contextlib.suppress(ImportError):
    import gcsfs  # noqa: F401

  serve()
  os._exit(0)  # libraries take seconds to end
