"""Many questions through engines, one per device: answered in any order, and stored as they come."""

import concurrent.futures
import dataclasses
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dynllava_jax.evals.layout import Layout, row_seed
from dynllava_jax.evals.store import AnswerStore
from dynllava_jax.serving.engine import Engine, Ticket
from dynllava_jax.serving.request import Options, Reply, Request

AHEAD = 2  # prompts that wait for each slot: enough that no slot waits, and few pictures in memory


def meshes(devices: Sequence[Any], tensor: int) -> list[Mesh]:
  """Devices in groups of `tensor` that hold the weights together, one engine each."""
  groups = np.asarray(devices).reshape(-1, 1, 1, tensor)
  return [Mesh(group, ('data', 'fsdp', 'tensor')) for group in groups]


class Work:
  """The questions that are left, for several engines to take from. `fail`: what went wrong first."""

  def __init__(self, layout: Layout, left: Sequence[int], options: Options, store: AnswerStore, advance: Callable[[int], None]):
    """`left`: question numbers; `advance` is told how many more are answered."""
    # Prompts of one bucket after each other, so that they are run together.
    self._left = sorted(left, key=lambda i: -layout.bucket[i])
    self._layout, self._options, self._store, self._advance = layout, options, store, advance
    self._lock = threading.Lock()
    self.fail: BaseException | None = None

  def run(self, engines: Sequence[Engine]) -> None:
    """Answers all; raises the first error after the others have stored what they have."""
    with concurrent.futures.ThreadPoolExecutor(len(engines)) as pool:
      list(pool.map(self._drive, engines))
    if self.fail is not None:
      raise self.fail

  def _drive(self, engine: Engine) -> None:
    try:
      tickets: dict[int, Ticket] = {}
      while True:
        for i in self._take(engine.slots * (1 + AHEAD) - len(tickets)):
          tickets[i] = engine.submit(self._request(i))
        if not tickets:
          return
        engine.step()
        over = [i for i, ticket in tickets.items() if ticket.finish]
        if over:
          rows = [answer_row(self._layout, i, tickets.pop(i).reply()) for i in over]
          with self._lock:
            self._store.add(rows)
            self._advance(len(rows))
    except BaseException as e:
      self.fail = self.fail or e

  def _take(self, count: int) -> list[int]:
    with self._lock:
      if self.fail is not None:
        return []
      taken, self._left = self._left[:count], self._left[count:]
      return taken

  def _request(self, i: int) -> Request:
    options = dataclasses.replace(self._options, seed=int(row_seed(self._options.seed, i)))
    return Request(f'question {self._layout.questions[i].id}', self._layout.rows([i]), options)


def answer_row(layout: Layout, i: int, reply: Reply) -> dict[str, Any]:
  """One line of the answer file: LLaVA's fields, and under `metadata` what was counted."""
  question = layout.questions[i]
  metadata = {
    'row': i,
    'rendered_prompt': layout.rendered[i],
    'image_tokens': len(reply.kept_image),
    'tokens': list(reply.tokens),
    'log_prob': round(sum(reply.log_probs), 4),
    'kept': ''.join('01'[k] for k in reply.kept),
    'evicted': reply.evicted,
    'finish': reply.finish,
  }
  return {
    'question_id': question.id,
    'prompt': question.prompt,
    'text': reply.text,
    **question.extra,
    'model_id': layout.loaded.name,
    'metadata': metadata,
  }


def parts(folder: pathlib.Path, hosts: int) -> list[pathlib.Path]:
  """Answer files of so many hosts."""
  return [folder / f'host-{host}-of-{hosts}.jsonl' for host in range(hosts)]
