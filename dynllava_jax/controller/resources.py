"""How full the memory is: the device's where its backend says so, otherwise this process's share of the machine's."""

import os
import pathlib

import jax

CGROUP = pathlib.Path('/sys/fs/cgroup/memory.max')  # of a container, where one limits it


def memory_share() -> float | None:
  """Share of the memory in use, the fullest device's; None where nothing says."""
  stats = [s for s in (d.memory_stats() for d in jax.local_devices()) if s and s.get('bytes_limit')]
  if stats:
    return max(s['bytes_in_use'] / s['bytes_limit'] for s in stats)
  try:
    held = int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  except (OSError, ValueError, IndexError):  # not Linux
    return None
  return held / machine_memory()


def machine_memory() -> int:
  """Bytes that this process may use at most: the machine's, or its container's."""
  total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  try:
    return min(total, int(CGROUP.read_text()))
  except (OSError, ValueError):  # no container, or 'max'
    return total
