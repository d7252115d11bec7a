"""Two processes that fill one folder of a store: what they train is in the store, killed and gone on with; so is an evaluation."""

import json
import signal
import time

import pytest
import together
from test_programs import TINY, fetched, names

from dynllava_jax import checkpoint, hosts, lease
from dynllava_jax.training.metrics import read_metrics


def ended(both, codes, seconds=300):
  told = [host.communicate(timeout=seconds) for host in both]
  assert [host.returncode for host in both] == codes, told
  assert not any('Traceback' in err for _, err in told), told
  return told


@pytest.mark.slow
@pytest.mark.parametrize('bucket', ['gs'], indirect=True)
def test_trained_killed_gone_on_with_and_evaluated(cloud_folder, tmp_path):
  (tmp_path / 'tiny.py').write_text(TINY.replace('steps=12', 'mesh=dict(fsdp=2), steps=12'))
  workdir = f'{cloud_folder}/run'
  train = ('train.py', '--multihost', f'--config={tmp_path / "tiny.py"}:base', f'--workdir={workdir}')
  train += ('--config.steps=100000', '--config.save_every=100', f'--compilation_cache={tmp_path / "compiled"}')
  both, deadline = together.start(train), time.monotonic() + 300
  while not any(n.endswith('integrity.json') for n in names(workdir)) and time.monotonic() < deadline:
    assert all(host.poll() is None for host in both), [host.communicate() for host in both]
    time.sleep(0.2)
  both[1].send_signal(signal.SIGKILL)
  told = ended(both, [hosts.AGAIN, -signal.SIGKILL])
  assert 'error: host 1 (' in told[0][1]
  saved = max(int(n.split('/')[1]) for n in names(workdir) if n.endswith('integrity.json'))

  both = together.start(train)
  for line in both[0].stdout:
    if f'goes on from step {saved}' in line:
      break
  both[1].terminate()
  told = ended(both, [hosts.AGAIN] * 2)
  assert 'stopped after step' in told[0][0]
  steps = [line['step'] for line in read_metrics(fetched(f'{workdir}/metrics.jsonl').parent)]
  assert steps == list(range(1, len(steps) + 1)) and len(steps) > saved
  assert checkpoint.locate(f'{workdir}/checkpoints')[1] == len(steps)
  assert checkpoint.load_params(f'{workdir}/checkpoints') and lease.LEASE not in names(workdir)

  out = f'{cloud_folder}/results'
  evaluate = ('eval.py', '--multihost', f'--config={tmp_path / "tiny.py"}:eval', f'--checkpoint={workdir}/checkpoints')
  ended(together.start((*evaluate, f'--out={out}')), [0, 0])
  assert len(fetched(f'{out}/answers/dense.jsonl').read_text().splitlines()) == 12
  assert json.loads(fetched(f'{out}/results.json').read_text())['questions'] == 12
