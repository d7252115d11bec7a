"""metrics.jsonl and TensorBoard: nothing that exists is lost, what cannot be written is named."""

import json
import resource

import pytest

from dynllava_jax.training.metrics import MetricsLog, read_metrics, unreadable_lines


def test_bad_lines_are_kept_and_passed_over(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  good = [json.dumps({'step': n, 'loss': 1.0 / n}).encode() for n in range(1, 7)]
  bad = [b'\xff\xfe\x00 {', b'[1, 2]', b'{"step": "3"}', b'{"step": 2, "loss": "low"}', b'[' * 50_000]
  content = b'\n'.join([*good[:3], *bad, *good[3:], b''])
  file.write_bytes(content)
  before = file.stat()
  MetricsLog(tmp_path, 6).close()
  assert file.read_bytes() == content and file.stat().st_mtime_ns == before.st_mtime_ns, 'nothing had to be rewritten'
  log = MetricsLog(tmp_path, 5)
  log.write(6, {'loss': 0.5})
  log.close()
  assert file.read_bytes() == content.replace(good[5], b'{"step": 6, "loss": 0.5}')
  assert [line['step'] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
  assert unreadable_lines(tmp_path) == f'{file}: 5 of its lines cannot be read, left as they are and passed over: 4, 5, 6, 7, 8'


def test_a_last_line_without_its_end_is_not_grown_together_with_the_next(tmp_path):
  (tmp_path / 'metrics.jsonl').write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}')
  log = MetricsLog(tmp_path, 2)
  log.write(3, {'loss': 0.5})
  log.close()
  assert [line['step'] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_tensorboard_that_cannot_be_written_ends_no_run(tmp_path, capsys):
  (tmp_path / 'tensorboard').write_text('a file in its place')
  log = MetricsLog(tmp_path, 0)
  for step in (1, 2):
    log.write(step, {'loss': 1.0})
  log.close()
  assert len(read_metrics(tmp_path)) == 2
  assert capsys.readouterr().err.count('TensorBoard files cannot be written (') == 1


def test_metrics_that_cannot_be_written_are_named(tmp_path):
  log = MetricsLog(tmp_path, 0)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
  try:
    with pytest.raises(OSError, match='File too large.*metrics.jsonl'):
      log.write(1, {'loss': 1.0})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.close()
