"""Object stores on this machine, one per scheme, as other programs: what the tests of this folder write to."""

import contextlib
import os
import socket
import subprocess
import sys
import time

BUCKET = 'a-bucket'
# The emulator's own server takes one connection at a time and waits for ever for what a stopped program meant to say.
GS = """
import http.server, io, threading
from gcp_storage_emulator import server as emulator

class Patient(http.server.ThreadingHTTPServer):
  request_queue_size = 128

http.server.HTTPServer = Patient
one = threading.Lock()

class Handler(emulator.RequestHandler):
  timeout = 30

  def parse_request(self):
    if not super().parse_request():
      return False
    if length := int(self.headers.get('Content-Length', 0)):
      self.rfile = io.BytesIO(self.rfile.read(length))
    return True

class Router(emulator.Router):
  def handle(self, method):
    with one:
      super().handle(method)

emulator.RequestHandler, emulator.Router = Handler, Router
emulator.create_server('127.0.0.1', {port}, in_memory=True, default_bucket={bucket!r}).run()
"""
PROGRAMS = {'gs': GS, 's3': 'from moto.server import main; main(["-H", "127.0.0.1", "-p", "{port}"])'}


def environment(scheme, port):
  """What the command lines need to find the store."""
  url = f'http://127.0.0.1:{port}'
  if scheme == 'gs':
    return {'STORAGE_EMULATOR_HOST': url}
  keys = {'AWS_ACCESS_KEY_ID': 'a', 'AWS_SECRET_ACCESS_KEY': 'b', 'AWS_DEFAULT_REGION': 'us-east-1'}
  return keys | {'AWS_ENDPOINT_URL': url, 'AWS_EC2_METADATA_DISABLED': 'true'}


@contextlib.contextmanager
def running(scheme):
  """Yields the environment of a store with an empty bucket."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  code = PROGRAMS[scheme].format(port=port, bucket=BUCKET)
  process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    _wait(port)
    env = environment(scheme, port)
    if scheme == 's3':
      made = f'import boto3; boto3.client("s3").create_bucket(Bucket={BUCKET!r})'
      subprocess.run([sys.executable, '-c', made], env=os.environ | env, check=True, timeout=60)
    yield env
  finally:
    process.kill()
    process.wait()


def _wait(port):
  for _ in range(300):
    with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1):
      return
    time.sleep(0.1)
  raise TimeoutError(f'no store at port {port}')
