"""Worker processes: they end with their parent, also after kill -9."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator

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
def pool(processes: int) -> Iterator[concurrent.futures.Executor]:
  """Executor of so many fresh processes. On an error the work not yet begun is dropped."""
  # spawn: a fork would copy the threads' locks that jax and grain hold.
  context = multiprocessing.get_context('spawn')
  executor = concurrent.futures.ProcessPoolExecutor(processes, mp_context=context, initializer=die_with_parent)
  try:
    yield executor
  finally:
    executor.shutdown(wait=True, cancel_futures=True)
