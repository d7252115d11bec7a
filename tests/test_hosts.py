"""Hosts that end early: the others end too, within a minute and with one line that names the one."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from dynllava_jax import hosts, locks

SILENT = """E1125 coordination_service.cc:1549] ... UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
/job:jax_worker/replica:0/task:1
3
The tasks have crashed. Check the task logs for an earlier error
"""
LEADER = 'F1125 client.h:80] Terminating process because the JAX distributed service ... the leader task was preempted or died'


def test_the_dump_tells_which_host_it_was():
  names = b'["a", "b", "c"]'
  assert hosts._gone(SILENT, names).startswith('host 1 (b), host 3: has ended, or has not been heard of for 30 s')
  assert hosts._gone(LEADER, names).startswith('host 0 (a): has ended')
  assert hosts._gone('something new', b'').startswith('another host: has ended')


def test_what_a_child_writes_before_the_dump_is_passed_on(capfd):
  errors, written = os.pipe()
  os.write(written, b'of the program\n' + SILENT.encode() + b'stack\n')
  os.close(written)
  hosts._pass_on(errors, held := [])
  assert capfd.readouterr().err == 'of the program\n' and b''.join(held) == SILENT.encode() + b'stack\n'


def start(workdir, *arguments):
  """Two processes of train.py as Slurm would start them."""
  job = str(random.randrange(10**6))
  flags = {'XLA_FLAGS': '--xla_force_host_platform_device_count=1', 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  slurm = {'SLURM_JOB_ID': job, 'SLURM_STEP_NODELIST': '127.0.0.1', 'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_NODES': '1'}
  command = [sys.executable, 'train.py', '--multihost', '--config=configs/digits.py:base', f'--workdir={workdir}', *arguments]
  return [
    subprocess.Popen(
      command,
      cwd=ROOT,
      env=os.environ | flags | slurm | {'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_host_ends_the_other(victim, tmp_path):
  both = start(tmp_path / 'run', '--config.log_every=1', '--config.steps=100000')
  metrics, deadline = tmp_path / 'run' / 'metrics.jsonl', time.monotonic() + 200
  while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
    time.sleep(0.2)
  killed = time.monotonic()
  both[victim].send_signal(signal.SIGKILL)
  _, errors = both[1 - victim].communicate(timeout=60)
  assert time.monotonic() - killed < 60 and both[1 - victim].returncode == 1
  lines = [line for line in errors.splitlines() if not line.startswith('[Gloo]')]
  assert len(lines) == 1 and lines[0].startswith(f'error: host {victim} (') and 'start the same command on every host' in lines[0]
  both[victim].communicate()


@pytest.mark.slow
def test_a_host_with_an_error_tells_the_others(tmp_path):
  workdir = tmp_path / 'run'
  with locks.sole_use(workdir, '--workdir'):
    both = start(workdir)
    told = [host.communicate(timeout=120)[1] for host in both]
  assert [host.returncode for host in both] == [1, 1]
  assert 'another process is writing there' in told[0]
  assert 'error: host 0 (' in told[1] and 'another process is writing there' in told[1] and 'Traceback' not in told[1]
