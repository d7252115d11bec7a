"""All processes of a run must have the same config, data, versions and code: compared when it starts, and the odd one named."""

import collections
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dynllava_jax.config import ConfigError

LONGEST = 60  # characters of a value in a message


def require_same(facts: Mapping[str, Any], remedy: str) -> None:
  """Compares facts of this process with those of the others. All processes call it alike.

  Args:
    facts: JSON-ready, by name; groups are compared setting by setting.
    remedy: what to do about a difference.

  Raises:
    ConfigError: names the first fact that differs, the host that stands alone with its value, and both values.
  """
  if jax.process_count() == 1:
    return
  told = [json.loads(text) for text in _gathered(json.dumps([socket.gethostname(), dict(_flat(facts))]))]
  if found := odd_one([values for _, values in told]):
    name, host, own, usual = found
    others = 'the others have' if len(told) > 2 else f'host {1 - host} has'
    raise ConfigError(f'{name}: host {host} ({told[host][0]}) has {_shown(own)}, {others} {_shown(usual)}; {remedy}')


def odd_one(of_hosts: Sequence[Mapping[str, Any]]) -> tuple[str, int, Any, Any] | None:
  """(name, host, its value, the value that most have) of the first difference; of two hosts the second is the odd one."""
  for name in dict.fromkeys(name for values in of_hosts for name in values):
    texts = [json.dumps(values.get(name)) for values in of_hosts]
    usual = max(texts, key=collections.Counter(texts).get)  # of equally many the first
    host = next((i for i, text in enumerate(texts) if text != usual), None)
    if host is not None:
      return name, host, json.loads(texts[host]), json.loads(usual)
  return None


def _flat(group: Mapping[str, Any], before: str = '') -> list[tuple[str, Any]]:
  out = []
  for name, value in group.items():
    out += _flat(value, f'{before}{name}.') if isinstance(value, Mapping) else [(f'{before}{name}', value)]
  return out


def _gathered(text: str) -> list[str]:
  """The texts of all processes."""
  own = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int64(len(own)))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: len(own)] = own
  rows = multihost_utils.process_allgather(padded)
  return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]


def _shown(value: Any) -> str:
  text = str(value)
  return text if len(text) <= LONGEST else f'{text[:LONGEST]}...'
