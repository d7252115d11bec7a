"""Worker processes: they end with their parent, also after kill -9, and leave Ctrl-C to it."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

POLL_SECONDS = 1.0


def die_with_parent(worker: int = 0, workers: int = 1) -> None:
  """Ends this process once its parent is gone; neither grain nor `concurrent.futures` does. The arguments are grain's."""
  del worker, workers
  parent = multiprocessing.parent_process().pid  # not getppid(): a parent killed while this one started is already gone

  def watch():
    while os.getppid() == parent:
      time.sleep(POLL_SECONDS)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def parallel_map(function: Callable[[Any], Any], jobs: Sequence[Any], processes: int) -> Iterator[Iterator[Any]]:
  """The results in the order of the jobs, from so many fresh processes; one process is this one.

  On an error the jobs not yet begun are dropped, on Ctrl-C also those that are being done.

  Raises:
    ChildProcessError: a worker was killed.
  """
  if processes == 1 or not jobs:
    yield map(function, jobs)
    return
  others = set(multiprocessing.active_children())
  # spawn: a fork would copy the threads' locks that jax and grain hold.
  context = multiprocessing.get_context('spawn')
  executor = concurrent.futures.ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context, initializer=die_with_parent)
  try:
    # Workers inherit what is blocked: a terminal sends Ctrl-C to them too, and each would print a traceback.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
      results = executor.map(function, jobs)
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    yield results
  except concurrent.futures.BrokenExecutor:
    hint = 'perhaps by the system for lack of memory; the same command goes on, with fewer processes it needs less'
    raise ChildProcessError(f'a worker process was killed, {hint}') from None
  except KeyboardInterrupt:
    for process in set(multiprocessing.active_children()) - others:
      process.terminate()
    raise
  finally:
    executor.shutdown(wait=True, cancel_futures=True)
