"""Several processes, one per host: they find each other, and when one of them ends early the others end too, with one line.

jax's coordination service, which all of them talk to, notices a host that is gone and aborts the others with a dump of C++; by then
nothing can be said from inside. So the program runs in a child process. What the user started stays with it as its guard: it passes
on what the child writes, but for that dump, and says which host it was. A host that ends with an error of its own tells the others.
"""

import atexit
import contextlib
import ctypes
import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from dynllava_jax import paths
from dynllava_jax import workspace as workspaces
from dynllava_jax.paths import Given

HEARTBEAT = 30  # seconds of silence after which the service takes a host for gone
AGREE = 45  # seconds that a host whose collective failed waits to hear of the others
POLL = 1.0  # seconds between looks at what other hosts said
ENDED, NAME, MEET = 'dynllava_jax/ended/', 'dynllava_jax/name/', 'dynllava_jax/meet/'  # keys of the service
PATIENCE = 3 * 3600  # seconds that hosts wait for each other while one of them fetches or uploads
DUMP = re.compile(rb'coordination_service|preemption_sync_manager|Terminating process because the JAX distributed')
GONE = re.compile(r'stopped sending heartbeats\):\s*(.*?)\s*The tasks have crashed', re.DOTALL)
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PARENT_DIES = 1  # PR_SET_PDEATHSIG of prctl(2)
AGAIN = 75  # exit status where starting again is what helps (EX_TEMPFAIL of sysexits.h), as in `training.stopping`
WAY_ON = 'start the same command on every host again to go on from the last saved step'


class _Joined:
  """What a process knows of the others; a guard's child writes their names to `names`."""

  names: int | None = None
  client = None
  own, count = 0, 1
  failed = False


def guard() -> None:
  """Returns in a child process, where the program goes on; the caller stays behind and ends with it."""
  sys.stdout.flush()
  errors, written = os.pipe()
  names, told = os.pipe()
  own = os.getpid()
  child = os.fork()
  if not child:
    _end_with(own)
    os.setpgid(0, 0)  # Ctrl-C reaches the guard alone, which passes it on
    os.dup2(written, 2)
    _Joined.names = told
    return
  os.close(written)
  os.close(told)
  for number in FORWARDED:
    signal.signal(number, lambda n, _: os.kill(child, n))
  held: list[bytes] = []
  reader = threading.Thread(target=_pass_on, args=(errors, held), daemon=True)
  reader.start()
  _, status = os.waitpid(child, 0)
  reader.join(timeout=5)
  code = os.waitstatus_to_exitcode(status)
  if held and code < 0:
    text = b''.join(held).decode(errors='replace')
    os.write(2, f'error: {_gone(text, os.read(names, 2**20))}; {WAY_ON}\n'.encode())
    sys.exit(AGAIN)
  sys.stderr.write(b''.join(held).decode(errors='replace'))
  sys.exit(code if code >= 0 else 128 - code)


def _end_with(parent: int) -> None:
  """Ends this process once its parent is gone, also after kill -9, where the system can do that (Linux)."""
  if prctl := getattr(ctypes.CDLL(None), 'prctl', None):
    prctl(PARENT_DIES, signal.SIGKILL)
  if os.getppid() != parent:
    os._exit(1)


def _pass_on(errors: int, held: list[bytes]) -> None:
  """Writes what comes to stderr, line by line; from the beginning of the service's dump on it is held."""
  with os.fdopen(errors, 'rb') as lines:
    for line in lines:
      if held or DUMP.search(line):
        held.append(line)
      else:
        os.write(2, line)


def _gone(text: str, names: bytes) -> str:
  """Which host the service's dump speaks of."""
  known = json.loads(names) if names else []
  found = GONE.search(text)
  numbers = [int(n) for n in re.findall(r'(\d+)\s*$', found[1], re.MULTILINE)] if found else []
  if not numbers and 'leader' in text:
    numbers = [0]  # the service runs there
  hosts = [f'host {n}' + (f' ({known[n]})' if n < len(known) else '') for n in numbers] or ['another host']
  return f'{", ".join(hosts)}: has ended, or has not been heard of for {HEARTBEAT} s'


