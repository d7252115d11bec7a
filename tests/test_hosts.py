"""Hosts that end early: the others end too, within a minute and with one line that names the one."""

import os
import shutil
import signal
import time

import pytest
import together
from conftest import ROOT

from dynllava_jax import checkpoint, hosts, locks
from dynllava_jax.training.agreement import odd_one
from dynllava_jax.training.metrics import read_metrics

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


def test_of_several_the_odd_one_is_named_and_of_two_the_second():
  same = {'config.seed': 1, 'code.jax': '0.10'}
  assert odd_one([same] * 4) is None
  assert odd_one([same, same, same | {'code.jax': '0.9'}]) == ('code.jax', 2, '0.9', '0.10')
  assert odd_one([same | {'config.seed': 0}, same, same]) == ('config.seed', 0, 0, 1)
  assert odd_one([same, {'config.seed': 1}]) == ('code.jax', 1, None, '0.10')


def start(workdir, *arguments, **how):
  """Processes of train.py, see `together`."""
  words = ('train.py', '--multihost', '--config=configs/digits.py:base', f'--workdir={workdir}', *arguments)
  return together.start(words, **how)


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
  assert time.monotonic() - killed < 60 and both[1 - victim].returncode == hosts.AGAIN
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


@pytest.mark.slow
def test_the_odd_one_of_four_is_named(tmp_path):
  """By all of them, before anything is written."""
  four = start(tmp_path / 'run', count=4, odd=['--config.optimizer.learning_rate=0.5'])
  told = [host.communicate(timeout=200)[1] for host in four]
  assert [host.returncode for host in four] == [1] * 4, told
  for errors in told:
    found = [line for line in errors.splitlines() if 'config.optimizer.learning_rate: host 3 (' in line]
    assert found and 'has 0.5, the others have 0.001; start all hosts alike' in found[0], errors
    assert 'Traceback' not in errors
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_two_with_other_code(tmp_path):
  for name in ('dynllava_jax', 'configs'):
    shutil.copytree(ROOT / name, tmp_path / 'other' / name, ignore=shutil.ignore_patterns('__pycache__'))
  shutil.copy(ROOT / 'train.py', tmp_path / 'other')
  with open(tmp_path / 'other' / 'dynllava_jax' / 'losses.py', 'a') as file:
    file.write('# changed here alone\n')
  both = start(tmp_path / 'run', cwd=tmp_path / 'other')
  told = [host.communicate(timeout=200)[1] for host in both]
  assert [host.returncode for host in both] == [1, 1], told
  assert all('code.dynllava_jax: host 1 (' in errors for errors in told), told


@pytest.mark.slow
def test_four_are_stopped_by_sigterm_and_go_on(tmp_path):
  """SIGTERM to one: all save after the same step and exit with 75; the same command ends what they began."""
  workdir = tmp_path / 'run'
  arguments = ('--config.batch_size=4', '--config.log_every=2', '--config.steps=12', f'--compilation_cache={tmp_path / "compiled"}')
  four = start(workdir, *arguments, count=4)
  metrics, deadline = workdir / 'metrics.jsonl', time.monotonic() + 200
  while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
    time.sleep(0.1)
  four[2].terminate()
  told = [host.communicate(timeout=200) for host in four]
  assert [host.returncode for host in four] == [hosts.AGAIN] * 4, told
  (step,) = checkpoint.all_steps(workdir / 'checkpoints')
  assert all(f'stopped after step {step} of 12' in out for out, _ in told)
  again = start(workdir, *arguments, count=4)
  told = [host.communicate(timeout=300) for host in again]
  assert [host.returncode for host in again] == [0] * 4, told
  assert f'goes on from step {step}' in told[0][0]
  assert [line['step'] for line in read_metrics(workdir)] == [2, 4, 6, 8, 10, 12]
