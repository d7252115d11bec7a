"""Checkpoints of the hub, from a stub of it on this machine."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest
from conftest import GOLDEN, ROOT

from dynllava_jax import hub
from dynllava_jax.config import DataConfig
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.export import export
from dynllava_jax.convert.source import Request
from dynllava_jax.data.sources import new_tokenizer

COMMIT = 'c' * 40
SHIPPED = {
  'config.json': (GOLDEN / 'public_b/checkpoint/config.json').read_bytes(),
  'model.safetensors': (GOLDEN / 'public_b/checkpoint/model.safetensors').read_bytes(),
  'pytorch_model.bin': b'the same once more',
  'README.md': b'words',
}


class Stub(http.server.ThreadingHTTPServer):
  """A hub with one repository. `cut`: downloads of weights that break off in the middle; `damaged`: whether one bit is wrong."""

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Handler)
    self.asked, self.cut, self.damaged = [], 0, False


class Handler(http.server.BaseHTTPRequestHandler):
  def do_HEAD(self):
    self.answer(body=False)

  def do_GET(self):
    self.answer(body=True)

  def answer(self, body):
    found = re.fullmatch(r'/org/name/resolve/(\w+)/([\w.]+)', self.path)
    if found and found[2] in SHIPPED and found[1] in ('v1', COMMIT):
      self.file(found[2], SHIPPED[found[2]], body)
    elif re.match(rf'/api/models/org/name(/revision/(v1|main|{COMMIT}))?(\?|$)', self.path):
      files = [{'rfilename': n, 'size': len(c), 'lfs': self.lfs(c) if n.startswith('model') else None} for n, c in SHIPPED.items()]
      self.send(200, json.dumps({'id': 'org/name', 'sha': COMMIT, 'siblings': files}).encode(), {}, body)
    else:
      self.send(404, b'', {'X-Error-Code': 'RevisionNotFound' if '/name/revision' in self.path else 'RepoNotFound'}, body)

  def lfs(self, content):
    return {'sha256': hashlib.sha256(content).hexdigest(), 'size': len(content), 'pointerSize': 100}

  def file(self, name, content, body):
    server = self.server
    if body:
      server.asked.append(name)
    headers = {'ETag': f'"{hashlib.sha256(content).hexdigest()}"', 'X-Repo-Commit': COMMIT, 'Accept-Ranges': 'bytes'}
    start = int((self.headers.get('Range') or 'bytes=0-').removeprefix('bytes=').rstrip('-').split('-')[0] or 0)
    if server.damaged and name.startswith('model'):
      content = content[:-1] + bytes([content[-1] ^ 1])
    if start:
      headers['Content-Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
    cut = body and name.startswith('model') and server.cut > 0
    server.cut -= cut
    self.send(206 if start else 200, content[start:], headers, body, half=cut)

  def send(self, status, content, headers, body, half=False):
    self.send_response(status)
    for name, value in (headers | {'Content-Length': str(len(content)), 'Content-Type': 'application/json'}).items():
      self.send_header(name, value)
    self.end_headers()
    if body:
      self.wfile.write(content[: len(content) // 2] if half else content)

  def log_message(self, *_):
    pass


@contextlib.contextmanager
def running():
  server = Stub()
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_only_what_is_read_is_fetched_once_and_whole(tmp_path):
  with running() as server:
    env = os.environ | {
      'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}',
      'HF_HOME': str(tmp_path / 'home'),
      'HF_HUB_DISABLE_PROGRESS_BARS': '1',
      'NO_PROXY': '127.0.0.1',
    }

    def convert(src, dst, **more):
      command = [
        sys.executable,
        'convert_weights.py',
        f'--src={src}',
        f'--dst={tmp_path / dst}',
        f'--vision={GOLDEN / "public_b/clip"}',
      ]
      return subprocess.run(command, cwd=ROOT, env=env | more, capture_output=True, text=True)

    nothing = convert('hf:org/name', 'a', HF_HUB_OFFLINE='1')
    assert nothing.returncode == 1 and 'offline' in nothing.stderr and nothing.stderr.count('\n') == 1
    server.damaged = True
    damaged = convert('hf:org/name', 'a')
    assert damaged.returncode == 1 and 'model.safetensors arrived damaged' in damaged.stderr and damaged.stderr.count('\n') == 1
    server.damaged, server.cut = False, 1
    assert 'converted 124 tensors' in convert('hf:org/name@v1', 'a').stdout
    assert server.cut == 0 and server.asked.count('model.safetensors') == 3  # damaged, broken off, whole
    assert set(server.asked) == {'config.json', 'model.safetensors'}
    before = len(server.asked)
    assert 'converted 124 tensors' in convert('hf:org/name', 'b').stdout and len(server.asked) == before
    unknown = convert('hf:org/name@v9', 'c')
    assert unknown.returncode == 1 and 'has no revision v9' in unknown.stderr and unknown.stderr.count('\n') == 1
    missing = convert('hf:org/other', 'c')
    assert missing.returncode == 1 and 'there is no such repository' in missing.stderr
  assert 'converted 124 tensors' in convert(f'hf:org/name@{COMMIT}', 'd', HF_HUB_OFFLINE='1').stdout
  gone = convert('hf:org/name2', 'e')
  assert gone.returncode == 1 and 'cannot be fetched' in gone.stderr and gone.stderr.count('\n') == 1


@pytest.mark.slow
def test_a_model_of_the_hub_answers_from_python(tmp_path, monkeypatch):
  """As transformers has it, weights and tokenizer; the second time from this machine's cache, without network."""
  convert(Request(src=GOLDEN / 'public_b' / 'checkpoint'), tmp_path / 'recorded')
  export(tmp_path / 'recorded', tmp_path / 'dense', 'llava', drop_predictors=True)
  for name, content in new_tokenizer(DataConfig(), 512).items():
    (tmp_path / 'dense' / name).write_bytes(content)
  convert(Request(src=tmp_path / 'dense'), tmp_path / 'ours')
  export(tmp_path / 'ours', tmp_path / 'hf', 'llava-hf')
  monkeypatch.setitem(globals(), 'SHIPPED', {p.name: p.read_bytes() for p in (tmp_path / 'hf').iterdir() if p.is_file()})
  words = "dl.load({!r}, stages='dense', max_new_tokens=4, text_lengths=(192,)).answer(None, 'How many digits are there?')"
  env = os.environ | {'HF_HOME': str(tmp_path / 'home'), 'DYNLLAVA_JAX_CACHE': str(tmp_path / 'cache'), 'NO_PROXY': '127.0.0.1'}

  def answer(path, **more):
    command = [sys.executable, '-c', f'import dynllava_jax as dl; print({words.format(path)})']
    done = subprocess.run(command, cwd=ROOT, env=env | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]

  expected = answer(str(tmp_path / 'ours'))
  with running() as server:
    assert answer('hf:org/name', HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}') == expected
    assert 'model.safetensors' in server.asked and any(name.startswith('tokenizer') for name in server.asked)
  assert answer('hf:org/name', HF_HUB_OFFLINE='1') == expected


def test_what_conversion_reads():
  sharded = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors', 'model.safetensors.index.json']
  old = ['pytorch_model-00001-of-00001.bin', 'pytorch_model.bin.index.json']
  more = ['config.json', 'tokenizer.model', 'mm_projector.bin', 'README.md', 'optimizer.pt', 'flax_model.msgpack', 'a/config.json']
  assert set(hub.wanted(sharded + old + more)) == {*sharded, 'config.json', 'tokenizer.model', 'mm_projector.bin'}
  assert set(hub.wanted(old + more)) == {*old, 'config.json', 'tokenizer.model', 'mm_projector.bin'}


def test_names_of_repositories():
  assert hub.split('hf:org/name', '--src') == ('org/name', None) and hub.split('hf:o/n@v1', '--src') == ('o/n', 'v1')
  for text in ('hf:', 'hf:name', 'hf:org/name@', 'hf:a/b/c'):
    with pytest.raises(hub.HubError, match='--src: .*expected hf:ORG/NAME'):
      hub.split(text, '--src')