def join() -> None:
  """Joins the other processes, and from then on listens to what they say.

  Raises:
    RuntimeError, ValueError: they cannot be found.
  """
  import jax
  from jax._src import distributed  # jax shows its key-value store nowhere else

  jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
  client, own = distributed.global_state.client, jax.process_index()
  client.key_value_set(f'{NAME}{own}', socket.gethostname())
  names = [client.blocking_key_value_get(f'{NAME}{i}', AGREE * 1000) for i in range(jax.process_count())]
  if _Joined.names is not None:
    os.write(_Joined.names, json.dumps(names).encode())
  _Joined.client, _Joined.own, _Joined.count = client, own, jax.process_count()
  left = threading.Event()
  listener = threading.Thread(target=_listen, args=(client, own, names, left), daemon=True)
  atexit.register(_leave, own, listener, left)  # before jax's own, which waits for the others
  listener.start()


def _listen(client, own: int, names: list[str], left: threading.Event) -> None:
  while not left.wait(POLL):
    try:
      ended = client.key_value_dir_get(ENDED)
    except Exception:  # the service is gone: it says so itself
      return
    for key, message in ended:
      number = int(key.rpartition('/')[2])
      if number != own:
        os.write(2, f'error: host {number} ({names[number]}) has ended: {message}; {WAY_ON}\n'.encode())
        os._exit(1)


@contextlib.contextmanager
def workspace(path: Given, flag: str, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[pathlib.Path]:
  """`workspace.workspace` for a program that may run on several hosts. Of a folder in a store each has a copy of its own then, and
  only that of the first host is uploaded; the others wait until it is.

  Raises:
    StoreError, BusyError: as there. ConnectionError: the first host does not answer.
  """
  if not apart(path):
    with workspaces.workspace(path, flag, wanted=wanted) as folder:
      yield folder
    return
  code = None
  if _Joined.own:
    _meet('cleared')
  with workspaces.copied(path, wanted) if _Joined.own else workspaces.workspace(path, flag, wanted=wanted) as folder:
    if not _Joined.own:
      _meet('cleared')
    _meet('copied')
    try:
      yield folder
    except SystemExit as e:  # the end of a run that all of them stopped
      code = e.code
  _meet('uploaded')
  if code is not None:
    sys.exit(code)


def apart(path: Given) -> bool:
  """Whether each host works in a copy of its own of this folder."""
  return _Joined.count > 1 and not paths.is_local(path)


def _meet(name: str) -> None:
  """Waits until all hosts are here; ConnectionError if they do not come."""
  try:
    _Joined.client.wait_at_barrier(f'{MEET}{name}', PATIENCE * 1000)
  except RuntimeError as e:
    raise ConnectionError(f'the other hosts did not come as far as this one ({" ".join(str(e).split())[:200]}); {WAY_ON}') from None


def failed(message: str) -> None:
  """To be called before this process ends early. Tells the others why, if there are any."""
  if _Joined.client is None:
    return
  _Joined.failed = True
  with contextlib.suppress(Exception):  # nobody may be left
    _Joined.client.key_value_set(f'{ENDED}{_Joined.own}', message)


def wait_for_the_news() -> None:
  """To be called when something failed that other hosts may be the reason of: if so, this process ends here, told of by another."""
  if _Joined.client is not None:
    time.sleep(AGREE)


def _leave(own: int, listener: threading.Thread, left: threading.Event) -> None:
  if _Joined.failed:
    sys.stdout.flush()
    sys.stderr.flush()
    if own == 0:
      time.sleep(3 * POLL)  # the service ends with this process: the others must have read
    os._exit(1)
  left.set()
  listener.join(5 * POLL)  # Python ends a thread that is inside of C++ then by aborting the process
