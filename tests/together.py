"""Several processes of one command line, as Slurm would start them on several hosts."""

import os
import random
import subprocess
import sys

from conftest import ROOT

FLAGS = {'XLA_FLAGS': '--xla_force_host_platform_device_count=1', 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}


def start(words, count=2, odd=(), cwd=ROOT):
  """Starts `words`, without 'python', so many times. `odd`: further words of the last one, which runs in `cwd`."""
  slurm = {'SLURM_JOB_ID': str(random.randrange(10**6)), 'SLURM_STEP_NODELIST': '127.0.0.1'}
  slurm |= {'SLURM_NTASKS': str(count), 'SLURM_STEP_NUM_NODES': '1'}
  command = [sys.executable, *map(str, words)]
  return [
    subprocess.Popen(
      [*command, *odd] if i == count - 1 else command,
      cwd=cwd if i == count - 1 else ROOT,
      env=os.environ | FLAGS | slurm | {'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]
